"""Several engines as one: rank 0 deals prompts out to the engines of other ranks, which may be on other machines."""

import os
import secrets
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_espo.rollout.engine import Engine
from megatron_espo.rollout.lifecycle import EngineError
from megatron_espo.rollout.requests import Enough, request_seeds
from megatron_espo.types import Prompt, Rollout

_POLL_SECONDS = 0.5


class Fleet:
    """The engines of a run behind one ``generate``, on rank 0; the other owners answer from a thread of their own.

    Rank 0 listens on its own address (torchrun's ``MASTER_ADDR``) while the others connect, and no longer; both sides prove that they know a
    key which rank 0 draws and the process group carries. Weight syncs do not pass here: each owner's engine gets them from its own process.

    Args:
        engine: this rank's engine, ``None`` on ranks without one. Whoever made it closes it.
        owners: the ranks that have one, rank 0 first.

    Collectives: with several owners, one broadcast of an object over all ranks.
    """

    def __init__(self, engine: Engine | None, owners: Sequence[int]) -> None:
        self._engine, self._others = engine, []
        if len(owners) <= 1:
            return
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            key = secrets.token_bytes(32)
            with Listener((os.environ["MASTER_ADDR"], 0), backlog=len(owners), authkey=key) as listener:
                box[0] = (listener.address, key)
                dist.broadcast_object_list(box, src=0)
                connections = [listener.accept() for _ in owners[1:]]
            by_rank = {connection.recv(): connection for connection in connections}
            self._others = [_Remote(by_rank[rank], rank) for rank in owners[1:]]
        else:
            dist.broadcast_object_list(box, src=0)
            if engine is not None:
                address, key = box[0]
                connection = Client(address, authkey=key)
                connection.send(dist.get_rank())
                threading.Thread(target=_serve, args=(engine, connection), daemon=True).start()

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seed: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        sampling: dict[str, Any] | None = None,
        on_finished: Callable[[int, str], None] | None = None,
        begun: Sequence[Sequence[Rollout]] = (),
        enough: Enough | None = None,
    ) -> list[list[Rollout]]:
        """:meth:`Engine.generate` with all engines: prompt ``i`` goes to engine ``i`` modulo their number. Rank 0 only.

        With a ``seed`` the responses do not depend on how many engines there are; with ``enough``, of which each gets its share, their
        number decides which are finished.

        Raises:
            EngineError: one of the engines failed, by its rank. What ``on_progress`` raises ends this rank's engine and interrupts the others.
        """
        count = 1 + len(self._others)
        seeds = request_seeds(prompts, group_size, seed)
        shares = [
            _Share(prompts[i::count], group_size, seeds[i::count], sampling, begun[i::count], enough and enough.share(i, count))
            for i in range(min(count, len(prompts)))
        ]
        busy = self._others[: len(shares) - 1]
        own_responses = len(shares[0].prompts) * group_size

        def tell_of(share: int) -> Callable[[int, str], None] | None:
            """``on_finished`` for an engine that numbers its own share."""

            def tell(number: int, text: str) -> None:
                place, position = divmod(number, group_size)
                on_finished((place * count + share) * group_size + position, text)

            return on_finished and tell

        def relay(finished: int, _: int) -> None:
            for other in busy:
                other.take_news()
            if on_progress is not None:
                on_progress(finished + sum(other.finished for other in busy), len(prompts) * group_size)

        try:
            for i, other in enumerate(busy, start=1):
                other.begin(shares[i], tell_of(i))
            own = _generate(self._engine, shares[0], relay, tell_of(0))
            relay(own_responses, 0)
            while waiting := [other.connection for other in busy if other.answer is None]:
                wait(waiting, _POLL_SECONDS)
                relay(own_responses, 0)
        finally:
            for other in busy:
                other.interrupt()
        groups: list[Any] = [None] * len(prompts)
        for i, found in enumerate([own, *(other.answer for other in busy)]):
            groups[i::count] = found
        return groups

    def close(self) -> None:
        """End the conversations; the threads of the other owners end with them."""
        for other in self._others:
            other.connection.close()


class _Share(NamedTuple):
    """One engine's part of a call of :meth:`Fleet.generate`."""

    prompts: Sequence[Prompt]
    group_size: int
    seed: Sequence[Sequence[int | None]]
    sampling: dict[str, Any] | None
    begun: Sequence[Sequence[Rollout]]
    enough: Enough | None


class _Remote:
    """Rank 0's end of the conversation with another owner.

    Attributes:
        finished: responses of the request under way.
        answer: its groups of rollouts; ``None`` until they have come.
    """

    def __init__(self, connection: Connection, rank: int) -> None:
        self.connection, self._rank = connection, rank
        self.finished, self.answer, self._waits = 0, None, False
        self._tell: Callable[[int, str], None] | None = None

    def begin(self, share: _Share, tell: Callable[[int, str], None] | None) -> None:
        self.finished, self.answer, self._waits, self._tell = 0, None, True, tell
        self._guarded(self.connection.send, (share, tell is not None))

    def take_news(self) -> None:
        """Read what has come. EngineError: the engine has failed."""
        while self._waits and self._guarded(self.connection.poll):
            self._receive()

    def interrupt(self) -> None:
        """Nothing is under way afterwards."""
        if self._waits:
            try:
                self.connection.send(None)
                while self._waits:
                    self._receive()
            except (EngineError, OSError):
                pass  # whatever interrupted the request is told instead

    def _receive(self) -> None:
        kind, payload = self._guarded(self.connection.recv)
        if kind == "progress":
            self.finished = payload
            return
        if kind == "finished":
            self._tell(*payload)
            return
        self._waits = False
        if kind == "error":
            raise EngineError(f"the engine of rank {self._rank}: {payload}")
        self.answer, self.finished = payload, sum(map(len, payload))

    def _guarded(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except (EOFError, OSError):
            self._waits = False
            raise EngineError(f"rank {self._rank}, which has an engine, has died") from None


class _Interrupted(Exception):
    """Rank 0 does not want the answer any more."""


def _generate(engine: Engine, share: _Share, on_progress: Callable[[int, int], None], tell: Callable[[int, str], None] | None) -> list[list[Rollout]]:
    return engine.generate(**share._asdict(), on_progress=on_progress, on_finished=tell)


def _serve(engine: Engine, connection: Connection) -> None:
    """Answer rank 0's requests until it closes the conversation."""

    def report(finished: int, _: int) -> None:
        connection.send(("progress", finished))
        if connection.poll():
            raise _Interrupted(connection.recv())

    def tell(number: int, text: str) -> None:
        connection.send(("finished", (number, text)))

    while True:
        try:
            request = connection.recv()
            if request is None:
                continue  # it had been answered already
            share, tells = request
            try:
                answer = ("groups", _generate(engine, share, report, tell if tells else None))
            except (EOFError, OSError):
                raise
            except Exception as error:
                answer = ("error", f"{type(error).__name__}: {error}" if not isinstance(error, EngineError) else str(error))
            connection.send(answer)
        except (EOFError, OSError):
            return
