"""Send each version of the trainer's weights to the rollout engine, and verify it."""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from megatron_espo.config import Config
from megatron_espo.distributed import collectives
from megatron_espo.distributed.monitored_barrier import MonitoredBarrier, RankLostError
from megatron_espo.distributed.runtime import Runtime
from megatron_espo.errors import InputError
from megatron_espo.models.spec import ExternalSpec, ModelSpec
from megatron_espo.plugins import load_object
from megatron_espo.rollout import transport
from megatron_espo.rollout.check_names import check_names
from megatron_espo.rollout.engine import EngineError
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.types import Prompt
from megatron_espo.weights import verification
from megatron_espo.weights.exporter import ExportedWeightSource
from megatron_espo.weights.verification import TOLERANCE, CanarySample, canary_gap, wrong_tensors
from megatron_espo.weights.vllm_source import GatherError, MegatronWeightSource, ObservedSource

_CANARY_TOKENS = 4
_CANARY_PROMPT_TOKENS = 128
# The most calls of its engine that a rank makes in one phase; each has a timeout.
_ENGINE_CALLS = 4


class WeightSyncError(RuntimeError):
    """A weight update failed. The message names the version, rank, phase and tensor."""


class WeightSync:
    """Connects the model to the engine, sends new versions, and restarts a failed engine.

    The engine's weights are filled with NaN before the first update of a process, and after every
    sleep, when its memory is undefined. A version is served once all ranks agree that it arrived;
    the tensors read back from the engine have the trainer's checksums (first update of a process,
    then every ``rollout.verify_every``); and engine and trainer agree on the canary's log-probs.
    With ``rollout.quantization`` every update also compares sketches of all matrices.

    Args:
        config: the run's configuration.
        spec: the model.
        actor: the trained model: ``chunks`` of this rank, ``score`` and ``offloader``.
        runtime: this rank's process groups.
        engine: the started engine on rank 0 and on every other rank that has one, else ``None``.
        canary: prompts of the canary on ranks with an engine.
        on_served: called on every rank when all engines serve a new version.
    """

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        actor: Any,
        runtime: Runtime,
        engine: VLLMEngine | None,
        canary: Sequence[Prompt] = (),
        on_served: Callable[[], None] = lambda: None,
    ) -> None:
        rollout = self._config = config.rollout
        self._rank = runtime.rank
        self._name = transport.resolve_transport(rollout)
        self._dtype, quantization = config.model.dtype, rollout.quantization
        precision = verification.bits(quantization) if quantization else self._dtype
        self._tolerance = TOLERANCE[precision]
        self._actor, self._engine = actor, engine
        self._canary, self._on_served = list(canary), on_served
        calls = _ENGINE_CALLS * rollout.timeout_s
        # With several engines other ranks than 0 wait for an engine too.
        limit = rollout.timeout_s if rollout.engines == 1 else calls
        self._barrier = MonitoredBarrier(limit, limit + calls)
        source = self._make_source(config, spec, runtime)
        self._source = ObservedSource(source, runtime.world_size)
        self._transport: Any = None
        self._pushes = 0
        self.version: int | None = None

    def _make_source(self, config: Config, spec: ModelSpec, runtime: Runtime) -> Any:
        dtype, chunks = getattr(torch, self._dtype), self._actor.chunks
        if name := config.model.exporter:
            export = load_object("model.exporter", name, "module:function")
            return ExportedWeightSource(partial(export, chunks, spec.hf_config), dtype)
        if isinstance(spec, ExternalSpec):
            return ExportedWeightSource(partial(spec.export, chunks, config.model.path), dtype)
        return MegatronWeightSource(
            chunks,
            spec,
            runtime.groups,
            dtype=dtype,
            sharded=self._name == "sharded_rdt",
            all_replicas=transport.needs_all_replicas(self._name, config.rollout.engines),
            barrier=self._barrier,
        )

    def push(self, version: int) -> dict[str, float]:
        """Make the engine serve the current weights as policy ``version``. Collective: all ranks.

        Returns:
            ``sync/restarts`` and, if they ran on this rank, ``sync/verified_tensors``,
            ``sync/quantization_error_max``, ``sync/unquantized``, ``sync/unaudited``,
            ``time/verify_s``, ``time/canary_s`` and ``mismatch/canary`` (mean |engine - trainer|
            log-prob gap of the worst engine, nats; on rank 0).

        Raises:
            WeightSyncError: on every rank, after ``rollout.max_restarts`` restarts or a failure
                that a restart cannot fix; only on the failed rank if its gather failed, because
                the other ranks wait inside that gather.
            InputError: on every rank, if engine and model differ in names or shapes.
        """
        restarts = 0
        while True:
            metrics: dict[str, float] = {"sync/restarts": restarts}
            try:
                self._connect()
                self._transfer(version, metrics)
                self._on_engines("finish", self._resume)
                self._check_canary(metrics)
                self._on_engines("finish", lambda engine: engine.serve())
                break
            except InputError:
                self.disconnect()
                raise
            except EngineError as failure:
                self.disconnect()
                what = f"weights of version {version}: {failure}"
                if failure.final or restarts == self._config.max_restarts:
                    message = f"{what}\ngave up after {restarts} engine restarts"
                    raise WeightSyncError(message) from None
                self._warn(f"{what}\nrestarting the rollout engine")
            restarts += 1
        self.version, self._pushes = version, self._pushes + 1
        self._on_served()
        return metrics

    def sleep(self) -> None:
        """Put the engines to sleep until the next push. Collective over all ranks.

        If one fails, all engines are ended, which frees their memory too; the next push starts new
        ones.
        """

        def sleep(engine: VLLMEngine) -> None:
            if engine.state != "dead":
                engine.sleep()

        try:
            self._on_engines("sleep", sleep)
        except EngineError as failure:
            self._warn(f"{failure}\nthe next weight update restarts the rollout engine")
            self.disconnect()

    def recover(self) -> None:
        """Restart failed engines and send the weights as the current version. As ``push``."""
        self.disconnect()
        assert self.version is not None
        self.push(self.version)

    def disconnect(self) -> None:
        """End the engine; the next push starts a new one. Call on every rank."""
        if self._transport is not None:
            self._transport.shutdown()
        self._transport, self._pushes = None, 0
        if self._engine is not None:
            self._engine.close()

    def _connect(self) -> None:
        """Start the engine if there is none, connect the transport, fill the weights with NaN."""
        shapes = [(meta.name, meta.shape) for meta in self._source.metadata()]
        engine, sleeps = self._engine, self._config.sleep

        def start(engine: VLLMEngine) -> None:
            check_names(shapes, engine.config.model)  # before the engine's slow start
            engine.wait_ready()
            if sleeps and engine.state == "running":
                engine.sleep()  # its caches are not needed before the canary

        def connect() -> None:
            self._transport = transport.make_trainer_transport(
                self._name, engine=engine, source=self._source, rank=self._rank
            )
            if engine is not None and not sleeps:
                engine.fill_nan(shapes)

        def wake(engine: VLLMEngine) -> None:
            if engine.state == "asleep":
                engine.wake(shapes)

        if self._transport is None:
            # A starting engine takes its whole share of the device's memory.
            with self._actor.offloader.without("weights"):
                self._on_engines("connect", start)
            self._on_all_ranks("connect", connect)
        if sleeps:
            self._on_engines("wake", wake)

    def _transfer(self, version: int, metrics: dict[str, float]) -> None:
        """Send the weights. If it is due, compare the engine's weights with those sent."""
        engine, every, source = self._engine, self._config.verify_every, self._source
        is_due = self._pushes == 0 or (every > 0 and self._pushes % every == 0)
        # Only ranks with an engine compare.
        source.checksums = {} if engine and is_due else None
        source.sketches = {} if engine and self._config.quantization else None

        def send() -> None:
            with source.one_pass():
                transport.send_weights(self._transport, engine, version)
            if self._config.sleep:
                torch.cuda.empty_cache()  # the engine's caches need the memory

        def verify(engine: VLLMEngine) -> None:
            began = time.perf_counter()
            if source.checksums is not None:
                served = engine.read_back_checksums(self._dtype)
                if wrong := wrong_tensors(source.checksums, served):
                    raise EngineError(wrong)
                metrics["sync/verified_tensors"] = len(served.keys() & source.checksums.keys())
            if source.sketches is not None:
                metrics.update(self._audit_quantization(engine, version, source.sketches))
            if source.checksums is not None or source.sketches is not None:
                metrics["time/verify_s"] = time.perf_counter() - began

        self._on_all_ranks("transfer", send)
        self._on_engines("verify", verify)

    def _audit_quantization(
        self, engine: VLLMEngine, version: int, sent: dict[str, tuple[float, list[float]]]
    ) -> dict[str, float]:
        """Compare each matrix of the engine with the one that was sent; write the table."""
        served, quantization = engine.read_back_sketches(), self._config.quantization or ""
        rows, wrong = verification.audit_quantization(sent, served, quantization)
        lines = [json.dumps({"version": version} | row) + "\n" for row in rows]
        table = engine.config.log_path.with_suffix(".quantization.jsonl")
        table.write_text("".join(lines))
        if wrong:
            raise EngineError(wrong, final=True)
        errors = [row["error"] for row in rows if row["quantized"]]
        audited = [row for row in rows if row["error"] is not None]
        high = [row["name"] for row in audited if not row["quantized"]]
        if self._pushes == 0:
            what = f"{len(high)} matrices are not quantized: {', '.join(high[:5])}"
            self._warn(f"rollout.quantization: {what}; {table} lists all matrices")
        return {
            "sync/quantization_error_max": max(errors, default=0.0),
            "sync/unquantized": len(high),
            "sync/unaudited": len(rows) - len(audited),
        }

    def _resume(self, engine: VLLMEngine) -> None:
        """Let the engine generate again. It refuses requests until it serves."""
        if self._config.sleep:
            engine.wake_caches()
        engine.resume()

    def _check_canary(self, metrics: dict[str, float]) -> None:
        """Compare log-probs of new greedy tokens with the trainer's forward pass."""
        if not self._config.canary_prompts:
            return
        began, gap = time.perf_counter(), -math.inf
        own: list[CanarySample] = []

        def sample(engine: VLLMEngine) -> None:
            prompts = [prompt.token_ids[:_CANARY_PROMPT_TOKENS] for prompt in self._canary]
            tokens = min(_CANARY_TOKENS, self._config.max_response_tokens)
            names = [prompt.id for prompt in self._canary]
            own.extend(map(CanarySample, names, prompts, engine.canary(prompts, tokens)))

        self._on_engines("canary", sample)
        everyone = collectives.gather_objects(own)
        # Engines usually agree. The trainer scores equal responses once.
        scored = collectives.on_rank_0(lambda: {s.key: s.scored for own in everyone for s in own})
        trained = dict(zip(scored, self._actor.score(list(scored.values())), strict=True))

        def compare(engine: VLLMEngine) -> None:
            nonlocal gap
            gap, worst = canary_gap(own, [trained[sample.key] for sample in own])
            if not gap <= self._tolerance:
                what = f"mean |engine - trainer| log-prob gap {gap:.4g} nats"
                raise EngineError(f"{what}, above {self._tolerance:g}; {worst}")

        self._on_engines("canary", compare)
        if gaps := collectives.gather_objects(gap):
            metrics["mismatch/canary"] = max(gaps)
        metrics["time/canary_s"] = time.perf_counter() - began

    def _on_engines(self, phase: str, action: Callable[[VLLMEngine], None]) -> None:
        """Run ``action`` on the ranks with an engine. Collective as :meth:`_on_all_ranks`."""
        engine = self._engine
        self._on_all_ranks(phase, lambda: None if engine is None else action(engine))

    def _on_all_ranks(self, phase: str, action: Callable[[], None]) -> None:
        """Run ``action`` on this rank; raise the first rank's EngineError or InputError on all.

        Collectives: ``MonitoredBarrier.wait`` and :func:`collectives.first_not_none`.
        """
        failure: Exception | None = None
        try:
            action()
        except RankLostError as error:
            raise WeightSyncError(f"weights: phase {phase}: {error}") from None
        except GatherError as error:
            # The other ranks wait inside the failed gather, so no collective can reach them.
            raise WeightSyncError(f"weights: rank {self._rank}, phase gather, {error}") from error
        except InputError as error:
            failure = error
        except Exception as error:
            is_final = not isinstance(error, EngineError) or error.final
            what = error if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            message = f"rank {self._rank}, phase {phase}: {what}"
            if phase == "transfer":
                message += f"\nThe group of {self._source.current} was gathered last."
            failure = EngineError(message, is_final)
        try:
            self._barrier.wait("the end of this phase")
        except RankLostError as error:
            before = f"; before, {failure}" if failure else ""
            raise WeightSyncError(f"weights: phase {phase}: {error}{before}") from None
        if failure := collectives.first_not_none(failure):
            raise failure

    def _warn(self, message: str) -> None:
        if self._rank == 0:
            print(f"warning: {message}", flush=True)
