"""Mixtures of prompt sources, and filters by pass rate, against plain models of both."""

import itertools
import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_espo.cli import main
from megatron_espo.config import Data, load_config
from megatron_espo.config.tasks import METRIC_NAMES, Source
from megatron_espo.data import PromptStream
from megatron_espo.data.sources import read_rows
from megatron_espo.errors import InputError

TOKENIZER = SimpleNamespace(
    encode_prompt=lambda prompt: [int(prompt) + 1],
    render=lambda prompt: prompt,
    vocab_size=100,
    has_chat_template=False,
    eos_ids=frozenset({2}),
)
SIZES = {"a": 5, "b": 17, "c": 40, "d": 1}
WEIGHTS = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)
TAKES = st.lists(st.integers(0, 12), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files with equal ids and prompts; the pass rate of row i is i % 4 / 4, or unknown."""
    folder = tmp_path_factory.mktemp("sources")
    for name, size in SIZES.items():
        rates = [i % 4 / 4 if i % 5 else None for i in range(size)]
        rows = [
            {"prompt": str(i), "answer": "1", "pass_rate": rate} for i, rate in enumerate(rates)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_stream(folder: Path, weights=(0.7, 0.2, 0.1, 0), rates=(), seed=1, **more) -> PromptStream:
    mixture = {
        name: {"prompts": str(folder / f"{name}.jsonl"), "weight": weight, "pass_rate": rates}
        for name, weight in zip(SIZES, weights, strict=True)
    }
    data = Data(mixture=mixture, **more)
    return PromptStream(data, TOKENIZER, seed, max_response_tokens=4, max_model_len=64)


def kept(size: int, rates) -> list[str]:
    """Texts of the rows that the filter keeps."""
    low, high = rates or (0, 1)
    return [str(i) for i in range(size) if i % 5 == 0 or low <= i % 4 / 4 <= high]


@settings(max_examples=80, deadline=None)
@given(weights=WEIGHTS, takes=TAKES, rates=st.sampled_from([(), (0.25, 0.5)]))
def test_every_batch_has_the_weights_and_every_epoch_each_row_once(folder, weights, takes, rates):
    stream, seen = make_stream(folder, weights, rates), {name: [] for name in SIZES}
    total = 0
    for n in takes:
        prompts = stream.take(n)
        counts, total = Counter(prompt.source for prompt in prompts), total + n
        assert len(prompts) == n
        for name, weight in zip(SIZES, weights, strict=True):
            share = Fraction(weight, sum(weights))
            seen[name] += [prompt.text for prompt in prompts if prompt.source == name]
            assert abs(counts[name] - share * n) < 1
            assert abs(len(seen[name]) - share * total) < 2, "the share holds over all batches"
    skipped = 0
    for (name, size), weight in zip(SIZES.items(), weights, strict=True):
        rows = sorted(kept(size, rates))
        for start in range(0, len(seen[name]), len(rows)):
            epoch = seen[name][start : start + len(rows)]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(rows)
        epochs_started = len(seen[name]) // len(rows) + 1
        skipped += (size - len(rows)) * epochs_started * bool(weight)
    assert stream.skipped == skipped


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, takes=TAKES, seed=st.integers(0, 99), epochs=st.integers(0, 3))
def test_a_stream_resumed_at_any_batch_is_the_same(folder, weights, takes, seed, epochs):
    """The state is read and written as JSON. Some prompts of each batch are solved."""

    def step(stream: PromptStream, number: int) -> list:
        prompts = stream.take(takes[number])
        for prompt in prompts:
            if random.Random(f"{seed} {number} {prompt.id}").random() < 0.4:
                stream.note_solved(prompt)
        return prompts

    stream = make_stream(folder, weights, skip_solved=epochs)
    states, batches = [], []
    for number in range(len(takes)):
        states.append(json.dumps(stream.state_dict()))
        batches.append(step(stream, number))
    middle = random.Random(seed).randrange(len(takes))
    resumed = make_stream(folder, weights, skip_solved=epochs)
    resumed.take(3)
    resumed.load_state_dict(json.loads(states[middle]))
    for number in range(middle, len(takes)):
        assert json.dumps(resumed.state_dict()) == states[number]
        assert step(resumed, number) == batches[number]
    assert resumed.skipped == stream.skipped
    some = list(itertools.chain(*batches))[:3]
    assert stream.find([prompt.id for prompt in some]) == some


@settings(max_examples=40, deadline=None)
@given(epochs=st.integers(1, 3), takes=TAKES, chance=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_solved_prompt_is_skipped_for_some_epochs(folder, epochs, takes, chance, seed):
    weights = (0, 1, 0, 0)
    endless = make_stream(folder, weights)  # without the filter
    stream, left, draw = make_stream(folder, weights, skip_solved=epochs), Counter(), 0
    passed = skipped = 0
    for n in takes:
        expected = []
        while len(expected) < n:
            (prompt,) = endless.take(1)
            passed += 1
            if left[prompt.id]:
                left[prompt.id] -= 1
                skipped += 1
            else:
                expected.append(prompt)
        assert stream.take(n) == expected
        for prompt in expected:
            draw += 1
            if random.Random(f"{seed} {draw}").random() < chance:
                stream.note_solved(prompt)
                left[prompt.id] = epochs
        assert stream.skipped == skipped
    assert passed == sum(takes) + skipped


def test_one_source_keeps_its_ids_and_order(folder):
    path = str(folder / "b.jsonl")
    single = PromptStream(
        Data(prompts=path), TOKENIZER, 1, max_response_tokens=4, max_model_len=64
    ).take(40)
    assert {prompt.source for prompt in single} == {""} and single[0].id.startswith("b:")
    mixed = make_stream(folder, (1, 1, 0, 0)).take(40)
    assert {prompt.id.partition("/")[0] for prompt in mixed} == {"a", "b"}
    assert len({prompt.id for prompt in mixed}) == 22 and mixed[0].source == "a"


def test_a_mixture_does_not_resume_with_other_sources(folder):
    state = make_stream(folder).state_dict()
    changes = [
        ({"weights": (0.7, 0.3, 0, 0)}, "sources changed"),
        ({"weights": (0.6, 0.3, 0.1, 0)}, "share changed .* expected 7/10, got 3/5"),
        ({"rates": (0, 0.5)}, "rows of .*a.jsonl changed"),
        ({"seed": 2}, "seed changed"),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            make_stream(folder, **change).load_state_dict(state)
    make_stream(folder, (7, 2, 1, 0)).load_state_dict(state)


ROWS = [{"q": str(i), "a": "1", "solved": {"rate": i / 10}, "level": i} for i in range(11)]


@pytest.mark.parametrize("more", [{}, {"level": "level"}], ids=["columns", "rows"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pass_rates_of_a_column(tmp_path, kind, more):
    path = tmp_path / f"p.{kind}"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = {"prompt": "q", "answer": "a", "pass_rate": "solved.rate", **more}
    data = Data(prompts=str(path), columns=columns, pass_rate=(0.2, 0.5), shuffle=False)
    stream = PromptStream(data, TOKENIZER, 1, max_response_tokens=4, max_model_len=64)
    prompts = stream.take(5)
    assert [prompt.text for prompt in prompts] == ["2", "3", "4", "5", "2"] and len(stream) == 4
    assert prompts[1].metadata == ({"level": 3} if more else {})
    assert stream.skipped == 14  # in two epochs
    assert read_rows(Source(prompts=str(path), columns=columns), 0)[3].metadata == {
        "pass_rate": 0.3,
        **({"level": 3} if more else {}),
    }
    with pytest.raises(InputError, match="pass_rate: expected a row in .*, got none of 11"):
        nothing = data.model_copy(update={"pass_rate": (0.31, 0.39)})
        PromptStream(nothing, TOKENIZER, 1, max_response_tokens=4, max_model_len=64)


@pytest.mark.parametrize("rate", [37.5, -0.1, float("nan"), "3/8", True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_values_that_are_no_pass_rates(tmp_path, kind, rate):
    rows = [{"prompt": "1", "answer": "1", "pass_rate": rate}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match=r"p.*1: pass_rate: expected 0 to 1, or null, got"):
        read_rows(Source(prompts=str(tmp_path / f"p.{kind}"), pass_rate=(0, 1)), 0)


MIXTURE = """\
model: {path: m}
data:
  mixture:
    math: {prompts: a.jsonl, weight: 0.7}
    code:
      prompts: b.parquet
      weight: 0.3
"""
BAD = {
    "weight: 0.3|weight: -1": "run.yaml:7: data.mixture.code.weight: expected number >= 0, got -1",
    "weight: 0.3|weight: x": 'run.yaml:7: data.mixture.code.weight: expected number >= 0, got "x"',
    "weight: 0.3|wieght: 1": "run.yaml:7: data.mixture.code.wieght: unknown key; "
    'did you mean "data.mixture.code.weight"?',
    "prompts: b.parquet|columns: {}": "run.yaml:5: data.mixture.code.prompts: required, but not "
    "given; expected non-empty string",
    "prompts: b.parquet|prompts: b.csv": "run.yaml:6: data.mixture.code.prompts: expected "
    '"reasoning_gym:<task>", a *.jsonl or a *.parquet file, got "b.csv"',
    "0.7}|0}\n    code2: 3": "run.yaml:5: data.mixture.code2: expected a mapping of keys with "
    "prompts, got 3",
    "code:|math:": "run.yaml:5: data.mixture.math: expected once, got it again (first in line 4)",
    "code:|mean:": "run.yaml:5: data.mixture.mean: expected letters, digits, _ and - as name",
    "mixture:|prompts: c.jsonl\n  mixture:": "run.yaml:3: data.prompts: expected none with "
    "data.mixture",
    "weight: 0.3|pass_rate: [0.9, 0.1]": "run.yaml:7: data.mixture.code.pass_rate: expected [low, "
    "high] with 0 <= low <= high <= 1, got [0.9, 0.1]",
    "weight: 0.3|pass_rate: [a, 1]": "run.yaml:7: data.mixture.code.pass_rate[0]: expected number, "
    'got "a"',
}


@pytest.mark.parametrize("change", BAD)
def test_errors_name_key_file_and_line(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    old, new = change.split("|")
    Path("run.yaml").write_text(MIXTURE.replace(old, new))
    with pytest.raises(InputError) as error:
        load_config("run.yaml")
    assert str(error.value).startswith(BAD[change]), error.value
    assert len(str(error.value).splitlines()) == 1


def test_weights_that_are_all_zero_and_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(MIXTURE)
    zero = ["data.mixture.math.weight=0", "data.mixture.code.weight=0"]
    for overrides, message in (
        (zero, "run.yaml:3: data.mixture: expected a source with a weight above 0, got "),
        (["data.mixture={}"], "data.prompts: expected a source of prompts, or data.mixture, got "),
        (["data.prompts=a.jsonl", "data.mixture={}", "data.pass_rate=[1]"], "data.pass_rate: "),
    ):
        with pytest.raises(InputError) as error:
            load_config("run.yaml", overrides)
        assert message in str(error.value)
    config = load_config("run.yaml", zero[:1])
    assert list(config.data.sources) == ["data.mixture.code"]


def test_a_missing_file_or_column_is_named_with_its_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_espo.config.checks.check_model", lambda config: None)
    monkeypatch.setattr("megatron_espo.config.checks.check_router", lambda config, spec: None)
    Path("run.yaml").write_text(MIXTURE)
    Path("a.jsonl").write_text(json.dumps({"prompt": "1", "answer": "1"}) + "\n")
    assert main(["train", "run.yaml"]) == 2
    assert "run.yaml:6: data.mixture.code.prompts: expected a readable" in capsys.readouterr().err
    parquet.write_table(pyarrow.table({"prompt": ["1"], "answer": ["1"]}), "b.parquet")
    assert main(["train", "run.yaml", "data.mixture.code.pass_rate=[0, 0.9]"]) == 2
    line = capsys.readouterr().err
    assert "run.yaml:5: data.mixture.code.columns: b.parquet: expected the columns prompt" in line
    assert "pass_rate, got prompt, answer" in line.replace(" and ", ", ")
    assert main(["train", "run.yaml", "data.mixture.code.columns={prompt: q}"]) == 2
    assert "code.columns={prompt: q}': data.mixture.code.columns: b.p" in capsys.readouterr().err


def test_an_evaluation_has_a_source_of_its_own_without_filters(folder, tmp_path, monkeypatch):
    from megatron_espo.rollout.evaluation import Evaluator

    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(MIXTURE)
    config = load_config("run.yaml")
    with pytest.raises(InputError, match="run.yaml.*: eval.prompts: expected prompts with data.m"):
        Evaluator(config, TOKENIZER, 64)
    overrides = [f"eval.prompts={folder / 'c.jsonl'}", "rollout.max_response_tokens=4"]
    prompts = Evaluator(load_config("run.yaml", overrides), TOKENIZER, 64).prompts
    assert [prompt.text for prompt in prompts] == [str(i) for i in range(40)]
    single = f"data: {{prompts: {folder / 'b.jsonl'}, pass_rate: [0.5, 1]}}"
    Path("run.yaml").write_text(f"model: {{path: m}}\n{single}\n")
    assert len(Evaluator(load_config("run.yaml", overrides[1:]), TOKENIZER, 64).prompts) == 17


def test_metric_names_are_no_names_of_sources():
    import torch

    from megatron_espo.monitoring.metrics import rollout_metrics
    from megatron_espo.types import Prompt, Trajectory
    from tests.support.trajectories import single_turn

    def group(source: str) -> list[Trajectory]:
        prompt = Prompt("p", "", "", (1,), {}, source)
        return [single_turn(prompt, (7,), (-1.0,), 0, "stop", "")] * 2

    nan = float("nan")
    rollouts = [group("math"), group("code"), group("math"), group("new")]
    rewards = torch.tensor([[1.0, 0.0], [1.0, nan], [0.0, 0.0], [nan, nan]])
    found = rollout_metrics(rollouts, rewards, torch.zeros(4, 2))
    assert (found["reward/math"], found["reward/code"]) == (0.25, 1.0)
    assert (found["rollout/share_math"], found["rollout/share_new"]) == (0.5, 0.25)
    fixed = {name for name in found if name.startswith("reward/")} - {"reward/math", "reward/code"}
    assert fixed == {f"reward/{name}" for name in METRIC_NAMES}
