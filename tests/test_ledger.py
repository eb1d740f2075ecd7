"""After any failures, every prompt is dispatched once, and trained once or dropped."""

import json
import random
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from megatron_espo.config import Data, Rollout
from megatron_espo.data import PromptStream
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.distributed.stop_request import Stopped
from megatron_espo.rollout.engine import EngineError
from megatron_espo.trainer.ledger import Ledger
from megatron_espo.trainer.rollout_sources import SampledRollouts
from megatron_espo.types import Prompt
from tests.support.fake_engine import TOKENIZER, FakeRun

STEPS, PROMPTS, ROWS, GROUP = 12, 3, 17, 2
WAYS = {
    "synchronous": {},
    "resampling": {"max_resampling_rounds": 2},
    "stale": {"max_staleness": 2},
    "stale, few in flight": {"max_staleness": 2, "over_sampling_prompts": 2},
    "stale, resampling": {"max_staleness": 1, "max_resampling_rounds": 2},
}
QUICK = ("synchronous", "stale, resampling")
every_way = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way in QUICK else pytest.mark.slow) for way in WAYS]
)


class Killed(BaseException):
    """Stands for SIGKILL: the test uses nothing of the process afterwards."""


class Process:
    """A process of a run: SampledRollouts between fakes of the engine and the verifier."""

    def __init__(
        self, folder, way: dict, chance: random.Random, checkpoint: dict, mixed: bool
    ) -> None:
        self.chance = chance
        rollout = Rollout(
            prompts_per_step=PROMPTS,
            group_size=GROUP,
            max_response_tokens=4,
            max_model_len=64,
            **way,
        )
        prompts = stream(folder, mixed)
        self.run = FakeRun(
            rollout, judge, order=lambda ids, seed: seed, check=self.fail, stream=prompts
        )
        self.log = log = RolloutLog(folder / "rollouts", {})
        staleness = rollout.max_staleness
        self.source = SampledRollouts(log, self.run.sampler, max_staleness=staleness)
        self.step, self.ledger = checkpoint["step"], Ledger(**checkpoint["ledger"])
        self.source.load_state_dict(checkpoint["rollouts"])

    def fail(self, *faults: type[BaseException]) -> None:
        if fault := self.chance.choice([*[None] * 12, *(faults or (EngineError, Stopped, Killed))]):
            raise fault("now")

    def train(self, history: dict[int, list]) -> None:
        """Run one step, with retries after engine failures.

        Adds the prompts and texts of the step to ``history``.
        """
        step = self.step + 1
        self.run.source.version = self.step
        sampled = len(self.run.source.requests)
        while True:
            try:
                groups = self.source.batch(step, self.run.phases)
                break
            except EngineError:
                continue
        self.log.wait()
        found = [(group[0].prompt.id, sorted(s.text for s in group)) for group in groups.rollouts]
        if step in history:
            assert found == history[step], "a recorded step is trained as it was"
            assert len(self.run.source.requests) == sampled, "a recorded step is not sampled again"
        history[step] = found
        for group, rewards in zip(groups.rollouts, groups.rewards.tolist(), strict=True):
            assert rewards == [judge(sample.prompt, sample.text) for sample in group]
        self.fail(Killed)  # in training
        self.step = step
        self.ledger.count(groups)

    def checkpoint(self) -> dict:
        self.source.forget(self.step)
        state = {
            "step": self.step,
            "ledger": asdict(self.ledger),
            "rollouts": self.source.state_dict(),
        }
        return json.loads(json.dumps(state))


def judge(prompt: Prompt, text: str) -> float:
    return float(len(text) // 2 % 2)


def stream(folder, mixed: bool = False) -> PromptStream:
    """The 17 rows, or a mixture of 9 of them and 5 others that rest when they are solved."""
    rows, more = str(folder / "rows.jsonl"), str(folder / "more.jsonl")
    data = Data(prompts=rows)
    if mixed:
        first = {"prompts": rows, "weight": 0.7, "pass_rate": (0, 0.5)}
        data = Data(mixture={"a": first, "b": {"prompts": more, "weight": 0.3}}, skip_solved=1)
    return PromptStream(data, TOKENIZER, 1, max_response_tokens=4, max_model_len=64)


def run_to_the_end(
    folder, way: dict, chance, mixed: bool = False
) -> tuple[dict[int, list], Ledger, dict]:
    """Prompts and texts of all steps, the counts, and the final state."""
    folder.mkdir()
    for name, count in (("rows", ROWS), ("more", 5)):
        rows = [
            {"id": i, "prompt": str(i), "answer": "1", "pass_rate": i / (ROWS - 1)}
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    checkpoint = {
        "step": 0,
        "ledger": {},
        "rollouts": {"stream": stream(folder, mixed).state_dict(), "pending": []},
    }
    history: dict[int, list] = {}
    process = Process(folder, way, chance, checkpoint, mixed)
    while process.step < STEPS:
        try:
            process.train(history)
        except (Stopped, Killed) as end:
            if isinstance(end, Stopped):
                checkpoint = process.checkpoint()
            process.run.close()
            process = Process(folder, way, chance, checkpoint, mixed)
        else:
            if process.step % 4 == 0:
                checkpoint = process.checkpoint()
    process.run.close()
    return history, process.ledger, process.checkpoint()["rollouts"]


@every_way
def test_every_prompt_is_counted_once_after_failures(tmp_path, way):
    calm = SimpleNamespace(choice=lambda faults: None)
    ends = [run_to_the_end(tmp_path / "calm", WAYS[way], calm)]
    ends += [
        run_to_the_end(tmp_path / str(seed), WAYS[way], random.Random(seed)) for seed in range(6)
    ]
    for number, (history, ledger, state) in enumerate(ends):
        assert sorted(history) == list(range(1, STEPS + 1))
        first = stream(tmp_path / "calm")
        dispatched = Counter(prompt.id for prompt in first.take(ledger.dispatched))
        assert first.state_dict() == state["stream"], number
        trained = Counter(prompt for groups in history.values() for prompt, _ in groups)
        pending = Counter(entry["id"] for entry in state["pending"])
        assert (
            trained.total() == ledger.trained == STEPS * PROMPTS
            and pending.total() == ledger.in_flight
        )
        dropped = dispatched - trained - pending
        assert trained + pending + dropped == dispatched, "none is trained twice"
        assert dropped.total() == ledger.dropped_equal
        assert (ledger.dropped_equal > 0) == ("resampling" in way)
        if not WAYS[way].get("max_staleness"):
            assert (history, ledger, state) == ends[0], number


@every_way
def test_rows_of_mixed_and_filtered_sources_are_counted_once(tmp_path, way):
    calm, is_sync = SimpleNamespace(choice=lambda faults: None), "stale" not in way
    ends = [run_to_the_end(tmp_path / "calm", WAYS[way], calm, mixed=True)]
    for seed in range(4):
        folder = tmp_path / str(seed)
        ends.append(run_to_the_end(folder, WAYS[way], random.Random(seed), mixed=True))
    for number, (history, ledger, state) in enumerate(ends):
        a, b = state["stream"]["a"], state["stream"]["b"]
        # Rows that the stream has passed: of "a" those outside of pass_rate count first.
        passed = a["epoch"] * 17 + 8 + a["position"] + b["epoch"] * 5 + b["position"]
        assert ledger.dispatched + ledger.skipped == passed and a["epoch"] and b["epoch"]
        assert ledger.skipped > (a["epoch"] + 1) * 8, "solved prompts are skipped too"
        assert ledger.trained == sum(map(len, history.values())) == STEPS * PROMPTS
        dropped = ledger.dispatched - ledger.trained - ledger.in_flight
        assert dropped == ledger.dropped_equal and (dropped > 0) == ("resampling" in way)
        used = [prompt for groups in history.values() for prompt, _ in groups]
        used += [entry["id"] for entry in state["pending"]]
        rows = {int(name[2:]) for name in used if name[0] == "a"}
        assert rows == set(range(9)) or (dropped and rows < set(range(9)))
        assert dropped or abs(sum(name[0] == "a" for name in used) - 0.7 * len(used)) < 2
        if is_sync:
            assert (history, ledger, state) == ends[0], number
    if way == "synchronous":
        expected = stream(tmp_path / "calm", mixed=True)
        for step in range(1, STEPS + 1):
            prompts = expected.take(PROMPTS)
            assert [prompt.id for prompt in prompts] == [name for name, _ in ends[0][0][step]]
            for prompt, (_, texts) in zip(prompts, ends[0][0][step], strict=True):
                if all(judge(prompt, text) == 1 for text in texts):
                    expected.note_solved(prompt)
        assert expected.state_dict() == ends[0][2]["stream"]
