"""Whatever fails and however often, every prompt is dispatched, and trained or dropped, exactly once, in the stream's order."""

import json
import random
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from megatron_espo.collect import Collector
from megatron_espo.config import Data, Reward, Rollout, Run
from megatron_espo.data import PromptStream
from megatron_espo.ledger import Ledger
from megatron_espo.progress import Phases
from megatron_espo.rollout import EngineError, Enough
from megatron_espo.rollout_log import RolloutLog
from megatron_espo.sampling import Sampler
from megatron_espo.stopping import Stopped
from megatron_espo.types import Prompt
from megatron_espo.types import Rollout as Sample
from tests.test_dynamic_sampling import FakeRewards

STEPS, PROMPTS, ROWS, GROUP, CARRIED = 12, 3, 17, 2, 2
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

    def __init__(self, folder, way: dict, chance: random.Random, checkpoint: dict):
        self.chance, self.asked = chance, []
        rollout = Rollout(prompts_per_step=PROMPTS, group_size=GROUP, max_carried_steps=CARRIED, **way)
        config = SimpleNamespace(rollout=rollout, run=Run(steps=STEPS, seed=1), reward=Reward())
        stop = SimpleNamespace(check=self.fail)
        self.collector = Collector(config, {}, SimpleNamespace(is_main=False, rank=1, world_size=1), stop)
        self.collector.runtime = SimpleNamespace(is_main=True)
        self.collector._log = RolloutLog(folder / "rollouts", {})
        self.collector._stream = stream(folder)
        self.collector._sampler = Sampler(config, self.collector._stream, self, FakeRewards(self.score), self.collector._polling)
        self.step, self.ledger = checkpoint["step"], Ledger(**checkpoint["ledger"])
        self.collector.load_state_dict(checkpoint["stream"], self.step)

    def fail(self, *faults: type[BaseException]) -> None:
        if fault := self.chance.choice([*[None] * 12, *(faults or (EngineError, Stopped, Killed))]):
            raise fault("now")

    def generate(self, prompts, group_size, *, seed, on_progress, begun=(), enough=None):
        self.asked += [prompt.id for prompt in prompts[len(begun) :]]
        on_progress(0, 1)
        return token_by_token(prompts, group_size, begun, enough, self.step)

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
        for i, group in enumerate(groups.rollouts):
            for j, sample in enumerate(group):
                assert sample.response_ids == tuple(range(length_of(sample.prompt, j))), (i, j, sample)
                assert step - 1 - self.collector.config.rollout.oldest <= sample.policy_version < step
        self.fail(Killed)  # in training
        self.step = step
        self.ledger.count(groups)

    def checkpoint(self) -> dict:
        self.collector.forget(self.step)
        return json.loads(json.dumps({"step": self.step, "ledger": asdict(self.ledger), "stream": self.collector.state_dict()}))


def hash_of(prompt_id: str) -> int:
    return int(prompt_id) * 2654435761 % 2**32


def length_of(prompt: Prompt, position: int) -> int:
    return 1 + hash_of(prompt.id) // 7 % 40 * (1 + position) // 8


def token_by_token(prompts, group_size: int, begun, enough: Enough | None, version: int) -> list[list[Sample]]:
    """What an engine does: all responses grow together, token ``n`` is ``n``, until all of them are whole, or enough."""
    groups = [list(group) for group in begun] + [[Sample(p, (), (), "unfinished", version, "")] * group_size for p in prompts[len(begun) :]]

    def is_over() -> bool:
        whole = [not any(sample.unfinished for sample in group) for group in groups]
        return all(whole) if enough is None else sum(whole) >= enough.prompts and all(whole[: enough.first])

    while not is_over():
        for group in groups:
            for j, sample in enumerate(group):
                if sample.unfinished:
                    ids = (*sample.response_ids, len(sample.response_ids))
                    reason = "stop" if len(ids) == length_of(sample.prompt, j) else "unfinished"
                    group[j] = replace(sample, response_ids=ids, logprobs=(*sample.logprobs, -1.0), finish_reason=reason, text=sample.prompt.id)
    return groups


def stream(folder) -> PromptStream:
    data = Data(prompts=str(folder / "rows.jsonl"))
    return PromptStream(data, TOKENIZER, 1, max_response_tokens=4, max_model_len=64)


def run(folder, way: dict, chance: random.Random) -> tuple[dict, Ledger]:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"id": i, "prompt": "x", "answer": "1"}) + "\n" for i in range(ROWS)))
    checkpoint = {"step": 0, "ledger": {}, "stream": stream(folder).state_dict()}
    history: dict[int, tuple[list[str], list[str]]] = {}
    process = Process(folder, way, chance, checkpoint)
    while process.step < STEPS:
        try:
            process.train(history)
        except Stopped:
            checkpoint = process.checkpoint()
            process = Process(folder, way, chance, checkpoint)
        except Killed:
            process = Process(folder, way, chance, checkpoint)
        else:
            if process.step % 4 == 0:
                checkpoint = process.checkpoint()
    return history, process.ledger


WAYS = {"whole": {}, "resampling": {"max_resampling_rounds": 2}, "partial": {"extra_prompts": 2}}


@pytest.mark.parametrize("way", WAYS)
def test_every_prompt_goes_one_way_whatever_fails(tmp_path, way):
    undisturbed, ledger = run(tmp_path / "undisturbed", WAYS[way], SimpleNamespace(choice=lambda faults: None))
    asked, trained = ([prompt for step in range(1, STEPS + 1) for prompt in undisturbed[step][which]] for which in (0, 1))
    assert asked == [prompt.id for prompt in stream(tmp_path / "undisturbed").take(len(asked))]
    assert ledger.dispatched == len(asked) == ledger.trained + ledger.dropped_equal + ledger.in_flight and ledger.trained == STEPS * PROMPTS
    assert (ledger.dropped_equal > 0) == (way == "resampling") and ledger.in_flight == WAYS[way].get("extra_prompts", 0)
    if way == "partial":
        assert Counter(trained) <= Counter(asked) and trained != asked[: len(trained)]
        assert any(undisturbed[step][1][0] in undisturbed[step - CARRIED][0] for step in range(CARRIED + 1, STEPS + 1)), "none was carried far"
    for seed in range(12):
        assert run(tmp_path / str(seed), WAYS[way], random.Random(seed)) == (undisturbed, ledger), seed
