"""The trainer's weights into the rollout engine, version by version, checked before they are served."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.collectives import control_device, first_answer, gathered, on_rank_0
from megatron_espo.config import Config
from megatron_espo.errors import InputError
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.rollout.check_names import check_names
from megatron_espo.rollout.engine import EngineError, State
from megatron_espo.rollout.transport import ON_ALL_RANKS, make_trainer_transport, resolve_transport, send_weights
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.types import Prompt
from megatron_espo.weights.exporter import ExportedWeightSource, load_exporter
from megatron_espo.weights.lockstep import Lockstep, RankLostError
from megatron_espo.weights.verification import TOLERANCE, CanarySample, canary_gap, wrong_tensors
from megatron_espo.weights.vllm_source import GatherError, MegatronWeightSource, ObservedSource

_CANARY_TOKENS = 4
_CANARY_PROMPT_TOKENS = 128
# A rank waits for so many answers of its engine at most before the others hear of it again; each has a timeout.
_ENGINE_CALLS = 4


class WeightSyncError(RuntimeError):
    """The engine could not be given a version of the weights. The message names version, rank, phase and tensor."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed. ``final``: another one would fail in the same way; ``mistake``: it is the user's."""

    rank: int
    phase: str
    detail: str
    final: bool = False
    mistake: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank}, phase {self.phase}: {self.detail}"


class WeightSync:
    """Connects the model to the engine and pushes each new version; restarts the engine when that fails.

    Before the first sync of an engine process its weights are filled with NaN, and after each time that it slept, when
    its memory holds anything. A version is served when all ranks agree that it arrived, when the tensors read back from the
    engine have the trainer's checksums (first sync of a process, then every ``rollout.verify_every``) and when engine and
    trainer agree on the log-probs of the canary.

    Args:
        config: the run's configuration.
        hf_config: the model's ``config.json``.
        learner: the trained model: ``chunks`` of this rank, ``score`` of responses, and its ``offloader``.
        runtime: this rank's place.
        engine: the started engine on rank 0 and on every other rank that has one, ``None`` elsewhere.
        canary: prompts for the canary on ranks with an engine.
        on_served: called on every rank when all engines serve a new version.
    """

    def __init__(
        self,
        config: Config,
        hf_config: dict[str, Any],
        learner: Any,
        runtime: Runtime,
        engine: VLLMEngine | None,
        canary: Sequence[Prompt] = (),
        on_served: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._rank = config.rollout, runtime.rank
        self._name = resolve_transport(config.rollout.transport, config.rollout.visible_devices, bool(config.rollout.hosts))
        self._dtype = config.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype
        dtypes = {self._dtype, config.model.dtype}
        self._tolerance = config.rollout.canary_tolerance or max(TOLERANCE[dtype] for dtype in dtypes)
        self._learner, self._engine, self._canary, self._on_served = learner, engine, list(canary), on_served
        answers = _ENGINE_CALLS * config.rollout.timeout_s
        limit = config.rollout.timeout_s if config.rollout.engines == 1 else answers  # others may wait for engines too
        self._lockstep = Lockstep(limit, limit + answers)
        self._source = ObservedSource(self._make_source(config, hf_config, runtime), runtime.world_size)
        self._transport: Any = None
        self._pushes = 0
        self.version: int | None = None

    def _make_source(self, config: Config, hf_config: dict[str, Any], runtime: Runtime) -> Any:
        dtype, chunks = getattr(torch, self._dtype), self._learner.chunks
        if config.model.exporter:
            return ExportedWeightSource(load_exporter(config.model.exporter, chunks, hf_config), dtype)
        return MegatronWeightSource(
            chunks,
            hf_config,
            runtime.groups,
            dtype=dtype,
            sharded=self._name == "sharded_rdt",
            all_replicas=self._name in ON_ALL_RANKS or config.rollout.engines > 1,
            lockstep=self._lockstep,
        )

    def push(self, version: int) -> dict[str, float]:
        """Make the engine serve the current weights as policy ``version``. Collective over all ranks.

        Returns:
            On rank 0 ``sync/restarts`` and, where they ran, ``time/verify_s``, ``time/canary_s`` and ``mismatch/canary``
            (mean |engine - trainer| log-prob gap, nats); on the others nothing.

        Raises:
            WeightSyncError: on every rank, after ``rollout.max_restarts`` restarts or a failure that none would mend;
                on the rank alone whose gather failed, because its peers wait inside it.
            InputError: on every rank, the engine's model and ours differ in names or shapes.
        """
        for restarts in range(self._config.max_restarts + 1):
            metrics: dict[str, float] = {}
            failure = (
                self._connect()
                or self._transfer(version, metrics)
                or self._agree("finish", self._resume)
                or self._check_canary(metrics)
                or self._agree("finish", self._serve)
            )
            if failure is None:
                self.version, self._pushes = version, self._pushes + 1
                if self._engine is not None:
                    metrics["sync/restarts"] = restarts
                self._on_served()
                return metrics
            self.disconnect()
            if failure.mistake:
                raise InputError(failure.detail)
            if failure.final or restarts == self._config.max_restarts:
                break
            if self._rank == 0:
                print(f"warning: weights of version {version}: {failure}\nrestarting the rollout engine", flush=True)
        raise WeightSyncError(f"weights of version {version}: {failure}\ngave up after {restarts} engine restarts")

    def sleep(self) -> None:
        """Put the engines to sleep until the next push. Collective.

        Where one fails at it, all are ended, which frees their memory too; the next push starts others.
        """

        def sleep() -> None:
            if self._engine is not None and self._engine.state != State.DEAD:
                self._engine.sleep()

        if failure := self._agree("sleep", sleep):
            if self._rank == 0:
                print(f"warning: {failure}\nthe next weight sync starts the rollout engine anew", flush=True)
            self.disconnect()

    def recover(self) -> None:
        """Restart an engine that failed between two syncs and give it the version that it had. Collective, as ``push``."""
        self.disconnect()
        self.push(self.version)

    def disconnect(self) -> None:
        """End the engine; the next push starts another. Called on every rank."""
        if self._transport is not None:
            self._transport.shutdown()
        self._transport, self._pushes = None, 0
        if self._engine is not None:
            self._engine.close()

    def _connect(self) -> Failure | None:
        """A running engine, filled with NaN if it has just started or slept, and a transport to it. Collective."""
        shapes = [(meta.name, tuple(meta.shape)) for meta in self._source.metadata()]

        def start() -> None:
            if self._engine is not None:
                check_names(shapes, self._engine.config.model)  # before the seconds that the engine takes to start
                if self._engine.state == State.DEAD:
                    self._engine.start()
                self._engine.wait_ready()
                if self._config.sleep and self._engine.state == State.STALE:
                    self._engine.sleep()  # the memory of its caches is not needed before the canary

        def connect() -> None:
            self._transport = make_trainer_transport(
                self._name, engine=self._engine, source=self._source, rank=self._rank
            )
            if self._engine is not None and not self._config.sleep:
                self._engine.fill_nan(shapes)

        def wake() -> None:
            if self._engine is not None and self._engine.state == State.ASLEEP:
                self._engine.wake(shapes)

        if self._transport is None:
            with self._learner.offloader.without("weights"):  # a starting engine takes its whole share of the memory
                failure = self._agree("connect", start)
            if failure := failure or self._agree("connect", connect):
                return failure
        return self._agree("wake", wake) if self._config.sleep else None

    def _transfer(self, version: int, metrics: dict[str, float]) -> Failure | None:
        """Send the weights; where it is due, compare what is served with what was sent. Collective."""
        every = self._config.verify_every
        due = self._engine is not None and (self._pushes == 0 or (every > 0 and self._pushes % every == 0))
        self._source.checksums = {} if due else None

        def send() -> None:
            with self._source.one_pass():
                send_weights(self._transport, self._engine, version)
            if self._config.sleep:
                torch.cuda.empty_cache()  # what was gathered is gone, and the engine's caches need the room

        def verify() -> None:
            began = time.perf_counter()
            served = self._engine.read_back_checksums(self._dtype)
            if wrong := wrong_tensors(self._source.checksums, served):
                raise EngineError(wrong, "verify")
            metrics["sync/verified_tensors"] = len(served.keys() & self._source.checksums.keys())
            metrics["time/verify_s"] = time.perf_counter() - began

        return self._agree("transfer", send) or (self._agree("verify", verify if due else _nothing))

    def _resume(self) -> None:
        """Let the engine generate again. It does not answer requests before it serves."""
        if self._engine is not None:
            if self._config.sleep:
                self._engine.wake_caches()
            self._engine.resume()

    def _serve(self) -> None:
        if self._engine is not None:
            self._engine.serve()

    def _check_canary(self, metrics: dict[str, float]) -> Failure | None:
        """Compare log-probs of freshly decoded tokens with the trainer's. Collective: all ranks run the forward pass."""
        began = time.perf_counter()
        own: list[CanarySample] = []

        def sample() -> None:
            if self._engine is not None and self._canary:
                cropped = [prompt.token_ids[:_CANARY_PROMPT_TOKENS] for prompt in self._canary]
                answers = self._engine.canary(cropped, min(_CANARY_TOKENS, self._config.max_response_tokens))
                own.extend(
                    CanarySample(prompt.id, ids, tuple(a.token_ids.tolist()), tuple(a.logprobs.tolist()), a.routed_experts)
                    for prompt, ids, a in zip(self._canary, cropped, answers, strict=True)
                )

        if failure := self._agree("canary", sample):
            return failure
        answered = gathered(own)
        # Engines say the same, as a rule: what one of them said is scored once.
        scored = on_rank_0(lambda: {sample.key: sample.scored for samples in answered for sample in samples})
        if not scored:
            return None
        trained = dict(zip(scored, self._learner.score(list(scored.values())), strict=True))
        largest = torch.tensor(-torch.inf, dtype=torch.float64, device=control_device())

        def compare() -> None:
            if own:
                gap, worst = canary_gap(own, [trained[sample.key] for sample in own])
                largest.fill_(gap)
                if not gap <= self._tolerance:
                    limit = f"rollout.canary_tolerance {self._tolerance:g}"
                    raise EngineError(f"mean |engine - trainer| log-prob gap {gap:.4g} nats, above {limit}; {worst}", "canary")

        if failure := self._agree("canary", compare):
            return failure
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if self._engine is not None:
            metrics |= {"mismatch/canary": float(largest), "time/canary_s": time.perf_counter() - began}
        return None

    def _agree(self, phase: str, action: Callable[[], None]) -> Failure | None:
        """Run ``action`` on this rank; the first rank's failure, on every rank. Collective as ``Lockstep.meet`` and :func:`first_answer`."""
        own = None
        try:
            action()
        except RankLostError as error:
            raise WeightSyncError(f"weights: phase {phase}: {error}") from None
        except GatherError as error:
            # Other ranks are inside the gather that failed here: they cannot be asked.
            raise WeightSyncError(f"weights: rank {self._rank}, phase gather, {error}") from error
        except EngineError as error:
            own = Failure(self._rank, error.phase, str(error), final=error.final)
        except InputError as error:
            own = Failure(self._rank, phase, str(error), final=True, mistake=True)
        except Exception as error:
            own = Failure(self._rank, phase, f"{type(error).__name__}: {error}", final=True)
        if own is not None and own.phase in ("transfer", "load"):
            own = replace(own, detail=f"{own.detail}\nThe group of {self._source.current} was gathered last.")
        try:
            self._lockstep.meet("the end of this phase")
        except RankLostError as error:
            raise WeightSyncError(f"weights: phase {phase}: {error}{f'; before, {own}' if own else ''}") from None
        return first_answer(own)


class NoSync:
    """In the place of a :class:`WeightSync` where there is no engine (``run.replay``)."""

    def push(self, version: int) -> dict[str, float]:
        """Nothing to do."""
        return {}

    def recover(self) -> None:
        """Nothing can fail."""

    sleep = disconnect = recover


def _nothing() -> None:
    pass
