"""Whatever fails and however often, every prompt is dispatched, and trained or dropped, exactly once, in the stream's order."""

import json
import random
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from megatron_espo.collect import Collector
from megatron_espo.config import Data, Reward, Rollout, Run
from megatron_espo.data import PromptStream
from megatron_espo.ledger import Ledger
from megatron_espo.progress import Phases
from megatron_espo.rollout import EngineError
from megatron_espo.rollout_log import RolloutLog
from megatron_espo.stopping import Stopped
from megatron_espo.types import Rollout as Sample
from tests.test_dynamic_sampling import FakeRewards

STEPS, PROMPTS, ROWS, GROUP = 12, 3, 17, 2
TOKENIZER = SimpleNamespace(
    encode_prompt=lambda prompt: [1], render=lambda prompt: prompt, vocab_size=9, has_chat_template=False, decode=str
)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process is used afterwards."""


class Process:
    """What a run has in memory between two deaths; everything but engine and verifier is real.

    Attributes:
        asked: prompts of each round of the attempt that is under way.
    """

    def __init__(self, folder, rounds: int, chance: random.Random, checkpoint: dict):
        self.chance, self.asked = chance, []
        rollout = Rollout(prompts_per_step=PROMPTS, group_size=GROUP, max_resampling_rounds=rounds)
        config = SimpleNamespace(rollout=rollout, run=Run(steps=STEPS, seed=1), reward=Reward())
        stop = SimpleNamespace(check=self.fail)
        self.collector = Collector(config, {}, SimpleNamespace(is_main=False, rank=1, world_size=1), stop)
        self.collector.runtime = SimpleNamespace(is_main=True)
        self.collector._log = RolloutLog(folder / "rollouts", {})
        self.collector._stream = stream(folder)
        self.collector._fleet, self.collector._rewards = self, FakeRewards(self.score)
        self.step, self.ledger = checkpoint["step"], Ledger(**checkpoint["ledger"])
        self.collector.load_state_dict(checkpoint["stream"])

    def fail(self, *faults: type[BaseException]) -> None:
        if fault := self.chance.choice([*[None] * 12, *(faults or (EngineError, Stopped, Killed))]):
            raise fault("now")

    def generate(self, prompts, group_size, *, seed, on_progress):
        self.asked += [prompt.id for prompt in prompts]
        on_progress(0, 1)
        return [[Sample(prompt, (1,), (-1.0,), "stop", self.step, prompt.id)] * group_size for prompt in prompts]

    def score(self, items, on_progress):
        on_progress(0, 1)
        return [float(i % 2 and hash_of(prompt.id) % 3 > 0) for i, (prompt, _) in enumerate(items)]

    def train(self, history: dict[int, tuple[list[str], list[str]]]) -> None:
        """One step; an engine that fails is asked again."""
        groups = "no batch yet"
        while isinstance(groups, str):
            self.asked = []
            groups = self.collector._attempt(self.step + 1, Phases(draw=False))
        if isinstance(groups, Stopped):
            raise groups
        step = self.step + 1
        assert not (step in history and self.asked), "sampled again although it is recorded"
        asked = self.asked or history[step][0]
        history[step] = asked, [group[0].prompt.id for group in groups.rollouts]
        self.fail(Killed)  # in training
        self.step = step
        self.ledger.count(groups)

    def checkpoint(self) -> dict:
        self.collector.forget(self.step)
        return json.loads(json.dumps({"step": self.step, "ledger": asdict(self.ledger), "stream": self.collector.state_dict()}))


def hash_of(prompt_id: str) -> int:
    return int(prompt_id) * 2654435761 % 2**32


def stream(folder) -> PromptStream:
    data = Data(prompts=str(folder / "rows.jsonl"))
    return PromptStream(data, TOKENIZER, 1, max_response_tokens=4, max_model_len=64)


def run(folder, rounds: int, chance: random.Random) -> tuple[dict, Ledger]:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"id": i, "prompt": "x", "answer": "1"}) + "\n" for i in range(ROWS)))
    checkpoint = {"step": 0, "ledger": {}, "stream": stream(folder).state_dict()}
    history: dict[int, tuple[list[str], list[str]]] = {}
    process = Process(folder, rounds, chance, checkpoint)
    while process.step < STEPS:
        try:
            process.train(history)
        except Stopped:
            checkpoint = process.checkpoint()
            process = Process(folder, rounds, chance, checkpoint)
        except Killed:
            process = Process(folder, rounds, chance, checkpoint)
        else:
            if process.step % 4 == 0:
                checkpoint = process.checkpoint()
    return history, process.ledger


@pytest.mark.parametrize("rounds", [0, 2])
def test_every_prompt_goes_one_way_whatever_fails(tmp_path, rounds):
    undisturbed, ledger = run(tmp_path / "undisturbed", rounds, SimpleNamespace(choice=lambda faults: None))
    asked = [prompt for step in range(1, STEPS + 1) for prompt in undisturbed[step][0]]
    assert asked == [prompt.id for prompt in stream(tmp_path / "undisturbed").take(len(asked))]
    assert ledger.dispatched == len(asked) == ledger.trained + ledger.dropped_equal and ledger.trained == STEPS * PROMPTS
    assert (ledger.dropped_equal > 0) == (rounds > 0)
    for seed in range(12):
        assert run(tmp_path / str(seed), rounds, random.Random(seed)) == (undisturbed, ledger), seed
