"""The command line: output, ranks that print, exit codes, and no heavy import before an error."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo import cli
from tests.support.model_folder import write_weights

REPOSITORY = Path(__file__).parents[1]
CONFIG = "model:\n  path: model\ndata:\n  prompts: reasoning_gym:chain_sum\n"
# Replaces the modules that do the work by functions that print their arguments or raise.
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
modules = {"trainer.train": ["train"], "tools.convert": ["hf_to_megatron", "megatron_to_hf"]}
for name, functions in modules.items():
    module = types.ModuleType(f"megatron_espo.{name}")
    for function in functions:
        setattr(module, function, action)
    sys.modules[module.__name__] = module
sys.modules.setdefault("megatron_espo.megatron", types.ModuleType("megatron_espo.megatron"))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with run.yaml and a model folder that passes the checks."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    model = tmp_path / "model"
    model.mkdir()
    sizes = {
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
    }
    sizes |= {"vocab_size": 32, "max_position_embeddings": 4096}
    hf_config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
    (model / "config.json").write_text(json.dumps(hf_config))
    (model / "tokenizer.json").write_text("{}")
    write_weights(model, hf_config)
    return tmp_path


def run(folder, *command, **environment):
    """Run Python with the repository on its path and without inherited ranks."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    for name in {"RANK", "LOCAL_RANK", "WORLD_SIZE"} - set(environment):
        env.pop(name, None)
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=180, errors="replace"
    )


@pytest.mark.parametrize(
    "arguments, work",
    [
        (["train", "run.yaml", "run.steps=7"], [7]),
        (["convert", "to-megatron", "run.yaml", "out", "run.steps=7"], [7, "out"]),
        (["convert", "to-hf", "run.yaml", "checkpoint", "out"], [200, "checkpoint", "out"]),
    ],
)
def test_a_command_passes_the_configuration_on(folder, arguments, work):
    done = run(folder, "-c", RECORDER, "record", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == work


MISTAKES = {
    "absent.yaml": "error: absent.yaml: expected a YAML configuration file",
    "run.steps=0": "error: override 'run.steps=0': run.steps: expected integer >= 1, got 0",
    "model.path=gone": "error: override 'model.path=gone': model.path: expected a model folder",
    "data.prompts=gone.jsonl": "error: override 'data.prompts=gone.jsonl': data.prompts: ",
    # Three ranks.
    "megatron.tensor_model_parallel_size=2": "a multiple of 2, got 3; ",
    "megatron.pipeline_model_parallel_size=3": "expected a divisor of the model's 2 layers, got 3",
}


@pytest.mark.parametrize("argument, message", MISTAKES.items())
def test_user_errors_have_no_traceback_and_come_before_heavy_imports(folder, argument, message):
    # An import of one of these ends the process with another exit code.
    for name in ("torch", "megatron", "vllm", "transformers"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    arguments = [argument] if argument.endswith(".yaml") else ["run.yaml", argument]
    ranks = {"WORLD_SIZE": "3", "RANK": "0"} if "parallel" in argument else {}
    done = run(folder, "-m", "megatron_espo", "train", *arguments, **ranks)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "rank, local_rank, printed", [("0", "0", True), ("3", "3", False), ("8", "0", True)]
)
def test_one_rank_per_node_prints_an_error_of_all_ranks(folder, rank, local_rank, printed):
    ranks = {"WORLD_SIZE": "16", "RANK": rank, "LOCAL_RANK": local_rank}
    done = run(folder, "-m", "megatron_espo", "train", "run.yaml", "run.steps=0", **ranks)
    assert done.returncode == 2
    assert ("override 'run.steps=0'" in done.stderr) == printed


def test_a_rank_prints_its_own_error_during_the_work(folder):
    ranks = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}
    done = run(folder, "-c", RECORDER, "fail", "train", "run.yaml", **ranks)
    assert (done.returncode, done.stderr) == (2, "error on rank 3: rank 3 has no memory\n")


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "x", "RANK": "0"}])
def test_variables_of_another_launcher_are_explained(folder, environment):
    done = run(folder, "-m", "megatron_espo", "train", "run.yaml", **environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"WORLD_SIZE={environment['WORLD_SIZE']}" in done.stderr and "unset" in done.stderr


def test_open_files_are_raised_or_explained(folder):
    train = shlex.join([sys.executable, "-c", RECORDER, "record", "train", "run.yaml"])
    raised = run(folder, "-c", f"import os; os.system({f'ulimit -Sn 64; {train}'!r})")
    assert raised.stdout == "[200]\n", raised.stderr
    hard = run(folder, "-c", f"import os; os.system({f'ulimit -n 64; {train}'!r})")
    assert "ulimit -n: expected at least 256 open files, got 64" in hard.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        pytest.param(
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, marks=pytest.mark.slow
        ),
        pytest.param({"PYTHONIOENCODING": "latin-1"}, marks=pytest.mark.slow),
    ],
)
def test_a_terminal_without_utf_8(folder, environment):
    (folder / "größe").mkdir()
    arguments = ["report", "größe/Läufe \N{BOX DRAWINGS LIGHT HORIZONTAL}"]
    done = run(folder, "-m", "megatron_espo", *arguments, **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    text = r"print('\u2588')"
    prepared = f"from megatron_espo import cli; cli._prepare_process(); {text}"
    done = run(folder, "-c", prepared, **environment)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_prints_nothing(folder):
    done = run(folder, "-c", RECORDER, "interrupt", "train", "run.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_file_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    def refuse(args):
        raise OSError(errno.EROFS, "Read-only file system", "page.html")

    monkeypatch.setattr(cli, "_run", refuse)
    assert cli.main(["report", "run"]) == 2
    assert capsys.readouterr().err == "error: page.html: Read-only file system\n"
    with pytest.raises(OSError):
        cli.main(["train", "run.yaml"])


def test_train_help_prints_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "usage: megatron-espo train" in text
    assert "  algorithm.alpha  (number > 0; default 0.02)" in text and "  reward.workers  (" in text


def test_the_program_runs_under_torchrun(folder):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = run(folder, *torchrun, "-m", "megatron_espo", "train", "run.yaml", "run.steps=0")
    assert done.stderr.count("error: override 'run.steps=0': run.steps: ") == 1
    assert done.returncode != 0


def test_overrides_may_follow_options(capsys):
    parser = cli.build_parser()
    args = cli._parse(parser, ["plan", "run.yaml", "run.steps=1", "--gpus", "64", "run.seed=2"])
    assert args.overrides == ["run.steps=1", "run.seed=2"] and args.gpus == 64
    for wrong in (
        ["plan", "run.yaml", "--bogus"],
        ["plan", "run.yaml", "--gpus", "64", "steps"],
        ["doctor", "a=b"],
    ):
        with pytest.raises(SystemExit):
            cli._parse(parser, wrong)
        assert "unrecognized arguments" in capsys.readouterr().err
