"""Trainer and engines take turns with the memory of the GPUs that they share. The order is known here and nowhere else:

    rollouts, rewards -> engines sleep -> states come back -> training -> optimizer and gradients to the host -> engines wake their weights
    -> sync, read-back -> engines wake their caches -> canary -> weights to the host -> rollouts, rewards

Engines sleep with ``rollout.sleep``; ``megatron.offload`` says what leaves the trainer's devices. Without them a turn is the sync alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_espo.config import Config
from megatron_espo.mcore.learner import Learner
from megatron_espo.mcore.offload import PARTS
from megatron_espo.progress import Phases
from megatron_espo.rollout.engine import EngineError
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.throughput import GIB
from megatron_espo.weights.lockstep import Lockstep
from megatron_espo.weights.sync import NoSync, WeightSync


class MemoryTurns:
    """Hands the memory over, and the weights with it. All methods are collective over all ranks.

    Args:
        config: the run's configuration.
        learner: the trainer's side.
        sync: the engines'.
        phases: gets ``sleep``, ``onload``, ``offload`` and ``sync``.
    """

    def __init__(self, config: Config, learner: Learner, sync: WeightSync | NoSync, phases: Phases) -> None:
        self._sleeps, self._steps = config.rollout.sleep, config.run.steps
        self._offloader, self._sync, self._phases = learner.offloader, sync, phases

    def to_trainer(self, step: int) -> None:
        """The engines sleep; then all of the trainer's state is on its devices."""
        if self._sleeps:
            with self._phases.phase("sleep", step, self._steps):
                self._sync.sleep()
        if self._offloader.away:
            with self._phases.phase("onload", step, self._steps):
                self._offloader.to_device(*PARTS)

    def to_engine(self, version: int) -> dict[str, float]:
        """Only the weights stay on the trainer's devices, until the engines serve them as ``version``. Returns ``WeightSync.push``'s metrics."""
        if self._sleeps or self._offloader.handles("optimizer", "gradients"):
            with self._phases.phase("offload", version, self._steps):
                self._offloader.to_host("optimizer", "gradients")
        with self._phases.phase("sync", version, self._steps):
            metrics = self._sync.push(version)
        if self._offloader.handles("weights"):
            with self._phases.phase("offload", version, self._steps):
                self._offloader.to_host("weights")
        return metrics | ({"system/offloaded_gib": self._offloader.host_bytes / GIB} if self._offloader.handles(*PARTS) else {})

    def recover(self) -> None:
        """In the engines' turn: bring failed ones back (``WeightSync.recover``), which takes the trainer's weights."""
        self._offloader.to_device("weights")
        self._sync.recover()
        if self._offloader.handles("weights"):
            self._offloader.to_host("weights")

    @contextmanager
    def whole(self, step: int, *, go_on: bool) -> Iterator[None]:
        """Inside, all of the trainer's state is on its devices: for a checkpoint or the export.

        Where some of it was away, the engines make room, and with ``go_on`` they get the weights of ``step`` once more.
        """
        was_away = self._offloader.away
        if was_away:
            self.to_trainer(step)
        yield
        if was_away and go_on:
            self.to_engine(step)


def start_asleep(engine: VLLMEngine | None, timeout_s: float) -> None:
    """Wait until every engine has started and sleeps. Collective, before the trainer takes memory.

    vLLM claims its share of a GPU and measures what is left for its caches while it starts, so nobody else may take any then. An engine that
    fails is left to the first sync, which starts another.

    Args:
        engine: the started engine of this rank, ``None`` on ranks without one.
        timeout_s: of an engine's start.

    Raises:
        RankLostError: a rank ended or did not come.
    """
    lockstep = Lockstep(timeout_s, 2 * timeout_s)
    if engine is not None:
        try:
            engine.wait_ready()
            engine.sleep()
        except EngineError as error:
            print(f"warning: {error}\nthe first weight sync starts the rollout engine anew", flush=True)
    lockstep.meet("the start of its engine")
