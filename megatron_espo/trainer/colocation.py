"""Colocation: trainer and engines share the memory of the GPUs. This module defines the order:

    rollouts, rewards -> engines sleep -> trainer state to the device -> training -> optimizer and
    gradients to the host -> engines wake their weights -> weight update, read-back -> engines wake
    their caches -> canary -> weights to the host

``rollout.sleep`` makes engines sleep; ``megatron.offload`` selects the state that leaves the
trainer's devices. Without both, only the weight update remains.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_espo.config import Config
from megatron_espo.distributed.monitored_barrier import MonitoredBarrier
from megatron_espo.megatron.actor import Actor
from megatron_espo.megatron.offload import PARTS
from megatron_espo.monitoring.progress import Phases
from megatron_espo.monitoring.throughput import GIB
from megatron_espo.rollout.engine import EngineError
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.weights.sync import WeightSync


class Colocation:
    """Moves trainer state and updates engines. All methods are collective over all ranks.

    Args:
        config: the run's configuration.
        actor: has the trainer's state.
        sync: updates the weights of the engines; ``None``: there are none (``run.replay``).
        phases: times ``sleep``, ``onload``, ``offload`` and ``sync``.
    """

    def __init__(
        self, config: Config, actor: Actor, sync: WeightSync | None, phases: Phases
    ) -> None:
        self._sleeps, self._steps = config.rollout.sleep, config.run.steps
        self._offloader, self._sync, self._phases = actor.offloader, sync, phases

    def offload_engine(self, step: int) -> None:
        """Put the engines to sleep and bring all trainer state to its devices."""
        if self._sleeps:
            with self._phases.phase("sleep", step, self._steps):
                if self._sync:
                    self._sync.sleep()
        if self._offloader.offloaded:
            with self._phases.phase("onload", step, self._steps):
                self._offloader.to_device(*PARTS)

    def update_engine(self, version: int) -> dict[str, float]:
        """Send the weights to the engines as ``version``, and move trainer state to the host.

        Returns the metrics of the update.
        """
        if self._sleeps or self._offloader.handles("optimizer", "gradients"):
            with self._phases.phase("offload", version, self._steps):
                self._offloader.to_host("optimizer", "gradients")
        with self._phases.phase("sync", version, self._steps):
            metrics = self._sync.push(version) if self._sync else {}
        if self._offloader.handles("weights"):
            with self._phases.phase("offload", version, self._steps):
                self._offloader.to_host("weights")
        if self._offloader.handles(*PARTS):
            metrics = metrics | {"system/offloaded_gib": self._offloader.host_bytes / GIB}
        return metrics

    def recover(self, step: int) -> None:
        """Restart failed engines and update their weights (``WeightSync.recover``)."""
        with self._phases.phase("sync", step, self._steps):
            self._offloader.to_device("weights")
            assert self._sync
            self._sync.recover()
            self._offloader.to_host("weights")

    @contextmanager
    def all_on_device(self, step: int, *, last: bool) -> Iterator[None]:
        """Bring all trainer state to its devices, for a checkpoint or the export.

        If state was on the host, the engines sleep meanwhile. Unless ``last``, they get the weights
        of ``step`` again.
        """
        was_offloaded = self._offloader.offloaded
        if was_offloaded:
            self.offload_engine(step)
        yield
        if was_offloaded and not last:
            self.update_engine(step)


def start_asleep(engine: VLLMEngine | None, timeout_s: float) -> None:
    """Wait until every engine has started and sleeps. Collective, before the trainer allocates
    memory.

    vLLM measures the free GPU memory while it starts, so nothing else may allocate then. The first
    weight update restarts an engine that failed.

    Args:
        engine: the started engine of this rank; ``None`` if it has none.
        timeout_s: for the start of an engine.

    Raises:
        RankLostError: a rank ended or did not reach the barrier.
    """
    barrier = MonitoredBarrier(timeout_s, 2 * timeout_s)
    if engine is not None:
        try:
            engine.wait_ready()
            engine.sleep()
        except EngineError as error:
            message = "the first weight update restarts the rollout engine"
            print(f"warning: {error}\n{message}", flush=True)
    barrier.wait("the start of its engine")
