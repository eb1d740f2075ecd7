"""Reading settings: values, overrides, and the place and key that every error names."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo.config import Config, load_config, render_reference
from megatron_espo.errors import InputError

REPOSITORY = Path(__file__).parents[1]
GOOD = """\
model:
  path: model
data:
  prompts: reasoning_gym:chain_sum
"""


def load(tmp_path, monkeypatch, text, overrides=()):
    """Load ``text`` as run.yaml from inside its folder: messages start with the file name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    return load_config("run.yaml", list(overrides))


def errors(tmp_path, monkeypatch, text, overrides=()):
    """Lines of the error that loading raises."""
    with pytest.raises(InputError) as caught:
        load(tmp_path, monkeypatch, text, overrides)
    return str(caught.value).splitlines()


def test_defaults_are_the_papers(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    optimizer, rollout, algorithm = config.optimizer, config.rollout, config.algorithm
    assert (optimizer.lr, optimizer.lr_decay_style) == (1e-6, "constant")
    assert (rollout.prompts_per_step, rollout.group_size, rollout.temperature) == (128, 8, 1.0)
    assert (algorithm.alpha, algorithm.quantiles, algorithm.objective) == (0.02, (0.8,), "espo")


def test_floats_in_all_notations(tmp_path, monkeypatch):
    for written in ("1e-6", "1E-6", "1.0e-06", "1.e-6", ".000001", "+1e-6", "0.1e-5"):
        text = GOOD + f"optimizer:\n  lr: {written}\n"
        optimizer = load(tmp_path, monkeypatch, text, [f"optimizer.adam_eps={written}"]).optimizer
        assert (optimizer.lr, optimizer.adam_eps) == pytest.approx((1e-6, 1e-6), rel=1e-12)


def test_plain_words_and_dates_stay_strings(tmp_path, monkeypatch):
    text = GOOD + "  system_prompt: 2024-01-02\nrun:\n  dir: no\n  steps: 1_000\n"
    config = load(tmp_path, monkeypatch, text)
    found = (config.run.dir, config.data.system_prompt, config.run.steps)
    assert found == ("no", "2024-01-02", 1000)


def test_overrides_replace_values_also_inside_a_mapping(tmp_path, monkeypatch):
    text = GOOD + "  task_args: {min_terms: 2, max_terms: 3}\nrun:\n  steps: 5\n"
    overrides = ["run.steps=6", "run.steps=7", "algorithm.quantiles=[0.5, 0.8]"]
    config = load(tmp_path, monkeypatch, text, [*overrides, "data.task_args.max_terms=9"])
    assert config.run.steps == 7 and config.algorithm.quantiles == (0.5, 0.8)
    assert config.data.task_args == {"min_terms": 2, "max_terms": 9}


def test_an_override_of_an_alias_leaves_its_anchor(tmp_path, monkeypatch):
    args = "{first: &shared {n: 1, m: 2}, second: *shared, third: {<<: *shared, m: 4}}"
    text = GOOD + f"  task_args: {args}\n"
    found = load(tmp_path, monkeypatch, text, ["data.task_args.first.n=3"]).data.task_args
    assert found == {
        "first": {"n": 3, "m": 2},
        "second": {"n": 1, "m": 2},
        "third": {"n": 1, "m": 4},
    }


def test_a_section_without_keys_keeps_its_defaults(tmp_path, monkeypatch):
    commented = load(tmp_path, monkeypatch, GOOD + "optimizer:\n  # lr: 1e-5\n")
    assert commented == load(tmp_path, monkeypatch, GOOD)


def test_json_and_pickle_round_trips(tmp_path, monkeypatch):
    overrides = ["algorithm.quantiles=[0.5, 0.8]", "optimizer.lr=3e-6"]
    config = load(tmp_path, monkeypatch, GOOD, overrides)
    assert Config.model_validate_json(config.model_dump_json()) == config
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and copy.origins == config.origins


def test_settings_are_frozen(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, monkeypatch, GOOD).optimizer.lr = 1.0


# More mistakes are in tests/support/bad_inputs.py.
# What is wrong: (lines after GOOD, or the whole file; start of the message; another part of it).
BAD_TEXTS = {
    "misspelt key of another section": (
        GOOD + "megatron:\n  grup_size: 4\n",
        "run.yaml:6: megatron.grup_size: unknown key",
        '"rollout.group_size"?',
    ),
    "key as section": (GOOD + "steps: 3\n", "run.yaml:5: steps: unknown section", '"run.steps"?'),
    "float for an integer": (
        GOOD + "run:\n  steps: 1e3\n",
        "run.yaml:6: run.steps: expected integer >= 1, got 1000.0",
        "",
    ),
    "yes for a bool": (
        GOOD + "run:\n  save_hf: yes\n",
        'run.yaml:6: run.save_hf: expected true or false, got "yes"',
        "",
    ),
    "octal": (
        GOOD + "run:\n  seed: 010\n",
        "run.yaml:6: run.seed: expected integer >= 0 and <= 2147483647",
        'got "010"',
    ),
    "not a number": (
        GOOD + "optimizer:\n  lr: .nan\n",
        "run.yaml:6: optimizer.lr: expected number > 0, got NaN",
        "",
    ),
    "number as a key": (
        GOOD + "reward:\n  terms: {1: 2}\n",
        "run.yaml:6: reward.terms[1]: expected a name as key",
        "",
    ),
    "true as a key": (
        GOOD + "algorithm:\n  objective_args: {true: 2}\n",
        "run.yaml:6: algorithm.objective_args[1]: expected a name as key",
        "",
    ),
    "solved prompts skipped for ever": (
        "model: {path: m}\ndata: {prompts: p.jsonl, skip_solved: 1000000}\n",
        "run.yaml:2: data.skip_solved: expected integer >= 0 and <= 100",
        "got 1000000",
    ),
    "section is a number": (
        GOOD + "optimizer: 3\n",
        "run.yaml:5: optimizer: expected a mapping of keys, got 3",
        "",
    ),
    "item of a list": (
        GOOD + "algorithm:\n  quantiles:\n  - 0.5\n  - x\n",
        'run.yaml:8: algorithm.quantiles[1]: expected number, got "x"',
        "",
    ),
    "quantiles out of order": (
        GOOD + "algorithm:\n  quantiles: [0.8, 0.5]\n",
        "run.yaml:6: algorithm.quantiles: expected ascending numbers",
        "got [0.8, 0.5]",
    ),
    "missing section": ("data: {prompts: a.jsonl}\n", "run.yaml:1: model: required", "with path"),
    "virtual stages without stages": (
        GOOD + "megatron:\n  virtual_pipeline_model_parallel_size: 2\n",
        "run.yaml:6: megatron.virtual_pipeline_model_parallel_size: expected null",
        "got 2",
    ),
    "full recomputation without a method": (
        GOOD + "megatron:\n  recompute_granularity: full\n  recompute_num_layers: 1\n",
        "run.yaml:5: megatron.recompute_method: expected a value",
        "got null",
    ),
    "a method without full recomputation": (
        GOOD + "megatron:\n  recompute_method: block\n",
        "run.yaml:6: megatron.recompute_method: expected null",
        'got "block"',
    ),
    "Dr. GRPO with other advantages": (
        GOOD + "algorithm:\n  objective: dr_grpo\n  advantage: rloo\n",
        "run.yaml:7: algorithm.advantage: expected dr_grpo",
        'got "rloo"',
    ),
    "a rollout mask at an unknown level": (
        GOOD + "algorithm:\n  rollout_mask: {response: [0.5, 2]}\n",
        "run.yaml:6: algorithm.rollout_mask: expected token, sequence or geometric with",
        'got {"response": [0.5, 2.0]}',
    ),
    "a rollout mask without the ratio 1": (
        GOOD + "algorithm:\n  rollout_mask: {token: [1.5, 2]}\n",
        "run.yaml:6: algorithm.rollout_mask: expected token, sequence or geometric with",
        'got {"token": [1.5, 2.0]}',
    ),
    "a rollout mask with one limit": (
        GOOD + "algorithm:\n  rollout_mask: {token: 5}\n",
        "run.yaml:6: algorithm.rollout_mask.token: expected list of numbers",
        "got 5",
    ),
    "a cap below the ratio 1": (
        GOOD + "algorithm:\n  rollout_correction_cap: 0.5\n",
        "run.yaml:6: algorithm.rollout_correction_cap: expected number >= 1",
        "got 0.5",
    ),
    "duplicate section": (GOOD + "data:\n", "run.yaml:5: data: expected once", "line 3"),
    "anchor in itself": ("a: &a [*a]\n", "run.yaml:1: not valid YAML", "recursion"),
}


@pytest.mark.parametrize("text, start, part", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_errors_in_the_file_name_line_and_key(tmp_path, monkeypatch, text, start, part):
    lines = errors(tmp_path, monkeypatch, text)
    assert [line for line in lines if line.startswith(start) and part in line], lines


BAD_OVERRIDES = {
    "optimizer.lr='1e-6'": "drop the quotes",
    "model.pth=1": 'unknown key; did you mean "model.path"?',
    "model.xyz=1": "known are path, tokenizer, dtype, exporter",
    "rolout.top_k=1": 'unknown section; did you mean "rollout"?',
    "run.steps": "expected section.key=value",
    "run..steps=1": "expected section.key=value",
    "data.prompts.x=1": "data.prompts is not a mapping, so x cannot be set in it",
}


def test_errors_in_an_override_name_the_override(tmp_path, monkeypatch):
    for override, message in BAD_OVERRIDES.items():
        (line,) = errors(tmp_path, monkeypatch, GOOD, [override])
        assert line.startswith(f"override '{override}': ") and message in line


def test_an_override_replaces_a_bad_value_and_its_place(tmp_path, monkeypatch):
    text = GOOD + "run:\n  steps: no\n  seed: 1\n"
    load(tmp_path, monkeypatch, text, ["run.steps=3"])
    (line,) = errors(tmp_path, monkeypatch, text, ["run.steps=3", "run.seed=-1"])
    assert line.startswith("override 'run.seed=-1': run.seed: ")
    text = GOOD + "algorithm:\n  quantiles:\n  - 0.5\n  - 0.8\n"
    (line,) = errors(tmp_path, monkeypatch, text, ["algorithm.quantiles=[0.1, x]"])
    assert line.startswith("override 'algorithm.quantiles=[0.1, x]': algorithm.quantiles[1]: ")


def test_one_error_lists_all_mistakes(tmp_path, monkeypatch):
    text = GOOD + "optimizer:\n  lr: -1\n  clip_gard: 1\nrollout:\n  top_p: 2\n  top_k: -3\n"
    places = [line.split(" ")[0] for line in errors(tmp_path, monkeypatch, text)]
    assert places == ["run.yaml:6:", "run.yaml:7:", "run.yaml:9:", "run.yaml:10:"]


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(InputError, match="Is a directory"):
        load_config(str(tmp_path), [])


def test_the_reference_describes_every_setting():
    text = render_reference()
    for section, outer in Config.model_fields.items():
        for key, field in outer.annotation.model_fields.items():
            assert f"  {section}.{key}  (" in text
            assert field.description, f"{section}.{key} has no description"
    assert "  optimizer.lr  (number > 0; default 1e-06)\n" in text
    assert "  model.path  (non-empty string; required)\n" in text
    assert "  rollout.max_model_len  (integer >= 2 or null; default null)\n" in text


def test_configuration_loads_without_heavy_imports(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    code = (
        "import sys; from megatron_espo.config import checks, load_config;"
        "checks.check_world_size(load_config('run.yaml', []), 1);"
        "heavy = ('torch', 'megatron.core', 'vllm', 'transformers', 'numpy');"
        "print([m for m in heavy if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_engine_argument_that_a_setting_owns_is_refused(tmp_path, monkeypatch):
    for argument, setting in (
        ("tensor_parallel_size: 2", "rollout.tensor_parallel_size"),
        ("tensor-parallel-size: 2", "rollout.tensor_parallel_size"),
        ("weight_transfer_config: x", "rollout.transport"),
        ("middleware: a.b", "leave it out"),
    ):
        (line,) = errors(tmp_path, monkeypatch, GOOD, [f"rollout.engine_args={{{argument}}}"])
        assert argument.partition(":")[0] in line and line.endswith(setting)


def test_other_engine_arguments_reach_the_command_line(tmp_path, monkeypatch):
    from megatron_espo.rollout.server import EngineConfig, server_command

    given = "kv_cache_memory_bytes: 268435456, enable-prefix-caching: false, async_scheduling: true"
    overrides = [
        f"rollout.engine_args={{{given}}}",
        "rollout.engine_args.compilation_config={level: 0}",
        "rollout.engine_args.disable_log_stats=false",
    ]
    args = load(tmp_path, monkeypatch, GOOD, overrides).rollout.engine_args
    engine = EngineConfig("model", str(tmp_path), "float32", "files", engine_args=args)
    command = server_command(engine, ["--uds", "socket"])
    assert command.count("--kv-cache-memory-bytes") == 1, "it replaces this project's value"
    assert command[command.index("--kv-cache-memory-bytes") + 1] == "268435456"
    assert command[command.index("--compilation-config") + 1] == '{"level": 0}'
    assert "--no-enable-prefix-caching" in command and "--async-scheduling" in command
    absent = {"--enable-prefix-caching", "--disable-log-stats", "--no-disable-log-stats"}
    assert not absent & set(command)
