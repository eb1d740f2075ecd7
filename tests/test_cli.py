"""The command line: what it prints, on which rank, what it returns, and that mistakes cost no heavy import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo import cli

REPOSITORY = Path(__file__).parents[1]
CONFIG = "model:\n  path: model\ndata:\n  prompts: reasoning_gym:chain_sum\n"
# Records what the command was asked to do; found before the package's own module of that name.
RECORDER = """
import json, sys, types
from megatron_espo import cli
from megatron_espo.errors import InputError

def record(*arguments):
    config, *rest = arguments
    print(json.dumps([config.run.steps, *rest]))

def fail(*arguments):
    raise InputError("rank 3 has no memory")

def interrupt(*arguments):
    raise KeyboardInterrupt

heavy = [name for name in ("torch", "megatron.core", "vllm") if name in sys.modules]
assert not heavy, heavy
action = {"record": record, "fail": fail, "interrupt": interrupt}[sys.argv[1]]
for name, functions in {"trainer": ["train"], "mcore.convert": ["hf_to_megatron", "megatron_to_hf"]}.items():
    module = types.ModuleType(f"megatron_espo.{name}")
    for function in functions:
        setattr(module, function, action)
    sys.modules[module.__name__] = module
sys.modules.setdefault("megatron_espo.mcore", types.ModuleType("megatron_espo.mcore"))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with run.yaml and a model folder that passes the checks."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}
    sizes |= {"vocab_size": 32, "max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes}))
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")  # no tensors
    return tmp_path


def run(folder, *command, **environment):
    """Run Python with the repository on its path; text output, no inherited ranks."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env = {**inherited, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments, work",
    [
        (["train", "run.yaml", "run.steps=7"], [7]),
        (["convert", "to-megatron", "run.yaml", "out", "run.steps=7"], [7, "out"]),
        (["convert", "to-hf", "run.yaml", "checkpoint", "out"], [200, "checkpoint", "out"]),
    ],
)
def test_a_command_hands_the_checked_configuration_on(folder, arguments, work):
    done = run(folder, "-c", RECORDER, "record", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == work


MISTAKES = {
    "file": (["absent.yaml"], {}, "error: absent.yaml: expected a YAML configuration file, found none"),
    "override": (
        ["run.yaml", "run.steps=0"],
        {},
        "error: override 'run.steps=0': run.steps: expected integer >= 1, got 0",
    ),
    "world size": (
        ["run.yaml", "megatron.tensor_model_parallel_size=2"],
        {"WORLD_SIZE": "3"},
        "error: override 'megatron.tensor_model_parallel_size=2': megatron.tensor_model_parallel_size: expected a "
        "world size that is TP x PP x CP x DP = 2 x 1 x 1 x DP, a multiple of 2, got 3; start 2 or 4 ranks",
    ),
    "model": (
        ["run.yaml", "model.path=gone"],
        {},
        "error: override 'model.path=gone': model.path: expected a model folder",
    ),
    "layout": (
        ["run.yaml", "megatron.pipeline_model_parallel_size=4"],
        {"WORLD_SIZE": "4"},
        "error: override 'megatron.pipeline_model_parallel_size=4': megatron.pipeline_model_parallel_size: expected a "
        "divisor of the model's 2 layers, got 4",
    ),
    "prompts": (
        ["run.yaml", "data.prompts=gone.jsonl"],
        {},
        "error: override 'data.prompts=gone.jsonl': data.prompts: ",
    ),
}


@pytest.mark.parametrize("arguments, environment, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_without_a_traceback_and_without_heavy_imports(folder, arguments, environment, message):
    # A heavy import of any of these ends the process with another code and a traceback.
    for name in ("torch", "megatron", "vllm", "transformers"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    done = run(folder, "-m", "megatron_espo", "train", *arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("rank, local_rank, told", [("0", "0", True), ("3", "3", False), ("8", "0", True)])
def test_a_mistake_that_every_rank_sees_is_told_once_a_node(folder, rank, local_rank, told):
    ranks = {"WORLD_SIZE": "16", "RANK": rank, "LOCAL_RANK": local_rank}
    done = run(folder, "-m", "megatron_espo.cli", "train", "run.yaml", "run.steps=0", **ranks)
    assert done.returncode == 2
    assert ("override 'run.steps=0'" in done.stderr) == told


def test_an_error_of_one_rank_during_the_work_is_never_lost(folder):
    done = run(folder, "-c", RECORDER, "fail", "train", "run.yaml", WORLD_SIZE="4", RANK="3", LOCAL_RANK="3")
    assert (done.returncode, done.stderr) == (2, "error on rank 3: rank 3 has no memory\n")


def test_an_interrupt_is_quiet(folder):
    done = run(folder, "-c", RECORDER, "interrupt", "train", "run.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_train_help_prints_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "usage: megatron-espo train" in text and "torchrun --nproc-per-node 8 -m megatron_espo train" in text
    assert "  algorithm.alpha  (number > 0; default 0.02)" in text and "  reward.workers  (" in text


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["trian"])
    assert end.value.code == 2 and "trian" in capsys.readouterr().err


def test_the_program_runs_under_torchrun(folder):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = run(folder, *torchrun, "-m", "megatron_espo", "train", "run.yaml", "run.steps=0")
    assert done.stderr.count("error: override 'run.steps=0': run.steps: expected integer >= 1, got 0") == 1
    assert done.returncode != 0


def test_overrides_may_follow_options(capsys):
    parser = cli.build_parser()
    args = cli._parse(parser, ["plan", "run.yaml", "run.steps=1", "--gpus", "64", "run.seed=2"])
    assert args.overrides == ["run.steps=1", "run.seed=2"] and args.gpus == 64
    for wrong in (["plan", "run.yaml", "--bogus"], ["plan", "run.yaml", "--gpus", "64", "steps"], ["doctor", "a=b"]):
        with pytest.raises(SystemExit):
            cli._parse(parser, wrong)
        assert "unrecognized arguments" in capsys.readouterr().err
