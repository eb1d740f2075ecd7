"""Every mistake in a configuration is told with its place, before anything heavy is imported."""

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
    """Load ``text`` as run.yaml from inside its folder, so that messages start with the bare file name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    return load_config("run.yaml", list(overrides))


def refusal(tmp_path, monkeypatch, text, overrides=()):
    with pytest.raises(InputError) as caught:
        load(tmp_path, monkeypatch, text, overrides)
    return str(caught.value).splitlines()


def test_defaults_are_the_papers(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    assert (config.optimizer.lr, config.optimizer.lr_decay_style) == (1e-6, "constant")
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.rollout.temperature) == (128, 8, 1.0)
    assert (config.algorithm.alpha, config.algorithm.quantiles, config.algorithm.objective) == (0.02, (0.8,), "espo")


@pytest.mark.parametrize("written", ["1e-6", "1E-6", "1.0e-06", "1.e-6", ".000001", "+1e-6", "0.1e-5"])
def test_floats_are_read_as_papers_print_them(tmp_path, monkeypatch, written):
    config = load(tmp_path, monkeypatch, GOOD + f"optimizer:\n  lr: {written}\n", [f"optimizer.adam_eps={written}"])
    assert config.optimizer.lr == pytest.approx(1e-6, rel=1e-12)
    assert config.optimizer.adam_eps == pytest.approx(1e-6, rel=1e-12)


def test_plain_words_and_dates_stay_strings(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD + "run:\n  dir: no\n  name: 2024-01-02\n  steps: 1_000\n")
    assert (config.run.dir, config.run.name, config.run.steps) == ("no", "2024-01-02", 1000)


def test_overrides_win_and_a_nested_one_reaches_into_a_mapping(tmp_path, monkeypatch):
    text = GOOD + "  task_args: {min_terms: 2, max_terms: 3}\nrun:\n  steps: 5\n"
    overrides = ["run.steps=6", "run.steps=7", "algorithm.quantiles=[0.5, 0.8]", "data.task_args.max_terms=9"]
    config = load(tmp_path, monkeypatch, text, overrides)
    assert config.run.steps == 7
    assert config.algorithm.quantiles == (0.5, 0.8)
    assert config.data.task_args == {"min_terms": 2, "max_terms": 9}


def test_an_override_of_one_alias_leaves_the_other(tmp_path, monkeypatch):
    text = GOOD + "  task_args: {first: &shared {n: 1, m: 2}, second: *shared, third: {<<: *shared, m: 4}}\n"
    config = load(tmp_path, monkeypatch, text, ["data.task_args.first.n=3"])
    assert config.data.task_args == {"first": {"n": 3, "m": 2}, "second": {"n": 1, "m": 2}, "third": {"n": 1, "m": 4}}


def test_a_section_without_keys_keeps_its_defaults(tmp_path, monkeypatch):
    assert load(tmp_path, monkeypatch, GOOD + "optimizer:\n  # lr: 1e-5\n") == load(tmp_path, monkeypatch, GOOD)


def test_json_and_pickle_bring_the_same_configuration_back(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD, ["algorithm.quantiles=[0.5, 0.8]", "optimizer.lr=3e-6"])
    assert Config.model_validate_json(config.model_dump_json()) == config
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and copy.origins == config.origins


def test_settings_are_frozen(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, monkeypatch, GOOD).optimizer.lr = 1.0


BAD_TEXTS = {
    "misspelt key": (
        GOOD + "optimizer:\n  learning: 3\n  weigth_decay: 0.1\n",
        'run.yaml:7: optimizer.weigth_decay: unknown key; did you mean "optimizer.weight_decay"?',
    ),
    "key of another section": (
        GOOD + "megatron:\n  group_size: 4\n",
        'run.yaml:6: megatron.group_size: unknown key; did you mean "rollout.group_size"?',
    ),
    "misspelt key of another section": (
        GOOD + "megatron:\n  grup_size: 4\n",
        'run.yaml:6: megatron.grup_size: unknown key; did you mean "rollout.group_size"?',
    ),
    "unknown section": (
        GOOD + "algoritm:\n  alpha: 1\n",
        'run.yaml:5: algoritm: unknown section; did you mean "algorithm"?',
    ),
    "key as section": (GOOD + "steps: 3\n", 'run.yaml:5: steps: unknown section; did you mean "run.steps"?'),
    "quoted number": (
        GOOD + 'optimizer:\n  lr: "1e-6"\n',
        'run.yaml:6: optimizer.lr: expected number > 0, got "1e-6" (a string); drop the quotes',
    ),
    "number for a string": (
        GOOD + "run:\n  name: 2024\n",
        "run.yaml:6: run.name: expected string or null, got 2024; put it in quotes",
    ),
    "float for an integer": (GOOD + "run:\n  steps: 1e3\n", "run.yaml:6: run.steps: expected integer >= 1, got 1000.0"),
    "yes for a bool": (GOOD + "run:\n  save_hf: yes\n", 'run.yaml:6: run.save_hf: expected true or false, got "yes"'),
    "octal": (GOOD + "run:\n  seed: 010\n", 'run.yaml:6: run.seed: expected integer >= 0 and <= 2147483647, got "010"'),
    "not a number": (GOOD + "optimizer:\n  lr: .nan\n", "run.yaml:6: optimizer.lr: expected number > 0, got NaN"),
    "unknown choice": (
        GOOD + "model_:\nrollout:\n  transport: http\n",
        'run.yaml:7: rollout.transport: expected one of auto, files, ipc, nccl, nccl_m2n, sharded_rdt, got "http"',
    ),
    "section is a number": (
        GOOD + "optimizer: 3\n",
        "run.yaml:5: optimizer: expected a mapping of keys, got 3",
    ),
    "item of a list": (
        GOOD + "algorithm:\n  quantiles:\n  - 0.5\n  - x\n",
        'run.yaml:8: algorithm.quantiles[1]: expected number, got "x"',
    ),
    "quantiles out of order": (
        GOOD + "algorithm:\n  quantiles: [0.8, 0.5]\n",
        "run.yaml:6: algorithm.quantiles: expected ascending numbers between 0 and 1 (both excluded), got [0.8, 0.5]",
    ),
    "missing key": (
        "data: {prompts: a.jsonl}\nmodel: {}\n",
        "run.yaml:2: model.path: required, but not given; expected non-empty string",
    ),
    "missing section": (
        "data: {prompts: a.jsonl}\n",
        "run.yaml:1: model: required, but not given; expected a mapping of keys with path",
    ),
    "group size 1": (
        GOOD + "rollout:\n  group_size: 1\n",
        "run.yaml:6: rollout.group_size: expected integer >= 2, got 1; an advantage compares a prompt's "
        "responses, so a "
        "single one has none",
    ),
    "temperature 0": (
        GOOD + "rollout:\n  temperature: 0\n",
        "run.yaml:6: rollout.temperature: expected a temperature > 0 with group_size 8, got 0; greedy decoding gives "
        "identical responses, which have no advantage",
    ),
    "temperature that vLLM raises": (
        GOOD + "rollout:\n  temperature: 0.001\n",
        "run.yaml:6: rollout.temperature: expected at least 0.01 (vLLM silently raises anything lower to "
        "it), got 0.001",
    ),
    "top_p": (
        GOOD + "rollout:\n  top_p: 0.9\n",
        "run.yaml:6: rollout.top_p: expected 1.0 (off), got 0.9; set rollout.allow_truncated_sampling=true to accept "
        "biased importance ratios",
    ),
    "top_k": (
        GOOD + "rollout:\n  top_k: 5\n",
        "run.yaml:6: rollout.top_k: expected 0 or -1 (off), got 5; set rollout.allow_truncated_sampling=true to accept "
        "biased importance ratios",
    ),
    "response fills the engine's context": (
        GOOD + "rollout:\n  max_model_len: 512\n  max_response_tokens: 512\n",
        "run.yaml:7: rollout.max_response_tokens: expected less than rollout.max_model_len (512), which "
        "holds the prompt "
        "too, got 512",
    ),
    "sequence parallelism without TP": (
        GOOD + "megatron:\n  sequence_parallel: true\n",
        "run.yaml:6: megatron.sequence_parallel: expected false with tensor_model_parallel_size 1 (it shards "
        "over the TP "
        "ranks), got true; raise tensor_model_parallel_size or turn it off",
    ),
    "virtual stages without stages": (
        GOOD + "megatron:\n  virtual_pipeline_model_parallel_size: 2\n",
        "run.yaml:6: megatron.virtual_pipeline_model_parallel_size: expected null with "
        "pipeline_model_parallel_size 1, got 2",
    ),
    "full recomputation without a method": (
        GOOD + "megatron:\n  recompute_granularity: full\n  recompute_num_layers: 1\n",
        "run.yaml:5: megatron.recompute_method: expected a value with recompute_granularity full, got null",
    ),
    "a clip range that ESPO would not use": (
        GOOD + "algorithm:\n  clip_high: 0.2\n",
        "run.yaml:6: algorithm.clip_high: expected null with objective espo, which does not use it (only gspo, grpo, "
        "dr_grpo, dapo, cispo, gmpo), got 0.2",
    ),
    "a ratio that GRPO would square": (
        GOOD + "algorithm: {objective: grpo, ratio: segment_times_token}\n",
        "run.yaml:5: algorithm.ratio: expected segment with objective grpo, which does not use it (only espo, gspo), "
        "got segment_times_token",
    ),
    "Dr. GRPO with a standard deviation": (
        GOOD + "algorithm:\n  objective: dr_grpo\n  normalize_std: true\n",
        "run.yaml:7: algorithm.normalize_std: expected false with objective dr_grpo (it only centres rewards), "
        "got true",
    ),
    "mini-batches of unequal size": (
        GOOD + "algorithm:\n  num_mini_batches: 3\n",
        "run.yaml:6: algorithm.num_mini_batches: expected a divisor of rollout.prompts_per_step = "
        "128 (a mini-batch holds whole groups), got 3",
    ),
    "warm-up longer than the run": (
        GOOD + "optimizer:\n  lr_warmup_iters: 200\n",
        "run.yaml:6: optimizer.lr_warmup_iters: expected less than the run's optimizer steps (200), got 200",
    ),
    "prompts of unknown kind": (
        "model: {path: m}\ndata:\n  prompts: a.csv\n",
        'run.yaml:3: data.prompts: expected "reasoning_gym:<task>", a *.jsonl or a *.parquet file, got "a.csv"',
    ),
    "a task's verifier for a file": (
        "model: {path: m}\ndata: {prompts: a.jsonl}\nreward:\n  function: reasoning_gym\n",
        'run.yaml:4: reward.function: expected math_verify or "module:function" with data.prompts "a.jsonl", got '
        "reasoning_gym, whose verifiers need its own tasks",
    ),
    "duplicate key": (
        GOOD + "run:\n  steps: 1\n  seed: 1\n  steps: 2\n",
        "run.yaml:8: run.steps: expected once, got it again (first in line 6)",
    ),
    "duplicate section": (GOOD + "data:\n", "run.yaml:5: data: expected once, got it again (first in line 3)"),
    "not a mapping": (
        "- 1\n",
        "run.yaml:1: expected a mapping of sections (run, model, megatron, optimizer, algorithm, rollout, "
        "data, environment, reward, eval), "
        "got [1]",
    ),
    "empty file": ("# nothing\n", "run.yaml:1: the file is empty; model.path and data.prompts are required"),
    "not YAML": (GOOD + "run: a: b\n", "run.yaml:5: not valid YAML: mapping values are not allowed here; a value with : # [ or { in it needs quotes"),
    "anchor in itself": ("a: &a [*a]\n", "run.yaml:1: not valid here: an anchor that contains itself"),
}


@pytest.mark.parametrize("text, message", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_mistake_in_the_file_is_told_with_its_line(tmp_path, monkeypatch, text, message):
    assert message in refusal(tmp_path, monkeypatch, text)


BAD_OVERRIDES = {
    "optimizer.lr=fast": "override 'optimizer.lr=fast': optimizer.lr: expected number > 0, got \"fast\"",
    "optimizer.lr='1e-6'": "override 'optimizer.lr='1e-6'': optimizer.lr: expected number > 0, got \"1e-6\" (a "
    "string); drop the quotes",
    "model.pth=1": "override 'model.pth=1': model.pth: unknown key; did you mean \"model.path\"?",
    "model.xyz=1": "override 'model.xyz=1': model.xyz: unknown key; the keys of model are path, tokenizer, dtype, exporter",
    "rolout.top_k=1": "override 'rolout.top_k=1': rolout: unknown section; did you mean \"rollout\"?",
    "steps=3": "override 'steps=3': expected section.key=value, got no section; did you mean \"run.steps\"?",
    "run.steps": "override 'run.steps': expected section.key=value",
    "run..steps=1": "override 'run..steps=1': expected section.key=value",
    "run.name=[": "override 'run.name=[': not valid YAML: expected the node content, but found '<stream end>'"
    "; a value with : # [ or { in it needs quotes",
    "data.prompts.x=1": "override 'data.prompts.x=1': data.prompts is not a mapping, so x cannot be set in it",
}


@pytest.mark.parametrize("override, message", BAD_OVERRIDES.items(), ids=BAD_OVERRIDES.keys())
def test_a_mistake_in_an_override_names_the_override(tmp_path, monkeypatch, override, message):
    assert refusal(tmp_path, monkeypatch, GOOD, [override]) == [message]


def test_an_override_of_a_bad_line_mends_it_and_one_of_a_good_line_is_blamed_itself(tmp_path, monkeypatch):
    text = GOOD + "run:\n  steps: no\n  seed: 1\n"
    load(tmp_path, monkeypatch, text, ["run.steps=3"])
    text = GOOD + "algorithm:\n  quantiles:\n  - 0.5\n  - 0.8\n"
    assert refusal(tmp_path, monkeypatch, text, ["algorithm.quantiles=[0.1, x]"]) == [
        "override 'algorithm.quantiles=[0.1, x]': algorithm.quantiles[1]: expected number, got \"x\""
    ]
    assert refusal(tmp_path, monkeypatch, text, ["run.steps=3", "run.seed=-1"]) == [
        "override 'run.seed=-1': run.seed: expected integer >= 0 and <= 2147483647, got -1"
    ]


def test_all_mistakes_are_told_at_once(tmp_path, monkeypatch):
    text = GOOD + "optimizer:\n  lr: -1\n  clip_gard: 1\nrollout:\n  group_size: 1\n  top_k: 3\n"
    places = [line.split(" ")[0] for line in refusal(tmp_path, monkeypatch, text)]
    assert places == ["run.yaml:6:", "run.yaml:7:", "run.yaml:9:", "run.yaml:10:"]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.yaml: expected a YAML configuration file, found none"):
        load_config(str(tmp_path / "absent.yaml"), [])
    with pytest.raises(InputError, match="cannot read the configuration file: Is a directory"):
        load_config(str(tmp_path), [])
    (tmp_path / "latin1.yaml").write_bytes(b"run: {name: \xe9}")
    with pytest.raises(InputError, match="latin1.yaml:1: expected UTF-8 text, got byte 0xe9"):
        load_config(str(tmp_path / "latin1.yaml"), [])


def test_the_reference_names_every_setting_with_type_default_and_description():
    text = render_reference()
    for section, outer in Config.model_fields.items():
        for key, field in outer.annotation.model_fields.items():
            assert f"  {section}.{key}  (" in text
            assert field.description, f"{section}.{key} has no description"
    assert "  optimizer.lr  (number > 0; default 1e-06)\n" in text
    assert "  model.path  (non-empty string; required)\n" in text
    assert "  rollout.max_model_len  (integer >= 2 or null; default null)\n" in text


def test_configuration_loads_without_anything_heavy(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    code = (
        "import sys; from megatron_espo.config import load_config; load_config('run.yaml', []).validate_for(1);"
        "print([m for m in ('torch', 'megatron', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("rollout.extra_prompts=8", "rollout.over_sampling_prompts"),
        ("rollout.max_carried_steps=2", "rollout.max_staleness"),
        ("rollout.cpu_kv_cache_gib=0.5", "rollout.engine_args"),
        ("rollout.transport=shared_memory", "files"),
        ("rollout.transport=tcp", "files"),
        ("reward.overlap=true", "leave it out"),
    ],
)
def test_a_setting_of_an_older_release_names_its_replacement(tmp_path, monkeypatch, override, instead):
    (line,) = refusal(tmp_path, monkeypatch, GOOD, [override])
    assert line.startswith(f"override '{override}': {override.partition('=')[0]}: ") and instead in line


@pytest.mark.parametrize(
    ("argument", "setting"),
    [
        ("tensor_parallel_size: 2", "rollout.tensor_parallel_size"),
        ("tensor-parallel-size: 2", "rollout.tensor_parallel_size"),
        ("weight_transfer_config: x", "rollout.transport"),
        ("middleware: a.b", "leave it out"),
    ],
)
def test_an_engine_argument_that_a_setting_owns_is_refused(tmp_path, monkeypatch, argument, setting):
    (line,) = refusal(tmp_path, monkeypatch, GOOD, [f"rollout.engine_args={{{argument}}}"])
    assert argument.partition(":")[0] in line and line.endswith(setting)


def test_other_engine_arguments_reach_the_command_line(tmp_path, monkeypatch):
    from megatron_espo.rollout.server import EngineConfig, server_command

    overrides = [
        "rollout.engine_args={kv_cache_memory_bytes: 268435456, enable-prefix-caching: false, async_scheduling: true}",
        "rollout.engine_args.compilation_config={level: 0}",
        "rollout.engine_args.disable_log_stats=false",
    ]
    config = load(tmp_path, monkeypatch, GOOD, overrides)
    engine = EngineConfig("model", str(tmp_path), "float32", "files", engine_args=config.rollout.engine_args)
    command = server_command(engine, ["--uds", "socket"], is_cpu=True)
    assert command[command.index("--kv-cache-memory-bytes") + 1] == "268435456", "it replaces this project's value"
    assert command.count("--kv-cache-memory-bytes") == 1
    assert command[command.index("--compilation-config") + 1] == '{"level": 0}'
    assert "--no-enable-prefix-caching" in command and "--async-scheduling" in command
    assert not {"--enable-prefix-caching", "--disable-log-stats", "--no-disable-log-stats"} & set(command)
