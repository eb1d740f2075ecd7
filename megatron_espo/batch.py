"""What a step trains on, as rank 0 hands it to the others."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_espo.types import Rollout


@dataclass(frozen=True)
class ScoredGroups:
    """A step's rollouts and what they earned. A copy in another process lacks the routed experts, of which no rank needs all.

    Attributes:
        rollouts: ``[prompt][sample]``.
        rewards: ``[prompts, group_size]`` float32, NaN where the verifier failed.
        dispatched: prompts that were newly given to the engine for it; with dynamic sampling more than are left.
        in_flight: prompts whose responses are to be gone on with in the next step.
    """

    rollouts: list[list[Rollout]]
    rewards: torch.Tensor
    dispatched: int
    in_flight: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"rollouts": [[replace(sample, routed_experts=None) for sample in group] for group in self.rollouts]}

    @property
    def have_routed_experts(self) -> bool:
        """Whether the engine's choices came with every response."""
        return all(sample.routed_experts is not None for group in self.rollouts for sample in group)

    @property
    def vary(self) -> torch.Tensor:
        """``[prompts]`` bool: whether the prompt's rewards differ, so that its responses have an advantage."""
        return self.rewards.nan_to_num(-torch.inf).amax(1) > self.rewards.nan_to_num(torch.inf).amin(1)

    def staleness(self, step: int) -> float:
        """Versions between the weights that ``step`` starts from and those that sampled, mean over responses."""
        versions = [sample.policy_version for group in self.rollouts for sample in group]
        return step - 1 - sum(versions) / len(versions)

    def lengths(self) -> torch.Tensor:
        """Response tokens, ``[prompts, group_size]``."""
        return torch.tensor([[len(sample.response_ids) for sample in group] for group in self.rollouts])


@dataclass(frozen=True, eq=False)
class InFlight:
    """A prompt that the step in which it was begun, ``since``, did not train: its responses so far."""

    since: int
    rollouts: list[Rollout]

    @property
    def is_finished(self) -> bool:
        """Whether it only waits for its turn to be trained."""
        return not any(rollout.unfinished for rollout in self.rollouts)
