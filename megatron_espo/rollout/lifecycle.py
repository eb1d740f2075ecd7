"""What a rollout engine may do next. Standard library only."""

from enum import StrEnum


class EngineError(RuntimeError):
    """The rollout engine died, hung, refused a call, or was asked for something its state forbids.

    Attributes:
        phase: what was going on: ``start``, ``connect``, ``rollout``, ``sleep``, or a phase of a weight sync (``wake``,
            ``transfer``, ``load``, ``finish``, ``verify``, ``canary``).
        final: another attempt would fail in the same way.
    """

    def __init__(self, message: str, phase: str = "rollout", final: bool = False):
        super().__init__(message)
        self.phase, self.final = phase, final


class State(StrEnum):
    """Only ``ready`` serves rollouts.

    ``starting``: vLLM loads. ``stale``: it runs, without weights that may be served (an engine that
    loaded a model's own goes on to ``ready`` at once). ``updating``: weights arrive or are
    being checked. ``ready``: they are served. ``asleep``: it has given its GPU memory back, and comes out of it ``stale``,
    however good its weights were. ``dead``: no process.
    """

    STARTING = "starting"
    STALE = "stale"
    UPDATING = "updating"
    READY = "ready"
    ASLEEP = "asleep"
    DEAD = "dead"


TRANSITIONS = {
    State.DEAD: {State.STARTING, State.DEAD},
    State.STARTING: {State.STALE, State.DEAD},
    State.STALE: {State.UPDATING, State.READY, State.ASLEEP, State.DEAD},
    State.UPDATING: {State.READY, State.STALE, State.DEAD},
    State.READY: {State.UPDATING, State.ASLEEP, State.DEAD},
    State.ASLEEP: {State.STALE, State.DEAD},
}


def transition(current: State, following: State, action: str) -> State:
    """``following``, or EngineError where ``action`` is not possible in the ``current`` state."""
    if following not in TRANSITIONS[current]:
        allowed = " or ".join(state for state in State if following in TRANSITIONS[state])
        raise EngineError(f"{action}: the rollout engine is {current}; expected {allowed}.")
    return following
