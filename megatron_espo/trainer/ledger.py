"""Counts prompts. Invariants: dispatched = trained + dropped + in flight, and the rows that the
prompt stream has passed = dispatched + skipped."""

from dataclasses import dataclass

from megatron_espo.data.scored_groups import ScoredGroups


@dataclass
class Ledger:
    """Counts of prompts over the whole run. Checkpoints contain them.

    Attributes:
        dispatched: sent to the rollout engine.
        trained: part of an optimizer step's batch.
        dropped_equal: dropped by dynamic sampling, because their rewards are equal.
        in_flight: dispatched and not trained yet.
        skipped: not dispatched, because of ``pass_rate`` or ``data.skip_solved``; once per epoch.
    """

    dispatched: int = 0
    trained: int = 0
    dropped_equal: int = 0
    in_flight: int = 0
    skipped: int = 0

    def count(self, groups: ScoredGroups) -> None:
        """Add a trained batch."""
        dropped = self.in_flight + groups.dispatched - len(groups.rollouts) - groups.in_flight
        assert dropped >= 0, (self, groups)
        self.dispatched += groups.dispatched
        self.trained += len(groups.rollouts)
        self.dropped_equal += dropped
        self.in_flight, self.skipped = groups.in_flight, groups.skipped

    def metrics(self) -> dict[str, float]:
        """``ledger/*``."""
        return {f"ledger/{name}": float(value) for name, value in vars(self).items()}
