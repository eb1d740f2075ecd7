"""Prompt sources and the prompt stream, over real files and real reasoning-gym tasks."""

import datetime
import json
import os
import pickle
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import mistral_common
import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet

from megatron_espo.config import Data
from megatron_espo.config.tasks import Source
from megatron_espo.data import PromptStream, load_tokenizer, sources
from megatron_espo.data.reasoning_gym_task import create_task, generate_entries
from megatron_espo.data.sources import read_rows
from megatron_espo.errors import InputError
from megatron_espo.rewards.answers import MathJudge
from tests.test_tokenizer import write_hf_tokenizer

MISTRAL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def plain():
    return load_tokenizer(MISTRAL)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_tokenizer(write_hf_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def numbered(path: Path, n: int) -> Path:
    return write_jsonl(
        path, [{"id": i, "prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(n)]
    )


def stream(
    source,
    tokenizer,
    seed=0,
    *,
    task_args=None,
    system_prompt=None,
    shuffle=True,
    response=64,
    context=512,
    **settings,
):
    data = Data(
        prompts=str(source),
        task_args=task_args or {},
        system_prompt=system_prompt,
        shuffle=shuffle,
        **settings,
    )
    return PromptStream(data, tokenizer, seed, max_response_tokens=response, max_model_len=context)


def read(path, **settings):
    return read_rows(Source(prompts=str(path), **settings), 0)


def ids(prompts):
    return [prompt.id for prompt in prompts]


def test_every_epoch_covers_every_row_once_in_a_new_order(tmp_path, plain):
    prompts = stream(numbered(tmp_path / "p.jsonl", 50), plain)
    epochs = [ids(prompts.take(50)) for _ in range(4)]
    assert all(sorted(map(int, epoch)) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert prompts.state_dict()[""]["epoch"] == 4
    again = stream(tmp_path / "p.jsonl", plain)
    assert (
        ids(again.take(7) + again.take(130)) == sum(epochs, [])[:137]
    )  # however it is cut into takes
    assert ids(stream(tmp_path / "p.jsonl", plain, seed=1).take(50)) != epochs[0]
    ordered = stream(tmp_path / "p.jsonl", plain, shuffle=False)
    assert list(map(int, ids(ordered.take(100)))) == list(range(50)) * 2


@pytest.mark.parametrize("before", [0, 1, 19, 20, 21, 53])
def test_resumed_stream_equals_uninterrupted(tmp_path, plain, before):
    source = numbered(tmp_path / "p.jsonl", 20)
    uninterrupted = stream(source, plain)
    uninterrupted.take(before)
    state = json.loads(json.dumps(uninterrupted.state_dict()))
    resumed = stream(source, plain)
    resumed.take(3)
    resumed.load_state_dict(state)
    assert resumed.state_dict()[""]["epoch"] == before // 20
    assert resumed.take(45) == uninterrupted.take(45)


def test_resume_with_other_rows_or_order_raises(tmp_path, plain):
    state = stream(numbered(tmp_path / "p.jsonl", 5), plain).state_dict()
    with pytest.raises(InputError, match="rows of .*other.jsonl changed"):
        stream(numbered(tmp_path / "other.jsonl", 6), plain).load_state_dict(state)
    with pytest.raises(
        InputError, match="the seed changed since the checkpoint: expected 0, got 1"
    ):
        stream(tmp_path / "p.jsonl", plain, seed=1).load_state_dict(state)
    with pytest.raises(InputError, match="the shuffle changed"):
        stream(tmp_path / "p.jsonl", plain, shuffle=False).load_state_dict(state)


def test_text_messages_and_system_prompt(tmp_path, plain, chat):
    messages = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": "Hi", "answer": "a", "level": 3}, {"prompt": messages, "answer": "b"}]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    text, listed = stream(source, chat, system_prompt="Be brief.", shuffle=False).take(2)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    expected += "<|im_start|>assistant\n"
    assert text.text == listed.text == expected
    assert text.token_ids == listed.token_ids == tuple(chat.encode_prompt([
        {"role": "system", "content": "Be brief."}, *messages
    ]))  # fmt: skip
    assert (text.id, text.answer, text.metadata) == (
        "p:1",
        "a",
        {"level": 3},
    ) and listed.id == "p:2"

    source = write_jsonl(tmp_path / "text.jsonl", rows[:1])
    (prompt,) = stream(source, plain, system_prompt="Be brief.").take(1)
    assert prompt.text == "Be brief.\n\nHi" and prompt.token_ids == tuple(
        plain.encode_prompt("Be brief.\n\nHi")
    )
    with pytest.raises(InputError, match=r"p.jsonl:2: .*need a chat template"):
        stream(tmp_path / "p.jsonl", plain)
    own = [{"prompt": [{"role": "system", "content": "x"}, *messages], "answer": "b"}]
    with pytest.raises(InputError, match="own.jsonl:1: .*data.system_prompt is set; remove one"):
        stream(write_jsonl(tmp_path / "own.jsonl", own), chat, system_prompt="Be brief.")


def test_parquet_equals_jsonl(tmp_path):
    rows = [
        {"id": "a", "prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2", "level": 1},
        {
            "id": "b",
            "prompt": [{"role": "user", "content": "2 + 2?"}],
            "answer": "4",
            "level": None,
        },
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    from_parquet = read(tmp_path / "p.parquet")
    from_jsonl = read(write_jsonl(tmp_path / "p.jsonl", rows))
    strip = [(row.id, row.prompt, row.answer, row.metadata) for row in from_jsonl]
    assert [(row.id, row.prompt, row.answer, row.metadata) for row in from_parquet] == strip
    assert [row.where for row in from_parquet] == [
        f"{tmp_path}/p.parquet:row 1",
        f"{tmp_path}/p.parquet:row 2",
    ]

    parquet.write_table(
        pyarrow.table({"question": ["x"], "answer": ["1"]}), tmp_path / "columns.parquet"
    )
    with pytest.raises(
        InputError, match="expected the columns prompt and answer, got question, answer"
    ):
        read(tmp_path / "columns.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="broken.parquet: expected a Parquet file"):
        read(tmp_path / "broken.parquet")


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"prompt": "x", ', "expected one JSON object in UTF-8, got"),
        ("[" * 100_000, "expected one JSON object"),
        ("[1, 2]", "expected an object with prompt and answer, got list"),
        ({"prompt": "x"}, "answer: expected this key, got prompt"),
        ({"answer": "x"}, "prompt: expected this key, got answer"),
        ({"prompt": "x", "answer": True}, "answer: expected text or a number, got bool True"),
        ({"prompt": "x", "answer": None}, "answer: expected text or a number, got NoneType"),
        ('{"prompt": "x", "answer": NaN}', "answer: expected text or a number, got float nan"),
        ({"prompt": " ", "answer": "x"}, "prompt: expected text, got an empty one"),
        ({"prompt": 3, "answer": "x"}, "prompt: expected text or a list of messages, got int 3"),
        ({"prompt": [], "answer": "x"}, "prompt: expected text or a list of messages, got list"),
        (
            {"prompt": [{"role": "user"}], "answer": "x"},
            r"prompt: expected .role, content.* at \[0\]",
        ),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "answer": "x"},
            "expected the user's message last, got the assistant's",
        ),
        (
            {"prompt": "x", "answer": "x", "id": 1.5},
            "id: expected text or an integer, got float 1.5",
        ),
        ({"prompt": "x", "answer": "x", "id": "a"}, "id 'a' is already used by .*p.jsonl:1"),
        ('{"prompt": "\\ud800", "answer": "x"}', "lone surrogate"),
        ('{"prompt": "x", "answer": "x", "id": "\\ud800"}', "lone surrogate"),
    ],
)
def test_bad_row_raises(tmp_path, row, message):
    source = write_jsonl(
        tmp_path / "p.jsonl", [{"id": "a", "prompt": "good", "answer": "1"}, "", row]
    )
    with pytest.raises(InputError, match=f"^{tmp_path}/p.jsonl:3: .*{message}"):
        read(source)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "answer": 1}\r\n{"prompt": "b", "answer": -0}',
        '\ufeff{"prompt": "a", "answer": "1", "answer": "2"}',
        '{"prompt": "a", "answer": "1"}\n\n{"prompt": "b", "answer": "2"}',
        '{"prompt": "a", "answer": "1"} {"prompt": "b", "answer": "2"}\n\n',
        '{"prompt": "a",\n"answer": "1"}',
        '{"prompt": "2024-01-01", "answer": "2024-01-01"}',
        '{"prompt": "a", "answer": 12345678901234567890123}',
        '{"prompt": "a", "answer": 1e5}',
        '{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": "x"}',
        '{"prompt": "\\ud83d\\ude00\\u0000", "answer": "\\u00e9"}',
        '{"prompt": "\u3000", "answer": "1"}',
        '{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2", "level": 3}',
        '{"prompt": [{"role": "user", "content": "a", "name": null}], "answer": "1"}',
        '{"prompt": "a", "answer": "1"} // comment',
        '{"prompt": "a"}',
        '{"prompt": "a", "answer": "\x01"}',
    ],
)
def test_arrow_and_python_read_the_same_jsonl(tmp_path, monkeypatch, text):
    def outcome(name):
        (tmp_path / name / "p.jsonl").parent.mkdir()
        (tmp_path / name / "p.jsonl").write_text(text)
        monkeypatch.chdir(tmp_path / name)
        try:
            return list(read(Path("p.jsonl")))
        except InputError as error:
            return str(error)

    arrow = outcome("arrow")
    monkeypatch.setattr(sources, "_json_batch", lambda lines: None)
    sources._read_file.cache_clear()
    assert arrow == outcome("python")


USER = [{"role": "user", "content": "1 + 1?"}]


@pytest.mark.parametrize(
    "prompt",
    [
        USER,
        USER[0],
        json.dumps(USER),
        json.dumps(USER[0]),
        [{"from": "human", "value": "1 + 1?"}],
        [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}],
        [{"role": "user", "content": "1 + 1?", "name": None}],
    ],
)
def test_forms_of_messages(tmp_path, prompt):
    rows = [{"prompt": prompt, "answer": "2"}] * 2
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    assert [row.prompt for row in read(source)] == [USER] * 2
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert [row.prompt for row in read(tmp_path / "p.parquet")] == [USER] * 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (repr(USER), "messages as a list or as JSON"),
        (repr(np.array(USER, dtype=object)), "messages as a list or as JSON"),
        ([*USER, {"from": "gpt", "value": "2"}], "the user's message last, got the assistant's"),
        ([{"role": "system", "content": "Add."}], "the user's message last, got the system's"),
        ([{"role": "human", "content": "1 + 1?"}], "a role out of"),
        ([{"role": "user", "content": " "}], "text in the last message"),
        ([USER[0], {"role": "user", "content": " "}], "text in the last message"),
        ([{"role": "system\nuser", "content": "1 + 1?"}], "a role out of"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "text in both"),
        (["1 + 1?"], "text in both"),
    ],
)
def test_other_forms_of_messages_are_refused(tmp_path, prompt, message):
    rows = [{"prompt": USER, "answer": "2"}, {"prompt": prompt, "answer": "2"}]
    with pytest.raises(InputError, match=f"p.jsonl:2: prompt: expected .*{message}"):
        read(write_jsonl(tmp_path / "p.jsonl", rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows[1:]), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=f"p.parquet:row 1: prompt: expected .*{message}"):
        read(tmp_path / "p.parquet")


DAY = datetime.datetime(2024, 1, 1)


@pytest.mark.parametrize(
    "value",
    [
        DAY, DAY.date(), DAY.time(), datetime.timedelta(1), b"x", Decimal("1.5"), [DAY], [b"x"],
        {"a": [DAY]}, [{"bytes": b"x", "path": "a.png"}], pyarrow.array([DAY]).dictionary_encode(),
        pyarrow.array([b"ab"], pyarrow.binary(2)),
    ],
)  # fmt: skip
def test_columns_that_json_cannot_hold(tmp_path, value):
    column = value if isinstance(value, pyarrow.Array) else pyarrow.array([value])
    table = pyarrow.table({"prompt": ["1 + 1?"], "answer": ["2"], "more": column})
    parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(InputError, match="p.parquet: more: .*JSON .*data.columns"):
        read(tmp_path / "p.parquet")
    columns = {"prompt": "prompt", "answer": "answer"}
    assert read(tmp_path / "p.parquet", columns=columns)[0].answer == "2"


# Columns of public data sets as they are stored, and how docs/rewards.md maps them.
DATA_SETS = {
    "GSM8K": {"question": "1 + 1?", "answer": "We add <<1+1=2>>2.\n#### 2"},
    "DAPO-Math-17k": {
        "data_source": "math_dapo",
        "prompt": USER,
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "a"},
    },
    "MATH-500": {"problem": "1 + 1?", "solution": "It is $\\boxed{2}$.", "answer": "2", "level": 1},
    "AIME 2024": {"id": 60, "problem": "1 + 1?", "answer": 2, "url": "x"},
    "DeepMath-103K": {"question": "1 + 1?", "final_answer": "2", "difficulty": 1.5, "topic": "x"},
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_public_data_sets(tmp_path, name):
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    columns = yaml.safe_load(re.search(rf"\| {name} \| `(.*?)`", page)[1])
    rows = [DATA_SETS[name]] * 5
    sources = [write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "p.parquet"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), sources[1])
    for source in sources:
        found = read(source, columns=columns)
        question = found[0].prompt if isinstance(found[0].prompt, str) else USER[0]["content"]
        assert len(found) == 5 and question == "1 + 1?"
        assert MathJudge()(found[4].answer, "so \\boxed{2}")
        assert not MathJudge()(found[4].answer, "so \\boxed{1}")


def test_a_field_of_json_text(tmp_path):
    table = pyarrow.table({"prompt": [USER], "reward_model": ['{"ground_truth": "2"}']})
    parquet.write_table(table, tmp_path / "p.parquet")
    columns = {"prompt": "prompt", "answer": "reward_model.ground_truth"}
    assert read(tmp_path / "p.parquet", columns=columns)[0].answer == "2"


def test_invalid_utf8_raises_and_a_byte_order_mark_does_not(tmp_path):
    row = json.dumps({"prompt": "x", "answer": "1"}).encode()
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\xff\xfe\n")
    with pytest.raises(InputError, match="^[^\n]*p.jsonl:2: expected one JSON object in UTF-8"):
        read(tmp_path / "p.jsonl")


def test_braces_in_a_path_name_the_row(tmp_path):
    path = write_jsonl(tmp_path / "{a}.jsonl", [{"prompt": "p", "answer": "1"}, {"prompt": 1}])
    with pytest.raises(InputError, match=re.escape(f"{path}:2: ")):
        read(path)


def test_ten_problems_are_shown_and_all_are_counted(tmp_path):
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}] * 25)
    with pytest.raises(InputError, match="25 problems") as error:
        read(source)
    shown = [line for line in str(error.value).splitlines() if "answer: expected this key" in line]
    assert len(shown) == 10 and ":10: " in shown[-1] and "and 15 more" in str(error.value)


def test_bad_sources(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for source, args, message in [
        (tmp_path / "absent.jsonl", {}, "no such file: .*absent.jsonl"),
        (tmp_path / "empty.jsonl", {}, "expected at least one row"),
        (
            "reasoning_gym:chain_sun",
            {},
            "unknown reasoning-gym task 'chain_sun'; did you mean chain_sum",
        ),
        (
            "reasoning_gym:chain_sum",
            {"max_term": 3},
            "task_args.max_term: not an arg.*did you mean max_terms",
        ),
        ("reasoning_gym:chain_sum", {"max_terms": 1}, "refused .*max_terms must be >= min_terms"),
    ]:
        with pytest.raises(InputError, match=message):
            read(source, task_args=args)


def test_prompt_longer_than_the_context_raises(tmp_path, plain):
    rows = [{"prompt": "x", "answer": "1"}, {"prompt": "word " * 50, "answer": "1"}]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    count = len(plain.encode_prompt(rows[1]["prompt"]))
    stream(source, plain, response=64, context=64 + count)
    with pytest.raises(
        InputError, match=rf"p.jsonl:2: expected at most {count - 1} prompt tokens.*got {count}"
    ):
        stream(source, plain, response=64, context=63 + count)


def test_token_ids_outside_the_vocabulary_raise(tmp_path, plain):
    small = SimpleNamespace(
        vocab_size=100,
        has_chat_template=False,
        encode_prompt=plain.encode_prompt,
        render=plain.render,
    )
    with pytest.raises(
        InputError, match="p.jsonl:1: expected token ids below 100, the model's vocab_size, got id"
    ):
        stream(numbered(tmp_path / "p.jsonl", 1), small)


def test_reasoning_gym_rows_are_the_tasks_own(plain):
    args = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2, "size": 12}
    prompts = stream("reasoning_gym:chain_sum", plain, seed=5, task_args=args, shuffle=False).take(
        12
    )
    task = create_task("chain_sum", args | {"seed": 5})
    for index, prompt in enumerate(pickle.loads(pickle.dumps(prompts))):
        source = prompt.metadata["reasoning_gym"]
        assert source["entry"] == task[index] and prompt.answer == task[index]["answer"]
        assert prompt.id == f"chain_sum-{index}" and prompt.text == task[index]["question"]
    other = stream("reasoning_gym:chain_sum", plain, seed=6, task_args=args, shuffle=False).take(12)
    assert [p.text for p in other] != [p.text for p in prompts]
    own_seed = stream(
        "reasoning_gym:chain_sum", plain, seed=6, task_args=args | {"seed": 5}, shuffle=False
    ).take(12)
    assert [p.text for p in own_seed] == [p.text for p in prompts]


def test_hash_dependent_tasks_give_the_same_rows_in_every_process():
    args = {"seed": 3, "size": 5}
    script = (
        "import hashlib; from megatron_espo.data.reasoning_gym_task import generate_entries;"
        f"print(hashlib.sha256(repr(generate_entries('ransom_note', {args})).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_composite_task_mixes_tasks():
    specs = [{"name": name, "weight": 1.0, "config": {}} for name in ("chain_sum", "leg_counting")]
    entries = generate_entries("composite", {"seed": 0, "size": 12, "datasets": specs})
    assert {entry["metadata"]["source_dataset"] for entry in entries} == {
        "chain_sum",
        "leg_counting",
    }


def test_columns_are_named_in_the_settings(tmp_path, plain):
    rows = [
        {"question": "1 + 1?", "reward_model": {"ground_truth": 2}, "level": 1, "when": "x"},
        {"question": "1 + 2?", "reward_model": {"ground_truth": 3.5}, "level": None, "when": "y"},
    ]
    table = pyarrow.Table.from_pylist(rows)
    table = table.set_column(3, "when", pyarrow.array([0, 1], pyarrow.timestamp("s")))
    parquet.write_table(table, tmp_path / "p.parquet")
    columns = {"prompt": "question", "answer": "reward_model.ground_truth", "level": "level"}
    found = read(tmp_path / "p.parquet", columns=columns)
    expected = [("1 + 1?", "2.0", {"level": 1}), ("1 + 2?", "3.5", {"level": None})]
    assert [(row.prompt, row.answer, row.metadata) for row in found] == expected
    source = write_jsonl(tmp_path / "p.jsonl", [row | {"when": "z"} for row in rows])
    prompts = stream(source, plain, columns=columns, shuffle=False).take(2)
    assert [prompt.answer for prompt in prompts] == ["2", "3.5"]

    with pytest.raises(InputError, match="p.parquet: expected the columns prompt and answer, got"):
        read(tmp_path / "p.parquet")
    whole = {"prompt": "question", "answer": "reward_model.ground_truth", "when": "when"}
    with pytest.raises(
        InputError, match=r"p.parquet: when: expected values that JSON can hold, got timestamp"
    ):
        read(tmp_path / "p.parquet", columns=whole)


def test_rendered_prompts_are_refused_unless_they_are_raw(tmp_path, chat):
    text = chat.render([{"role": "user", "content": "Hi"}])
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text, "answer": "a"}])
    with pytest.raises(InputError, match="p.jsonl:1: .*set data.raw to true"):
        stream(source, chat)
    (prompt,) = stream(source, chat, raw=True).take(1)
    assert prompt.text == text
    assert list(prompt.token_ids) == chat.encode_prompt([{"role": "user", "content": "Hi"}])
    listed = [{"prompt": [{"role": "user", "content": "Hi"}], "answer": "a"}]
    with pytest.raises(InputError, match="expected text with data.raw, got messages"):
        stream(write_jsonl(tmp_path / "listed.jsonl", listed), chat, raw=True)


def test_arguments_reach_the_chat_template(tmp_path):
    template = "{{ messages[0].content }}{% if enable_thinking is false %}<no>{% endif %}"
    folder = write_hf_tokenizer(tmp_path, template)
    messages = [{"role": "user", "content": "Hi"}]
    assert load_tokenizer(folder).render(messages) == "Hi"
    without = load_tokenizer(folder, template_args={"enable_thinking": False})
    assert without.render(messages) == "Hi<no>"
    with pytest.raises(InputError, match="no enable_thinkin$"):
        load_tokenizer(folder, template_args={"enable_thinkin": False})


def test_of_a_large_source_only_long_rows_are_tokenized_at_the_start(tmp_path, chat, monkeypatch):
    monkeypatch.setattr("megatron_espo.data.prompts._TOKENIZE_ALL_UP_TO", 10)
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i)} for i in range(200)]
    rows[150]["prompt"] = "long " * 200
    rows += [{"prompt": [{"role": "user", "content": "Hi"}], "answer": "x"}] * 3
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    counted, encode = [], chat.encode_prompt
    monkeypatch.setattr(chat, "encode_prompt", lambda p: counted.append(p) or encode(p))
    with pytest.raises(InputError, match="^[^\n]*p.jsonl:151: expected at most 236 prompt tokens"):
        stream(source, chat, response=20, context=256)
    assert 1 < len(counted) < 5


def test_repeated_prompts_are_counted(tmp_path, caplog):
    rows = [{"prompt": f"{i % 3}?", "answer": "1"} for i in range(10)]
    read(write_jsonl(tmp_path / "p.jsonl", rows))
    assert "7 of 10 rows repeat the prompt of another row" in caplog.text
