"""README, CONTRIBUTING, CHANGELOG and docs/: links, settings, messages, commands and snippets."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import megatron_espo
from megatron_espo import cli
from megatron_espo.config import load_config
from megatron_espo.config.reference import sections
from megatron_espo.errors import InputError
from tests.support.distributed import ROOT
from tests.support.pages import PAGES, anchors, command_lines, links, prose, snippets
from tools.configuration_page import render_markdown

BASE = {"model": {"path": "model"}, "data": {"prompts": "prompts.jsonl"}}
# Other programs in commands, and the extra of setup.py that installs each.
OTHERS = {
    "tensorboard": "install_requires",
    "touch": "",
    "pip": "",
    "docker": "",
    "pre-commit": "dev",
}
# Commands that take minutes, and the test that runs each.
RUN_BY = {
    "bash examples/quickstart.sh": "test_tensorboard.py::test_every_documented_tag_has_data",
    "torchrun --nproc-per-node 4 examples/run_espo_70b.sh --rehearse": (
        "test_run_espo_70b.py::test_rehearsal_trains_and_writes_tensorboard"
    ),
    "python examples/existing_megatron_script.py": "test_existing_script.py::test_reward_rises",
    "megatron-espo parity": "test_parity.py::test_short_matrix_agrees",
    "megatron-espo report runs/mine": "test_report.py::test_the_command_prints_the_path",
    "sbatch examples/slurm/espo_colocated.sbatch": (
        "test_slurm.py::test_run_is_saved_requeued_and_finished"
    ),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page):
    dead = []
    for text, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
        if file.suffix == ".py" and text.startswith("`") and not text.strip("`").endswith(".py"):
            dead += [] if text.strip("`") in defined(file) else [f"{target} has no {text}"]
    assert dead == []


@cache
def defined(file: Path) -> frozenset[str]:
    """Functions, classes and constants of a module."""
    names = []
    for node in ast.parse(file.read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names += [node.name] if hasattr(node, "name") else []
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return frozenset(names)


def test_the_readme_fits_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_configuration_page_is_the_generated_one():
    assert (ROOT / "docs" / "configuration.md").read_text() == render_markdown(), (
        "bash tools/docs.sh writes it"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page):
    known = {f"{name}.{key}" for name, model in sections().items() for key in model.model_fields}
    text = prose(page)
    if page.name == "migration.md":  # the other columns have flags of other projects
        text = "\n".join(line.split(" | ")[0] for line in text.splitlines())
    named = re.findall(rf"`((?:{'|'.join(sections())})\.[a-z]\w*)(?=[`:=\s.])", text)
    wrong = {
        name
        for name in named
        if name not in known
        and not re.search(r"\.(yaml|json|jsonl|py|md|layers|embed_tokens|norm)$", name)
    }
    assert wrong == set()


@cache
def constants() -> str:
    """All string constants of the package, one per line."""
    nodes = [
        node
        for file in (ROOT / "megatron_espo").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_messages_in_headings_are_in_the_source():
    page = (ROOT / "docs" / "reliability.md").read_text()
    headings = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    pieces = [piece.strip() for heading in headings for piece in heading.split("...")]
    assert headings and [piece for piece in pieces if piece not in constants()] == []


def test_the_site_builds(tmp_path):
    for package in ("mkdocs", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stdout + done.stderr
    algorithm = (site / "algorithm.html").read_text()
    assert algorithm.count("<math") > 30 and "$$" not in algorithm
    api = (site / "api.html").read_text()
    public = set(megatron_espo.__all__) - {"__version__", "Config"}
    assert [
        name for name in public if not re.search(rf'id="megatron_espo[.\w]*\.{name}"', api)
    ] == []
    assert not re.search(r":(class|func|meth):", api)


def test_every_snippet_says_its_language():
    assert {
        str(snippet)
        for snippet in snippets()
        if snippet.language not in ("bash", "python", "yaml", "text")
    } == set()
    program = r"^    (megatron-espo|bash|python|torchrun|sbatch|srun) "
    assert [
        page.name
        for page in PAGES
        if page.name != "CHANGELOG.md" and re.search(program, prose(page), re.MULTILINE)
    ] == []


@pytest.mark.parametrize("snippet", snippets("yaml"), ids=str)
def test_settings_snippets_are_accepted(snippet, tmp_path):
    tree = BASE | yaml.safe_load(snippet.text)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    load_config(tmp_path / "run.yaml", [])


@pytest.mark.parametrize("snippet", snippets("bash"), ids=str)
def test_commands_are_accepted(snippet, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    for words in command_lines(snippet):
        check_command(words, tmp_path / "base.yaml")


def check_command(words: list[str], base: Path) -> None:
    """Check that the program and its options exist and that the settings are valid."""
    line = " ".join(words)
    if "-m" in words and words[words.index("-m") + 1].startswith("megatron_espo"):
        words = ["megatron-espo", *words[words.index("-m") + 2 :]]
    if words[0] == "megatron-espo":
        if words[-1] == "--help":
            return check_help(words[1:])
        args = cli._parse(cli.build_parser(), words[1:])
        settings = ROOT / (getattr(args, "config", None) or "")
        load_config(settings if settings.is_file() else base, getattr(args, "overrides", []))
        return
    script = next(
        (
            word
            for word in words
            if (ROOT / word).is_file() and re.search(r"\.(py|sh|sbatch)$", word)
        ),
        None,
    )
    if script is None:
        assert words[0] in OTHERS, f"{line}: no such program or script"
        extras = re.findall(r"\.\[(\w+)\]", line)
        assert all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras), line
        return
    assert words[0] in ("bash", "source", "python", "torchrun", "sbatch", "srun"), line
    arguments = words[words.index(script) + 1 :]
    # A template passes its arguments to the program, tools/test.sh to pytest.
    source = "\n".join(
        path.read_text() for path in [ROOT / script, ROOT / "examples" / "run_espo_70b.sh"]
    )
    if script == "tools/test.sh":
        assert all((ROOT / word).is_file() for word in arguments if word.startswith("tests/")), line
        return
    assert all(word.split("=")[0] in source for word in arguments if word.startswith("--")), (
        f"{line}: unknown option"
    )
    load_config(base, [word for word in arguments if re.match(r"[a-z]+\.\w+(\.\w+)*=", word)])


def check_help(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0


def test_a_wrong_command_is_noticed(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    for line, wrong in {
        "megatron-espo trian run.yaml": SystemExit,
        "megatron-espo train run.yaml run.stops=3": InputError,
        "torchrun -m megatron_espo train run.yaml --speed 3": SystemExit,
        "bash examples/quickstart.sh --sed 3": AssertionError,
        "bash examples/quickstart.sh algorithm.objective=best": InputError,
        "bash examples/gone.sh": AssertionError,
    }.items():
        with pytest.raises(wrong):
            check_command(line.split(), tmp_path / "base.yaml")


def test_commands_that_take_minutes_have_a_test():
    lines = [" ".join(words) for snippet in snippets("bash") for words in command_lines(snippet)]
    for command, test in RUN_BY.items():
        assert any(line.startswith(command) for line in lines), command
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


PRELUDE = """
import sys
sys.path.insert(0, "examples")
from existing_megatron_script import *
initialize()
model, groups, vocab_size = build_model(), ProcessGroupCollection.use_mpu_process_groups(), VOCAB
draw = torch.Generator().manual_seed(SEED)
prompts = torch.randint(VOCAB, (PROMPTS, PROMPT), generator=draw).repeat_interleave(GROUP, 0)
responses, logprobs = sample(model, prompts, draw)
rewards = (responses % 2 == 0).float().mean(1).view(PROMPTS, GROUP)
rollouts = list(zip(prompts.tolist(), responses.tolist(), logprobs.tolist(), strict=True))
model.zero_grad_buffer()
"""
# Assertions that run after a snippet; tests/test_environments.py runs the other snippet.
CHECKS = {
    "README.md": "assert all(p.main_grad.norm() > 0 for p in model.parameters())",
    "docs/models.md": "assert Mine.model_type == 'mine'",
    "docs/existing_script.md": "assert callable(forward_step)",
    "docs/own_trainer.md": "assert logits.grad.norm() > 0",
}


def test_python_snippets_run():
    parts = [PRELUDE]
    for snippet in snippets("python"):
        if snippet.page != "docs/environments.md":
            parts += [snippet.text, CHECKS[snippet.page]]
    program = "\n".join([*parts, "print('ran to the end')"])
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program]
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=360)
    assert "ran to the end" in done.stdout, done.stderr
