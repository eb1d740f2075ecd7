"""How long the responses to a prompt will be, from those that it had."""

from collections.abc import Sequence

from megatron_espo.types import Prompt, Trajectory


class LengthEstimates:
    """Mean sampled tokens by prompt, of the last time it was sampled. Kept in memory only: they order work and change no result."""

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}

    def learn(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        """Take note of sampled responses, ``[prompt][sample]``."""
        for group in groups:
            self._tokens[group[0].prompt.id] = sum(sample.num_trained for sample in group) / len(group)

    def longest_first(self, prompts: Sequence[Prompt]) -> list[int]:
        """Indices of ``prompts``: those never sampled, which may be long, then by expected length. Equal ones keep their order."""
        return sorted(range(len(prompts)), key=lambda i: -self._tokens.get(prompts[i].id, float("inf")))
