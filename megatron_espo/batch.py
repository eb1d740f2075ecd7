"""The rollouts of one step, as rank 0 sends them to the other ranks."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_espo.types import Trajectory


@dataclass(frozen=True)
class ScoredGroups:
    """A step's rollouts and the rewards. Pickling drops ``routed_experts``, of which no rank needs all.

    Attributes:
        rollouts: ``[prompt][sample]``.
        rewards: ``[prompts, group_size]`` float32, NaN where the verifier failed.
        dispatched: prompts that were newly given to the engine; with dynamic sampling more than ``rollouts`` has.
        in_flight: prompts whose responses continue in the next step.
    """

    rollouts: list[list[Trajectory]]
    rewards: torch.Tensor
    dispatched: int
    in_flight: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"rollouts": [[_without_experts(sample) for sample in group] for group in self.rollouts]}

    @property
    def have_routed_experts(self) -> bool:
        """Whether every sequence has the engine's choice of experts."""
        samples = (sample for group in self.rollouts for sample in group)
        return all(part.routed_experts is not None for sample in samples for part in sample.parts)

    def staleness(self, step: int) -> float:
        """Versions between the weights that ``step`` starts from and the weights that sampled; mean over sampled tokens."""
        versions = self._sampled_versions()
        return float(step - 1 - versions.mean()) if versions.size else 0.0

    def max_staleness(self, step: int) -> int:
        """The same, of the oldest sampled token."""
        versions = self._sampled_versions()
        return int(step - 1 - versions.min()) if versions.size else 0

    def _sampled_versions(self) -> np.ndarray:
        parts = [part for group in self.rollouts for sample in group for part in sample.parts if not sample.failed]
        return np.concatenate([part.versions[part.loss_mask] for part in parts] or [np.zeros(0, np.int32)])

    def lengths(self) -> torch.Tensor:
        """Sampled tokens, ``[prompts, group_size]`` int64."""
        return torch.tensor([[sample.num_trained for sample in group] for group in self.rollouts])


def _without_experts(sample: Trajectory) -> Trajectory:
    earlier = tuple(replace(part, routed_experts=None) for part in sample.earlier)
    return replace(sample, routed_experts=None, earlier=earlier)
