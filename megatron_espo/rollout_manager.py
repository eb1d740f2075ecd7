"""Rank 0's side of a step: prompts -> environments and engines -> rewards. Every rank receives the scored trajectories."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_espo.addresses import address_towards
from megatron_espo.batch import ScoredGroups
from megatron_espo.checkpoints import fingerprint
from megatron_espo.collectives import gathered
from megatron_espo.config import Config
from megatron_espo.config.experts import replays_router
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_espo.errors import InputError
from megatron_espo.evaluator import Evaluator, engine_config
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.progress import Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.rollout.engine import EngineError
from megatron_espo.rollout.environments import load_environment
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.pool import EnginePool, connected_pool
from megatron_espo.rollout.runner import EnvironmentRunner, RunnerConfig
from megatron_espo.rollout.sampler import Sampler
from megatron_espo.rollout.server import engine_owners
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.rollout_log import RolloutLog
from megatron_espo.stopping import Stopped, StopRequest
from megatron_espo.types import Prompt


class RolloutManager:
    """The prompt stream, the engines, the environments and the reward workers. They live on rank 0, but for the engines of other ranks.

    Data, reward function and environment are checked here, before any rank builds its model. Engines start in the
    background meanwhile.

    Args:
        config: the run's configuration.
        hf_config: the model's ``config.json``.
        runtime: this rank's place.
        stop: polled while engines and verifiers work.

    Attributes:
        engine: this rank's, or ``None``.

    Raises:
        InputError: bad rows, tokenizer, reward function or environment (rank 0).
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], runtime: Runtime, stop: StopRequest) -> None:
        self.config, self.runtime, self._stop = config, runtime, stop
        self.engine: VLLMEngine | None = None
        self.tokenizer: Tokenizer | None = None
        self._rewards: RewardPool | None = None
        self._pool: EnginePool | None = None
        self._loop: LoopThread | None = None
        self._replays_router = replays_router(config.rollout, hf_config)
        owners = [] if config.run.replay else engine_owners(config.rollout.engines, runtime.world_size)
        max_model_len = config.rollout.max_model_len or hf_config["max_position_embeddings"]
        if runtime.is_main or runtime.rank in owners:
            self.tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.path)
        if runtime.is_main:
            self._read(config, max_model_len)
        if runtime.rank in owners:
            self._loop = LoopThread()
            settings = engine_config(config, max_model_len, routed_experts=self._replays_router, listen=_listen_address())
            self.engine = VLLMEngine(settings, self._loop)
            self.engine.start()
        if runtime.is_main and owners:
            self._pool = self._loop.run(connected_pool(config.run.dir, config.rollout.timeout_s, [], config.rollout.host_timeout_s))
            limits = config.environment
            runner = EnvironmentRunner(
                self._environment,
                self._pool,
                self.tokenizer,
                self._loop,
                RunnerConfig(
                    limits.max_concurrent, limits.timeout_s, limits.retries, max_model_len, self._replays_router
                ),
            )
            self._runner = runner
            self._sampler = Sampler(config, self._stream, runner, self._rewards, self.tokenizer.eos_ids, self._check)

    def _read(self, config: Config, max_model_len: int) -> None:
        """Prompts, recorded rollouts, environment and reward function, before anything else."""
        self._log = RolloutLog(Path(config.run.replay or Path(config.run.dir, "rollouts")), fingerprint(config))
        self._stream = PromptStream(
            config.data,
            self.tokenizer,
            config.run.seed,
            max_response_tokens=config.rollout.max_response_tokens,
            max_model_len=max_model_len,
        )
        if config.run.replay:
            return
        self._environment = load_environment(config.environment.name, config.environment.args)
        self._rewards = RewardPool(config.reward)
        self._rewards.start()
        self._evaluator = Evaluator(config, self.tokenizer, max_model_len) if config.eval.prompts else None

    def canary(self) -> list[Prompt]:
        """The first prompts of the stream, which does not move on. One broadcast of an object from rank 0."""
        box: list[list[Prompt]] = [[]]
        if self.runtime.is_main:
            state = self._stream.state_dict()
            box[0] = self._stream.take(self.config.rollout.canary_prompts)
            self._stream.load_state_dict(state)
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def connect(self) -> None:
        """Use the engines that the ranks have now; requests that were held go on. Collective: a gather to rank 0."""
        addresses = [address for address in gathered(self.engine.address if self.engine else None) if address]
        if self._pool is not None:
            self._loop.run(self._pool.connect(addresses))

    def collect(self, step: int, phases: Phases, recover: Callable[[], None]) -> ScoredGroups:
        """The step's trajectories with their rewards, sampled or recorded. Collective: one object broadcast from rank 0.

        Rank 0 alone has the routed experts.

        Args:
            recover: called on every rank when an engine failed; it restarts engines and updates their weights. Requests
                that were in flight are sent again. At most ``rollout.max_restarts`` times.

        Raises:
            Stopped: on every rank, if rank 0 was asked to stop.
            EngineError: an engine failed once too often.
        """
        return self._agreed(lambda: self._batch(step, phases), recover)

    def evaluate(self, step: int, phases: Phases, recover: Callable[[], None]) -> dict[str, float]:
        """``eval/*`` metrics of the held-out prompts where they are due after ``step``, else none; ``eval.jsonl`` gets every prompt's rewards.

        Collective where it is due: one object broadcast from rank 0. A request to stop ends the evaluation without metrics.

        Args:
            recover: as in :meth:`collect`.
        """
        settings, run = self.config.eval, self.config.run
        if not settings.prompts or run.replay or (step % settings.every and step != run.steps):
            return {}
        return self._agreed(lambda: self._evaluate(step, phases), recover)

    def _agreed(self, attempt: Callable[[], Any], recover: Callable[[], None]) -> Any:
        """The result of rank 0's ``attempt`` on every rank; again after failures of an engine."""
        for restarts in range(self.config.rollout.max_restarts + 1):
            box: list[Any] = [None]
            if self.runtime.is_main:
                try:
                    box[0] = attempt()
                except (EngineError, Stopped) as failure:
                    box[0] = failure
            dist.broadcast_object_list(box, src=0)
            if isinstance(box[0], Stopped):
                raise box[0]
            if not isinstance(box[0], EngineError):
                return box[0]
            if restarts < self.config.rollout.max_restarts:
                if self.runtime.is_main:
                    print(f"warning: {box[0]}\nrestarting the rollout engine", flush=True)
                recover()
        raise EngineError(f"{box[0]}\ngave up after {restarts} engine restarts")

    def state_dict(self) -> dict[str, Any] | None:
        """Prompt stream and prompts in flight after the last batch, as JSON values; ``None`` on ranks other than 0."""
        if not self.runtime.is_main:
            return None
        return {"stream": self._stream.state_dict(), "pending": []} if self._pool is None else self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's ``state_dict``; prompts that were in flight are sampled again."""
        if self.runtime.is_main:
            if self._pool is None:
                self._stream.load_state_dict(state["stream"])
            else:
                self._sampler.load_state_dict(state)

    def forget(self, step: int) -> None:
        """A checkpoint holds everything up to ``step``: recorded rollouts of earlier steps are removed, unless the run keeps them."""
        if self.runtime.is_main and not (self.config.run.keep_rollouts or self.config.run.replay):
            self._log.forget(step)

    def close(self) -> None:
        """End trajectories in flight, the engine of this rank and the reward workers."""
        if self._pool is not None:
            self._sampler.close()
            if close := getattr(self._environment, "close", None):
                self._loop.run(close(), 5.0)
            self._loop.run(self._pool.close(), 5.0)
        if self.engine is not None:
            self.engine.close()
        if self._loop is not None:
            self._loop.close()
        if self._rewards is not None:
            self._rewards.close()

    def _batch(self, step: int, phases: Phases) -> ScoredGroups:
        before = self.state_dict()
        found = self._log.read(step, None if self.config.run.replay else before)
        if found and self._replays_router and not found.groups.have_routed_experts:
            if self.config.run.replay:
                raise InputError(
                    f"run.replay: expected rollouts of step {step} in {self._log.folder} with the experts that their engine chose, found none; "
                    "set rollout.router_replay to false and rollout.allow_router_mismatch to true to train without"
                )
            found = None  # of a part of this run without router replay
        if self.config.run.replay:
            if not found:
                raise InputError(f"run.replay: expected rollouts of step {step} in {self._log.folder}, found none; lower run.steps")
            return found.groups
        # Recorded with a higher bound than today's: too stale.
        if found and found.groups.max_staleness(step) <= self.config.rollout.max_staleness:
            self._sampler.load_state_dict(found.after)
            return found.groups
        groups = self._sampler.batch(step, phases)
        self._log.write(step, groups, before=before, after=self.state_dict())
        return groups

    def _evaluate(self, step: int, phases: Phases) -> dict[str, float]:
        try:
            self._check()
            found = self._evaluator.run(self._runner, self._rewards, phases, step, self.config.run.steps, self._check)
        except Stopped:
            return {}
        record = found.record(step=step)
        with open(Path(self.config.run.dir, "eval.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record["metrics"]

    def _check(self) -> None:
        """Raise what ends a wait: a request to stop, or a failed engine."""
        self._stop.check()
        if self._pool.failure is not None:
            raise self._pool.failure


def _listen_address() -> str | None:
    """Address for the server of a rank that is on another machine than rank 0: of the interface that reaches it, any free port."""
    if os.environ.get("GROUP_RANK", "0") == "0":
        return None
    host = address_towards(os.environ["MASTER_ADDR"])
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"
