"""Where the rollouts of a step come from: engines, or the recorded rollouts of another run.

Rank 0 only. Their state is JSON values and part of a checkpoint.
"""

from typing import Any

from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.monitoring.progress import Phases
from megatron_espo.rollout.sampler import Sampler


class ReplayedRollouts:
    """The recorded rollouts of another run (``run.replay``).

    Args:
        log: the records.
        stream: the prompt stream. It does not advance.
        need_experts: whether training needs the engine's choice of experts.
    """

    def __init__(self, log: RolloutLog, stream: PromptStream, *, need_experts: bool) -> None:
        self._log, self._stream, self._need_experts = log, stream, need_experts

    def batch(self, step: int, phases: Phases) -> ScoredGroups:
        """The recorded rollouts of ``step``.

        Raises:
            InputError: there is no record, or it lacks the experts.
        """
        found = self._log.read(step, None)
        expected = f"run.replay: expected rollouts of step {step} in {self._log.folder}"
        if not found:
            raise InputError(f"{expected}, found none; lower run.steps")
        groups, _ = found
        if self._need_experts and not groups.have_routed_experts:
            raise InputError(
                f"{expected} with the experts that their engine chose, found none; set "
                "rollout.router_replay to false to train without"
            )
        return groups

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict(), "pending": []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])

    def forget(self, step: int) -> None:
        pass


class SampledRollouts:
    """Rollouts of the engines. Records every step, and takes a step from its record if the run was
    interrupted after sampling.

    Args:
        log: the records of this run.
        sampler: drives the environments and engines.
        max_staleness: recorded rollouts that are older are sampled again.
        need_experts: whether training needs the engine's choice of experts.
        keep: whether records stay after a checkpoint.
        reuse: whether to take steps from their records.
    """

    def __init__(
        self,
        log: RolloutLog,
        sampler: Sampler,
        *,
        max_staleness: int,
        need_experts: bool = False,
        keep: bool = False,
        reuse: bool = True,
    ) -> None:
        self._log, self._sampler, self._keep = log, sampler, keep
        self._max_staleness, self._need_experts, self._reuse = max_staleness, need_experts, reuse
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict

    def batch(self, step: int, phases: Phases) -> ScoredGroups:
        """The rollouts of ``step``, recorded or sampled. Another call continues after an error.

        The record of sampled rollouts is written in the background (:meth:`RolloutLog.wait`).

        Raises:
            EngineError: an engine failed.
            Stopped: the run was asked to stop.
            OSError: the previous record was not written.
        """
        before = self.state_dict()
        if self._reuse and (found := self._log.read(step, before)):
            groups, after = found
            # The settings may have changed since.
            has_experts = groups.have_routed_experts or not self._need_experts
            if has_experts and groups.max_staleness(step) <= self._max_staleness:
                self.load_state_dict(after)
                return groups
        groups = self._sampler.batch(step, phases)
        self._log.write(step, groups, before=before, after=self.state_dict())
        return groups

    def forget(self, step: int) -> None:
        if not self._keep:
            self._log.forget(step)


RolloutSource = ReplayedRollouts | SampledRollouts
