"""Rank 0's side of a step: prompts -> engine -> rewards; every rank receives the scored rollouts."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.batch import ScoredGroups
from megatron_espo.checkpoints import fingerprint
from megatron_espo.config import Config
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_espo.errors import InputError
from megatron_espo.evaluator import Evaluator, engine_config
from megatron_espo.lengths import LengthEstimates
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.progress import OnProgress, Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.rollout import Engine, EngineError, Fleet, engine_owners
from megatron_espo.rollout_log import RolloutLog
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
        self._lengths = LengthEstimates()
        # One for the whole run: reward workers die with the thread that started them.
        self._thread = ThreadPoolExecutor(1, "rollouts")
        owners = [] if config.run.replay else engine_owners(config.rollout.engines, runtime.world_size)
        if runtime.is_main or runtime.rank in owners:
            self.tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.path)
            max_model_len = config.rollout.max_model_len or hf_config["max_position_embeddings"]
        if runtime.is_main:
            self._read(config, max_model_len)
        if runtime.rank in owners:
            self.engine = Engine(engine_config(config, self.tokenizer, max_model_len), self.tokenizer.decode).start()
        self._fleet = Fleet(self.engine, owners)

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
        """Sample and judge one rollout batch, or take the one that was recorded. Collective: one object broadcast from rank 0.

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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        if self.runtime.is_main:
            self._stream.load_state_dict(state)

    def forget(self, step: int) -> None:
        """A checkpoint holds everything up to ``step``: its rollouts are not needed any more, unless the run keeps them."""
        if self.runtime.is_main and not (self.config.run.keep_rollouts or self.config.run.replay):
            self._log.forget(step)

    def close(self) -> None:
        """End what is done in the background, the engine and the reward workers."""
        self._closing.set()
        self._thread.shutdown()
        self._fleet.close()
        if self.engine is not None:
            self.engine.close()
        if self._rewards is not None:
            self._rewards.close()

    def _attempt(self, step: int, phases: Phases) -> ScoredGroups | Stopped | str:
        """The batch; or, with the stream put back, why there is none: a request to stop, or what befell the engine."""
        before = self._stream.state_dict()
        try:
            found = self._log.read(step, None if self.config.run.replay else before)
            # Too stale: written by a run that went on with a lower bound.
            if found and (self.config.run.replay or found[0].staleness(step) <= self.config.rollout.max_staleness):
                groups, after = found
                if not self.config.run.replay:
                    self._stream.load_state_dict(after)
                return groups
            if self.config.run.replay:
                raise InputError(f"run.replay: expected rollouts of step {step} in {self._log.folder}, found none; lower run.steps")
            groups = self._sample_and_judge(step, phases)
        except (EngineError, Stopped) as failure:
            self._stream.load_state_dict(before)
            return failure if isinstance(failure, Stopped) else str(failure)
        self._log.write(step, groups, before=before, after=self._stream.state_dict())
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

    def _sample_and_judge(self, step: int, phases: Phases) -> ScoredGroups:
        """One batch; with dynamic sampling, groups of equal rewards give way to other prompts' that have some to learn from."""
        wanted = self.config.rollout.prompts_per_step
        best = self._sample_round(wanted, step, 0, phases)
        for round_number in range(1, self.config.rollout.max_resampling_rounds + 1):
            missing = int((~best.vary).sum())
            if not missing:
                break
            best = _replace_equal(best, self._sample_round(missing, step, round_number, phases))
        self._rewards.refuse_failures(int(best.rewards.isnan().sum()), best.rewards.numel(), step)
        return best

    def _sample_round(self, count: int, step: int, round_number: int, phases: Phases) -> ScoredGroups:
        rollout, steps = self.config.rollout, self.config.run.steps
        prompts = self._stream.take(count)
        order = self._lengths.longest_first(prompts) if rollout.longest_first else list(range(count))
        dealt = [prompts[i] for i in order]
        # A seed of its own for every step and round: rerunning a run gives the same rollouts.
        seed = self.config.run.seed * 1_000_003 + step + (round_number << 40)
        with self._rewards.scoring() as scoring:

            def judge(number: int, text: str) -> None:
                place, position = divmod(number, rollout.group_size)
                scoring.add(order[place] * rollout.group_size + position, dealt[place], text)

            def keep_judging(finished: int, total: int) -> None:
                scoring.pump()
                polled(finished, total)

            overlap = {"on_finished": judge} if self.config.reward.overlap else {}
            with phases.phase("rollout", step, steps) as on_progress:
                polled = self._polling(on_progress)
                found = self._fleet.generate(dealt, rollout.group_size, seed=seed, on_progress=keep_judging, **overlap)
            groups = [group for _, group in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
            self._lengths.learn(groups)
            with phases.phase("reward", step, steps) as on_progress:
                for number, sample in enumerate(sample for group in groups for sample in group):
                    scoring.add(number, sample.prompt, sample.text)
                scores = scoring.finish(self._polling(on_progress))
        rewards = torch.tensor([float("nan") if score is None else score for score in scores])
        return ScoredGroups(groups, rewards.view(len(groups), rollout.group_size), len(groups))

    def _polling(self, on_progress: OnProgress) -> OnProgress:
        """``on_progress`` that raises Stopped when the run is to stop."""

        def poll(finished: int, total: int) -> None:
            self._stop.check()
            if self._closing.is_set():
                raise Stopped("the run ends")
            on_progress(finished, total)

        return poll


def _replace_equal(groups: ScoredGroups, others: ScoredGroups) -> ScoredGroups:
    """Put those of ``others`` whose rewards vary in the place of groups whose rewards do not."""
    places, found = (~groups.vary).nonzero()[:, 0].tolist(), others.vary.nonzero()[:, 0].tolist()
    rollouts, rewards = list(groups.rollouts), groups.rewards.clone()
    for place, number in zip(places, found, strict=False):
        rollouts[place], rewards[place] = others.rollouts[number], others.rewards[number]
    return ScoredGroups(rollouts, rewards, groups.dispatched + others.dispatched)
