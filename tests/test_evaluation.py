"""avg@k, pass@k and intervals against counts by hand; a run and ``eval`` give equal numbers."""

import json
import math
from itertools import combinations, product
from types import SimpleNamespace
from unittest.mock import AsyncMock, MagicMock

import numpy as np
import pytest
import yaml

from megatron_espo import cli
from megatron_espo.files import read_jsonl
from megatron_espo.rollout import evaluation as evaluation_module
from megatron_espo.rollout.environments import SingleTurn
from megatron_espo.rollout.evaluation import (
    bootstrap_interval,
    evaluation_record,
    pass_at_k,
    render_table,
)
from megatron_espo.types import Prompt
from tests.support.documented import is_documented
from tests.support.tiny import save_tiny_model
from tests.support.trajectories import single_turn
from tests.test_end_to_end import run_training

NAN = math.nan


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-12
            )


def evaluation(rewards, length=3, finish_reason="stop") -> dict:
    prompts = [Prompt(f"p{i}", "?", "1", (1,)) for i in range(len(rewards))]
    rollouts = [
        [
            single_turn(p, (7,) * length, (-1.0,) * length, 0, finish_reason, "").with_reward(
                reward
            )
            for reward in row
        ]
        for p, row in zip(prompts, rewards, strict=True)
    ]
    return evaluation_record(rollouts)


def test_metrics_equal_those_counted_by_hand():
    found = evaluation([[1.0, 0.0, 0.3, 1.0], [None, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.5]])[
        "metrics"
    ]
    by_hand = {
        "avg@4": (2 + 0 + 4) / 12,
        "pass@1": 0.5,
        "pass@2": (5 / 6 + 0 + 1) / 3,
        "pass@4": 2 / 3,
    }
    for name, value in by_hand.items():
        assert found[f"eval/{name}"] == pytest.approx(value), name
        assert found[f"eval/{name}_low"] <= value <= found[f"eval/{name}_high"]
    assert found["eval/reward_mean"] == pytest.approx(6.8 / 11) and found["eval/failed"] == 1
    assert found["eval/length_mean"] == 3 and found["eval/truncated"] == 0
    names = {name for name in found if "@" in name and not name.endswith(("_low", "_high"))}
    assert names == {f"eval/{name}" for name in by_hand}


def test_other_numbers_of_samples():
    for n, ks in {1: [1], 6: [1, 2, 4, 6]}.items():
        names = evaluation([[0.0] * n])["metrics"]
        passed = [name for name in names if "pass@" in name and "_" not in name]
        assert passed == [f"eval/pass@{k}" for k in ks]
    nothing = evaluation([[None, None]], 9, "length")["metrics"]
    assert [nothing[f"eval/{name}"] for name in ("avg@2", "failed", "truncated")] == [0, 2, 1]
    assert "eval/reward_mean" not in nothing


@pytest.mark.parametrize("values", [[0, 0, 1], [0.25, 0.5, 1, 1]])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_is_that_of_all_resamples(values, confidence):
    """Few values: the test enumerates every resample."""
    means = [sum(drawn) / len(values) for drawn in product(values, repeat=len(values))]
    tail = (1 - confidence) / 2
    wanted = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    # Where the distribution jumps, the estimate may be one jump off.
    step = 1 / len(values) if values == [0, 0, 1] else 0.0626
    assert bootstrap_interval(values, confidence) == pytest.approx(wanted, abs=step + 1e-9)


def test_the_interval_is_scipys():
    stats = pytest.importorskip(
        "scipy.stats",
        reason="scipy is not installed: intervals are compared with enumeration and theory only",
    )
    values = np.random.default_rng(4).random(60).tolist()
    for confidence in (0.8, 0.95):
        options = {
            "n_resamples": 20000,
            "method": "percentile",
            "rng": np.random.default_rng(1),
            "vectorized": True,
        }
        theirs = stats.bootstrap(
            (values,), np.mean, confidence_level=confidence, **options
        ).confidence_interval
        assert bootstrap_interval(values, confidence) == pytest.approx(tuple(theirs), abs=0.004)


def test_the_table_names_each_metric_once():
    text = render_table(evaluation([[1.0, 0.0]]))
    assert text.splitlines()[0] == "1 prompts, 95% bootstrap intervals over prompts"
    assert text.count("avg@2") == 1 and "0.5000   0.5000 – 0.5000" in text and "_low" not in text


def first_is_even(prompt, response: str) -> float:
    """A reward: 1 for an even digit at the start."""
    return float(response.strip()[:1] in tuple("02468"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    save_tiny_model(folder / "model")
    for name, size in (("train", 6), ("held_out", 5)):
        rows = [
            {"prompt": f"What is {i} + {size}?", "answer": str(i + size), "id": f"{name}-{i}"}
            for i in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"dir": str(folder / "run"), "steps": 2, "seed": 3},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "optimizer": {"lr": 0.003},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "max_response_tokens": 6,
            "timeout_s": 120,
            "engine_args": {"kv_cache_memory_bytes": 1 << 28},
        },
        "data": {"prompts": str(folder / "train.jsonl")},
        "reward": {"function": "tests.test_evaluation:first_is_even", "workers": 1},
        "eval": {
            "prompts": str(folder / "held_out.jsonl"),
            "every": 2,
            "samples": 4,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.slow
def test_the_engine_serves_the_weights_of_the_folder(folder, capsys):
    """Greedy responses of ``megatron-espo eval`` equal those of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = folder / "greedy.json"
    # A training layout of several ranks does not matter here.
    arguments = ["megatron.tensor_model_parallel_size=2", "eval.samples=1", "eval.temperature=0"]
    arguments += ["eval.max_prompts=3", "--out", str(out)]
    assert cli.main(["eval", str(folder / "run.yaml"), *arguments]) == 0
    record = json.loads(out.read_text())
    kinds = AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in kinds)
    rewards, lengths = [], []
    for i in range(3):
        ids = tokenizer(f"What is {i} + 5?", return_tensors="pt").input_ids
        with torch.no_grad():
            response = model.generate(
                ids, do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0
            )[0, ids.shape[1] :]
        rewards.append([first_is_even(None, tokenizer.decode(response, skip_special_tokens=True))])
        lengths.append([len(response)])
    prompts = record["prompts"]
    assert [prompt["id"] for prompt in prompts] == [f"held_out-{i}" for i in range(3)]
    assert [prompt["rewards"] for prompt in prompts] == rewards
    assert [prompt["lengths"] for prompt in prompts] == lengths
    assert record["metrics"]["eval/avg@1"] == np.mean(rewards)
    text = capsys.readouterr().out
    assert f"results: {out}" in text and "avg@1" in text


def test_the_results_survive_an_environment_that_does_not_close(tmp_path, monkeypatch):
    class Environment:
        async def close(self) -> None:
            raise OSError

    prompt = Prompt("p", "?", "1", (1,))
    rollouts = [[single_turn(prompt, (7,), (-1.0,), 0, "stop", "", reward=1.0)]]
    replaced = dict.fromkeys(
        ["VLLMEngine", "Scorer", "load_tokenizer", "engine_config"], MagicMock()
    )
    replaced["EnginePool"] = lambda *_: AsyncMock()
    replaced["load_environment"] = lambda *_: Environment()
    replaced["Evaluator"] = lambda *_: SimpleNamespace(
        run=lambda *_: rollouts, sampling=SimpleNamespace(as_json=dict)
    )
    replaced["Phases"] = lambda **_: SimpleNamespace(seconds={"eval": 1.0})
    for name, value in replaced.items():
        monkeypatch.setattr(evaluation_module, name, value)
    config = MagicMock()
    config.model.path = config.eval.prompts = "none"
    config.run.dir = str(tmp_path)
    evaluation_module.evaluate_model(config, None)
    assert json.loads((tmp_path / "eval.json").read_text())["metrics"]["eval/avg@1"] == 1


@pytest.mark.slow
def test_the_environment_is_closed(folder, monkeypatch):
    closed = []

    async def close(self) -> None:
        closed.append(True)

    monkeypatch.setattr(SingleTurn, "close", close, raising=False)
    assert cli.main(["eval", str(folder / "run.yaml"), "eval.samples=1"]) == 0
    assert closed == [True]


@pytest.mark.slow
def test_a_run_and_its_exported_model_have_equal_metrics(folder):
    """PP=2: the metrics after the last step equal ``megatron-espo eval`` of the exported model."""
    done = run_training(folder, "megatron.pipeline_model_parallel_size=2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_jsonl(folder / "run" / "metrics.jsonl")
    (record,) = read_jsonl(folder / "run" / "eval.jsonl")
    names = {name for line in lines for name in line if name != "step"}
    assert all(map(is_documented, names)), "not in docs/metrics.md"
    assert "eval/avg@4" not in lines[0] and "time/eval_s" in lines[1] and record["step"] == 2
    in_run = {name: value for name, value in lines[1].items() if name.startswith("eval/")}
    assert in_run == record["metrics"] and len(record["prompts"]) == 5
    out = folder / "after.json"
    arguments = [str(folder / "run.yaml"), f"model.path={folder / 'run' / 'hf'}"]
    assert cli.main(["eval", *arguments, "--out", str(out)]) == 0
    after = json.loads(out.read_text())
    assert after["prompts"] == record["prompts"] and after["metrics"] == in_run
    correct = [sum(reward >= 1 for reward in prompt["rewards"]) for prompt in record["prompts"]]
    assert 0 < sum(correct) < 20 and in_run["eval/avg@4"] == pytest.approx(sum(correct) / 20)
    check_samples(folder / "run", lines)


def check_samples(run, lines) -> None:
    """The entropies of the last pipeline stage reach rank 0. Their group means are the metrics."""
    trained = [sample for sample in read_jsonl(run / "samples.jsonl") if sample["entropies"]]
    fields = ("entropies", "groups", "tokens", "pieces")
    assert trained and all(len({len(s[field]) for field in fields}) == 1 for s in trained)
    for line, entropies in zip(lines, read_jsonl(run / "entropy.jsonl"), strict=True):
        width = entropies["highest"] / len(entropies["counts"][0])
        for group, counts in enumerate(entropies["counts"]):
            if sum(counts):
                mean = np.average((np.arange(len(counts)) + 0.5) * width, weights=counts)
                assert mean == pytest.approx(line[f"group{group}/entropy"], abs=width / 2)


MISTAKES = {
    "greedy": (["eval.temperature=0"], "eval.samples: expected 1 with temperature 0"),
    "source": (["eval.prompts=tests"], 'eval.prompts: expected "reasoning_gym:<task>"'),
    "file": (["eval.prompts=gone.jsonl"], "eval.prompts: expected a readable file"),
    "folder": (["--out", "."], "--out: expected a file, got the folder ."),
    "no training prompts": (["data.prompts=gone.jsonl", "--out", "."], "--out: expected a file"),
    "length": (["rollout.max_response_tokens=126"], "context 128 less"),
    "arguments": (
        ["eval.prompts=null", "eval.task_args={size: 3}"],
        "eval.task_args: expected none without eval.prompts",
    ),
}


@pytest.mark.parametrize("overrides, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_bad_settings(folder, capsys, overrides, message):
    assert cli.main(["eval", str(folder / "run.yaml"), *overrides]) == 2
    assert message in capsys.readouterr().err
