"""Chat histories as token ids: for environments whose clients send all messages with every call."""

import asyncio

from megatron_espo.rollout.engine import Generation
from megatron_espo.rollout.environments import Policy, TrajectoryBuilder
from megatron_espo.types import Prompt

Messages = list[dict[str, str]]


class NoRoomError(ValueError):
    """The limits of the trajectory leave no token for another turn."""


class ChatSession:
    """Answers a client that sends its whole history with every call.

    The history is rendered with the chat template and compared with the token ids that are known.
    It continues the trajectory where it begins with them; elsewhere the trajectory is split.
    Sampled ids are kept as they are.

    Attributes:
        builder: the trajectory so far; ``builder.splits`` counts the splits.
        last: the last turn; ``None``: none yet.
    """

    def __init__(self, prompt: Prompt, policy: Policy) -> None:
        self.builder, self.last = TrajectoryBuilder(prompt), None
        self._policy, self._turn = policy, asyncio.Lock()

    async def reply(self, messages: Messages, max_tokens: int | None = None) -> str:
        """The text of the model's next turn. Calls of one session run one after the other.

        Raises:
            NoRoomError: of context or of response tokens.
        """
        async with self._turn:
            self.builder.set_context(self._policy.render(messages))
            room = self.builder.room(self._policy)
            if room < 1:
                raise NoRoomError("the limits of the trajectory leave no room for another turn")
            found: Generation = await self._policy.generate(
                self.builder.context, max_tokens=min(room, max_tokens or room)
            )
            self.builder.add_turn(found)
            self.last = found
            return self._policy.decode(found.token_ids.tolist())
