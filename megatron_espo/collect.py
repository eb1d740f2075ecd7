"""Rank 0's side of a step: prompts -> engine -> rewards; every rank receives the scored rollouts."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_espo.batch import ScoredGroups
from megatron_espo.checkpoints import fingerprint
from megatron_espo.config import Config
from megatron_espo.config.experts import replays_router
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_espo.errors import InputError
from megatron_espo.evaluator import Evaluator, engine_config
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.progress import OnProgress, Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.rollout import Engine, EngineError, Fleet, dismiss, engine_owners
from megatron_espo.rollout_log import RolloutLog
from megatron_espo.sampling import Sampler
from megatron_espo.stopping import Stopped, StopRequest
from megatron_espo.types import Prompt


@dataclass(frozen=True)
class Ahead:
    """The next step's batch, in the making: what comes of it, the seconds it takes, and where the prompt stream stood before it."""

    outcome: "Future[ScoredGroups | Stopped | str]"
    phases: Phases
    before: dict[str, Any]


class Collector:
    """The prompt stream, the rollout engines and the reward workers. They live on rank 0, but for the engines of other ranks (``rollout.engines``).

    Data and reward function are checked here, before any rank builds its model; the engine starts in the background meanwhile.

    Args:
        config: the run's configuration.
        hf_config: the model's ``config.json``.
        runtime: this rank's place.
        stop: polled while engine and verifiers work.

    Attributes:
        engine: this rank's, or ``None``.

    Collectives: with several engines, one broadcast of an object.

    Raises:
        InputError: bad rows, tokenizer or reward function (rank 0).
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], runtime: Runtime, stop: StopRequest) -> None:
        self.config, self.runtime, self._stop = config, runtime, stop
        self.engine: Engine | None = None
        self.tokenizer: Tokenizer | None = None
        self._rewards: RewardPool | None = None
        self._ahead: Ahead | None = None
        self._closing = threading.Event()
        self._replays_router = replays_router(config.rollout, hf_config)
        # One for the whole run: reward workers die with the thread that started them.
        self._thread = ThreadPoolExecutor(1, "rollouts")
        owners = [] if config.run.replay else engine_owners(config.rollout.engines, runtime.world_size)
        if runtime.is_main or runtime.rank in owners:
            self.tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.path)
            max_model_len = config.rollout.max_model_len or hf_config["max_position_embeddings"]
        if runtime.is_main:
            self._read(config, max_model_len)
        if runtime.rank in owners:
            settings = engine_config(config, self.tokenizer, max_model_len, routed_experts=self._replays_router)
            self.engine = Engine(settings, self.tokenizer.decode).start()
        self._fleet = Fleet(self.engine, owners)
        if runtime.is_main:
            self._sampler = Sampler(config, self._stream, self._fleet, self._rewards, self._polling)

    def _read(self, config: Config, max_model_len: int) -> None:
        """Prompts, recorded rollouts and the reward function, before anything else."""
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

    def collect(self, step: int, phases: Phases, recover: Callable[[], None]) -> ScoredGroups:
        """Sample and judge one rollout batch, or take the one that was recorded. Collective: one object broadcast from rank 0, which alone has the
        routed experts then.

        Args:
            recover: called on every rank when the engine failed; it brings it back (``WeightSync.recover``), and the same
                prompts are sampled again, ``rollout.max_restarts`` times.

        Raises:
            Stopped: on every rank, if rank 0 was asked to stop; the prompt stream is where it was before.
            EngineError: the engine failed once too often.
        """

        def attempt() -> ScoredGroups | Stopped | str:
            ahead, self._ahead = self._ahead, None
            if ahead is None:
                return self._attempt(step, phases)
            phases.add(ahead.phases.take())
            return ahead.outcome.result()

        return self._agreed(attempt, recover)

    def sample_ahead(self, step: int) -> None:
        """With ``rollout.max_staleness``: begin ``step``'s batch in the background, with the weights that the engine has.

        Between this and :meth:`settle` nobody else may use the engine.
        """
        run = self.config.run
        if self.runtime.is_main and self.config.rollout.max_staleness and not run.replay and step <= run.steps:
            phases, before = Phases(draw=False), self._stream.state_dict()
            self._ahead = Ahead(self._thread.submit(self._attempt, step, phases), phases, before)

    def settle(self, step: int, phases: Phases, disconnect: Callable[[], None]) -> None:
        """Wait until the batch that was begun in the background is sampled and judged, so that the engine is free. Collective.

        Args:
            disconnect: called on every rank when the engine failed; the next sync then starts another, and the batch's prompts
                are sampled by it.

        Raises:
            Stopped: on every rank, if rank 0 was asked to stop; the engine is gone, the prompt stream is where it was before.
            EngineError: the engine failed and may not be restarted.
        """
        if self.config.rollout.max_staleness and not self.config.run.replay:
            with phases.phase("wait", step, self.config.run.steps) as on_progress:
                self._agreed(lambda: self._failure_ahead(on_progress), disconnect)

    def _failure_ahead(self, on_progress: OnProgress) -> Stopped | str | None:
        if self._ahead is None:
            return None
        while wait([self._ahead.outcome], timeout=1).not_done:
            on_progress(0, 1)  # the engine's own limits end what lasts too long
        outcome = self._ahead.outcome.result()
        if not isinstance(outcome, Stopped | str):
            return None
        self._ahead = None
        return outcome

    def evaluate(self, step: int, phases: Phases, recover: Callable[[], None]) -> dict[str, float]:
        """``eval/*`` metrics of the held-out prompts where they are due after ``step``, else none; ``eval.jsonl`` gets every prompt's rewards.

        Collective where it is due: one object broadcast from rank 0. A request to stop gives the evaluation up, quietly.

        Args:
            recover: as in :meth:`collect`.
        """
        settings, run = self.config.eval, self.config.run
        if not settings.prompts or run.replay or (step % settings.every and step != run.steps):
            return {}
        return self._agreed(lambda: self._attempt_evaluation(step, phases), recover)

    def _agreed(self, attempt: Callable[[], Any], recover: Callable[[], None]) -> Any:
        """Rank 0's ``attempt`` on every rank, again after the engine's failures, which it returns as text; it may return Stopped too."""
        for restarts in range(self.config.rollout.max_restarts + 1):
            box: list[Any] = [""]
            if self.runtime.is_main:
                box[0] = attempt()
            dist.broadcast_object_list(box, src=0)
            if isinstance(box[0], Stopped):
                raise box[0]
            if not isinstance(box[0], str):
                return box[0]
            if restarts < self.config.rollout.max_restarts:
                if self.runtime.is_main:
                    print(f"warning: {box[0]}\nrestarting the rollout engine", flush=True)
                recover()
        raise EngineError(f"{box[0]}\ngave up after {restarts} engine restarts")

    def state_dict(self) -> dict[str, Any] | None:
        """Where the prompt stream stands after the batches that were handed out, as JSON values; ``None`` on ranks other than 0."""
        if not self.runtime.is_main:
            return None
        return self._ahead.before if self._ahead else self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Continue after ``step`` from its ``state_dict``; responses that were in flight then are in the rollouts' folder.

        Raises:
            InputError: they are not.
        """
        if self.runtime.is_main:
            self._stream.load_state_dict(state)
            if step and self.config.rollout.extra_prompts and not self.config.run.replay:
                self._sampler.in_flight = self._log.in_flight_after(step)

    def forget(self, step: int) -> None:
        """A checkpoint holds everything up to ``step``, but for what was in flight after it: earlier rollouts are not needed any more, unless the run
        keeps them."""
        if self.runtime.is_main and not (self.config.run.keep_rollouts or self.config.run.replay):
            self._log.forget(step - bool(self.config.rollout.extra_prompts))

    def close(self, over: bool = False) -> None:
        """End what is done in the background, the engine and the reward workers; if the run is ``over``, the agents of ``rollout.hosts`` too."""
        self._closing.set()
        self._thread.shutdown()
        self._fleet.close()
        if self.engine is not None:
            self.engine.close()
        if self._rewards is not None:
            self._rewards.close()
        if over and self.runtime.is_main:
            dismiss(self.config.rollout.hosts, self.config.run.dir)

    def _attempt(self, step: int, phases: Phases) -> ScoredGroups | Stopped | str:
        """The batch; or, with the stream put back, why there is none: a request to stop, or what befell the engine."""
        before = self._stream.state_dict()
        try:
            found = self._log.read(step, None if self.config.run.replay else before)
            if found and self._replays_router and not found.groups.have_routed_experts:
                if self.config.run.replay:
                    raise InputError(
                        f"run.replay: expected rollouts of step {step} in {self._log.folder} with the experts that their engine chose, found none; "
                        "set rollout.router_replay to false and rollout.allow_router_mismatch to true to train without"
                    )
                found = None  # of a part of this run without router replay
            # Too stale: written by a run that went on with a lower bound.
            if found and (self.config.run.replay or found.groups.staleness(step) <= self.config.rollout.oldest):
                if not self.config.run.replay:
                    self._stream.load_state_dict(found.after)
                    self._sampler.in_flight = found.in_flight
                return found.groups
            if self.config.run.replay:
                raise InputError(f"run.replay: expected rollouts of step {step} in {self._log.folder}, found none; lower run.steps")
            groups = self._sampler.batch(step, phases)
        except (EngineError, Stopped) as failure:
            self._stream.load_state_dict(before)
            return failure if isinstance(failure, Stopped) else str(failure)
        self._log.write(step, groups, before=before, after=self._stream.state_dict(), in_flight=self._sampler.in_flight)
        return groups

    def _attempt_evaluation(self, step: int, phases: Phases) -> dict[str, float] | str:
        try:
            self._stop.check()
            found = self._evaluator.run(self._fleet, self._rewards, phases, step, self.config.run.steps, self._polling)
        except Stopped:
            return {}
        except EngineError as failure:
            return str(failure)
        record = found.record(step=step)
        with open(Path(self.config.run.dir, "eval.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record["metrics"]

    def _polling(self, on_progress: OnProgress) -> OnProgress:
        """``on_progress`` that raises Stopped when the run is to stop."""

        def poll(finished: int, total: int) -> None:
            self._stop.check()
            if self._closing.is_set():
                raise Stopped("the run ends")
            on_progress(finished, total)

        return poll
