"""Prompts -> rollouts -> rewards: builds the parts that do this on rank 0, and sends the result to
all ranks.
"""

import itertools
import json
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from megatron_espo.config import Config
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.data.scored_groups import ScoredGroups, broadcast_groups
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_espo.distributed.addresses import address_towards
from megatron_espo.distributed.collectives import gather_objects, on_rank_0
from megatron_espo.distributed.runtime import Runtime
from megatron_espo.distributed.stop_request import Stopped, StopRequest
from megatron_espo.models.spec import ModelSpec
from megatron_espo.monitoring.progress import Phases
from megatron_espo.rollout.engine import EngineError
from megatron_espo.rollout.evaluation import Evaluator, engine_config, evaluation_record
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.pool import EnginePool
from megatron_espo.rollout.runner import EnvironmentRunner, close_environment, load_environment
from megatron_espo.rollout.sampler import Sampler
from megatron_espo.rollout.scorer import Scorer
from megatron_espo.rollout.server import engine_owners
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.trainer.checkpoints import record_fingerprint
from megatron_espo.trainer.rollout_sources import ReplayedRollouts, RolloutSource, SampledRollouts
from megatron_espo.types import Prompt

Result = TypeVar("Result")


class RolloutManager:
    """The prompt stream, the environments and the scorer on rank 0, and the engine of this
    rank.

    The constructor checks data, rewards and environment before any rank builds its model.
    Engines start in the background.

    Args:
        config: the run's configuration.
        spec: the model.
        runtime: rank and process groups.
        stop: polled while engines and verifiers work.

    Attributes:
        engine: this rank's engine, or ``None``.
        tokenizer: on rank 0 and on ranks with an engine.
        source: rank 0's rollouts; ``None`` on other ranks.

    Raises:
        InputError: bad rows, tokenizer, reward function, judge or environment (rank 0).
    """

    def __init__(
        self, config: Config, spec: ModelSpec, runtime: Runtime, stop: StopRequest
    ) -> None:
        self.config, self.runtime, self._stop = config, runtime, stop
        self.engine: VLLMEngine | None = None
        self.tokenizer: Tokenizer | None = None
        self.source: RolloutSource | None = None
        self._closing = ExitStack()
        self._pool: EnginePool | None = None
        self._log: RolloutLog | None = None
        rollout, replay = config.rollout, config.run.replay
        experts = spec.experts if rollout.router_replay else None
        is_owner = not replay and runtime.rank in engine_owners(rollout.engines, runtime.world_size)
        max_model_len = rollout.max_model_len or spec.max_position_embeddings
        if runtime.is_main or is_owner:
            path = config.model.tokenizer or config.model.path
            self.tokenizer = load_tokenizer(path, config.model.path, config.data.template_args)
        if is_owner:
            self._loop = LoopThread()
            self._closing.callback(self._loop.close)
        if runtime.is_main:
            assert self.tokenizer
            folder = Path(replay or f"{config.run.dir}/rollouts")
            self._log = log = RolloutLog(folder, record_fingerprint(config))
            self._closing.callback(log.close)
            self._stream = PromptStream(
                config.data,
                self.tokenizer,
                config.run.seed,
                max_response_tokens=rollout.max_response_tokens,
                max_model_len=max_model_len,
            )
            if replay:
                self.source = ReplayedRollouts(log, self._stream, need_experts=experts is not None)
                return
            environment = load_environment(config.environment.name, config.environment.args)
            self._closing.callback(close_environment, environment, self._loop)
            self._scorer = Scorer(config, self.tokenizer, self._loop)
            self._closing.callback(self._scorer.close)
            self._scorer.start()
            if config.eval.prompts:
                self._evaluator = Evaluator(config, self.tokenizer, max_model_len)
        if is_owner:
            layers = experts.indices if experts else None
            settings = engine_config(
                config, max_model_len, expert_layers=layers, listen=_listen_address()
            )
            self.engine = VLLMEngine(settings, self._loop)
            self._closing.callback(self.engine.close)
            self.engine.start()
        if runtime.is_main and self.tokenizer:
            self._pool = pool = EnginePool(
                config.run.dir, rollout.timeout_s, rollout.host_timeout_s
            )
            self._closing.callback(lambda: self._loop.run(pool.close(), 5.0))
            self._runner = EnvironmentRunner(
                environment,
                pool,
                self.tokenizer,
                self._loop,
                config.environment.timeout_s,
                max_model_len,
                routed_experts=experts is not None,
            )
            sampler = Sampler(config, self._stream, self._runner, self._scorer, self._check)
            self._closing.callback(sampler.close)
            self.source = SampledRollouts(
                log,
                sampler,
                max_staleness=rollout.max_staleness,
                need_experts=experts is not None,
                keep=config.run.keep_rollouts,
                reuse=config.run.resume != "never",
            )

    def canary(self) -> list[Prompt]:
        """The first prompts of the stream, without advancing it.

        One object broadcast from rank 0.
        """

        def take() -> list[Prompt]:
            state = self._stream.state_dict()
            prompts = self._stream.take(self.config.rollout.canary_prompts)
            self._stream.load_state_dict(state)
            return prompts

        return on_rank_0(take)

    def connect(self) -> None:
        """Connect to the current engines of all ranks and release requests that waited.

        Collective: a gather to rank 0.
        """
        addresses = gather_objects(self.engine.address if self.engine else None)
        if self._pool is not None:
            self._loop.run(self._pool.connect([address for address in addresses if address]))

    def collect(self, step: int, phases: Phases, recover: Callable[[], None]) -> ScoredGroups:
        """Get the step's rollouts with their rewards, sampled or recorded, on every rank.
        Collective.

        Only rank 0 gets tokens, texts and routed experts (:func:`broadcast_groups`).

        Args:
            step: counted from 1.
            phases: times the phases.
            recover: called on every rank after an engine failed; it restarts engines and updates
                their weights. Requests in flight are sent again. At most ``rollout.max_restarts``
                times.

        Raises:
            Stopped: on every rank, if the run was asked to stop.
            EngineError: on every rank, if engines failed more often.
        """

        def attempt() -> ScoredGroups:
            assert self.source
            return self.source.batch(step, phases)

        return broadcast_groups(self._retry(attempt, recover))

    def evaluate(self, step: int, phases: Phases, recover: Callable[[], None]) -> dict[str, float]:
        """Evaluate on held-out prompts if that is due after ``step``, and append the result to
        ``eval.jsonl``. Collective.

        Args:
            step: counted from 1.
            phases: times the phases.
            recover: see :meth:`collect`.

        Returns:
            ``eval/*`` metrics on rank 0. Empty on other ranks, if no evaluation is due, and after a
                request to stop.
        """
        settings, run = self.config.eval, self.config.run
        if not settings.prompts or run.replay or (step % settings.every and step != run.steps):
            return {}
        return self._retry(lambda: self._evaluate(step, phases), recover) or {}

    def _retry(self, attempt: Callable[[], Result], recover: Callable[[], None]) -> Result | None:
        """Rank 0's result of ``attempt``, which is repeated after failures of an engine; ``None``
        on other ranks.
        """
        result: list[Result] = []
        for restarts in itertools.count():
            try:
                on_rank_0(lambda: result.append(attempt()))
                break
            except EngineError as error:
                if restarts == self.config.rollout.max_restarts:
                    what = f"{error}\ngave up after {restarts} engine restarts"
                    raise EngineError(what) from None
                if self.runtime.is_main:
                    print(f"warning: {error}\nrestarting the rollout engine", flush=True)
            recover()
        return result[0] if result else None

    def _evaluate(self, step: int, phases: Phases) -> dict[str, float]:
        try:
            self._check()
            rollouts = self._evaluator.run(
                self._runner, self._scorer, phases, step, self.config.run.steps, self._check
            )
        except Stopped:
            return {}
        record = evaluation_record(rollouts, step=step)
        with open(Path(self.config.run.dir, "eval.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record["metrics"]

    def _check(self) -> None:
        """Raise an error that ends a wait: a request to stop, or a failed engine."""
        self._stop.check()
        if self._pool:
            self._pool.check()

    def wait_for_record(self) -> None:
        """Return when the step's rollouts are durable on disk (rank 0).

        Raises:
            OSError: they were not written.
        """
        if self._log:
            self._log.wait()

    def close(self) -> None:
        """Cancel trajectories in flight. Stop this rank's engine and the reward workers."""
        self._closing.close()


def _listen_address() -> str | None:
    """``host:port`` for an engine on another machine than rank 0: the interface that reaches rank
    0, and a free port.
    """
    if os.environ.get("GROUP_RANK", "0") == "0":
        return None
    host = address_towards(os.environ["MASTER_ADDR"])
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"
