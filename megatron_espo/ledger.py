"""Where every prompt went: dispatched = trained + dropped + in flight, always."""

from dataclasses import dataclass

from megatron_espo.batch import ScoredGroups


@dataclass
class Ledger:
    """Counts of prompts over the whole run, restarts included (they are part of a checkpoint).

    Attributes:
        dispatched: handed to the rollout engine.
        trained: part of an optimizer step's batch.
        dropped_equal: given up by dynamic sampling, because their rewards did not differ.
    """

    dispatched: int = 0
    trained: int = 0
    dropped_equal: int = 0

    def count(self, groups: ScoredGroups) -> None:
        """Enter a step's batch, now trained."""
        self.dispatched += groups.dispatched
        self.trained += len(groups.rollouts)
        self.dropped_equal += groups.dispatched - len(groups.rollouts)
        assert self.dispatched == self.trained + self.dropped_equal and self.dropped_equal >= 0, self

    def metrics(self) -> dict[str, float]:
        """``ledger/*``."""
        return {f"ledger/{name}": float(value) for name, value in vars(self).items()}
