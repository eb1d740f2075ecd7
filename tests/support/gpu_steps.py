"""What ``tools/gpu_check.py`` runs in processes of its own: ``python -m tests.support.gpu_steps``.

    python -m tests.support.gpu_steps run '{"steps": 3}'

Each function raises if something is wrong, and prints lines ``result: <name> <number> <unit>``.
Every model has random weights. The functions use the GPU if there is one.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from tests.support.distributed import ROOT

HAS_GPU = torch.cuda.is_available()
EAGER = {"enforce_eager": True}


def say(name: str, value: float, unit: str = "") -> None:
    """Print a result."""
    print(f"result: {name} {value:.4g} {unit}".rstrip(), flush=True)


@contextmanager
def timed():
    """A clock; ``seconds`` is set at the end, when the GPU is idle."""
    clock, began = SimpleNamespace(seconds=0.0), time.perf_counter()
    yield clock
    if HAS_GPU:
        torch.cuda.synchronize()
    clock.seconds = time.perf_counter() - began


def random_reward(prompt, response: str) -> float:
    """A reward function that gives every response an advantage."""
    return random.random()


def ceilings(tiny: bool) -> None:
    """What the device reaches: copies, and a product of bfloat16 matrices."""
    from benchmarks.measure import interleaved

    device, size = "cuda" if HAS_GPU else "cpu", 64 if tiny else 8192
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    source = torch.randn(8 * size, size, device=device).bfloat16()
    target = torch.empty_like(source)
    host = torch.empty_like(source, device="cpu", pin_memory=HAS_GPU)
    runs = {
        "copy, read and written": lambda _: target.copy_(source),
        "product": lambda _: a @ b,
        "to the device": lambda _: source.copy_(host, non_blocking=True),
        "from the device": lambda _: host.copy_(source, non_blocking=True),
    }
    times = interleaved({name: ((lambda: None), run) for name, run in runs.items()}, 10)
    seconds = {name: median(values) for name, values in times.items()}
    say("product", 2 * size**3 / seconds.pop("product") / 1e12, "TFLOP/s")
    for name, value in seconds.items():
        say(name, (1 + ("written" in name)) * 2 * source.numel() / value / 1e9, "GB/s")


def gradient(tolerance: float, dtype: str, impl: str, padded: bool = False) -> None:
    """The gradient of a batch through Megatron against dense float64 on the CPU.

    The weights are exact in bfloat16. VESPO is smooth in the log-probs. ESPO's groups of entropies
    are compared in float32 with local layers only: rounding moves tokens to other groups.
    """
    from tests.support.ranks import step
    from tests.support.weights_models import make_model

    with tempfile.TemporaryDirectory() as folder:
        make_model("qwen3", tie_word_embeddings=True).bfloat16().float().save_pretrained(folder)
        options = {"folder": folder, "masked": True, "transformer_impl": impl, "dtype": dtype}
        options["packing"] = {"share_prompts": False, "padded": True} if padded else None
        exact = (dtype, impl) == ("float32", "local")
        vespo = {"old_folder": folder, "algorithm": {"objective": "examples.vespo:VESPO"}}
        found = [step.check_gradient(**options, **({} if exact else vespo))]
        if exact:
            found.append(step.check_update(folder=folder, transformer_impl=impl))
    for name, result in zip(("gradient", "update"), found, strict=False):
        say(f"relative difference of the {name}, at most {tolerance:g}:", result["worst"])
        assert result["worst"] <= tolerance, result


def engine(eager: bool = False) -> None:
    """A server's start, weight update, read-back, canary, sleep and wake-up."""
    from transformers import LlamaForCausalLM
    from vllm.distributed.weight_transfer.base import ModuleSource

    from megatron_espo.rollout.transport import make_trainer_transport, send_weights
    from megatron_espo.weights.verification import wrong_tensors
    from megatron_espo.weights.vllm_source import ObservedSource
    from tests.support import real_engine
    from tests.support.tiny import save_tiny_model

    kind, device = ("ipc", "cuda") if HAS_GPU else ("files", "cpu")
    atol, prompts = 1e-3 if HAS_GPU else 1e-4, [(5, 6, 7, 8), (9, 4, 5)]

    def free() -> float:
        return torch.cuda.mem_get_info()[0] / 2**30 if HAS_GPU else 0.0

    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_model(Path(folder, "model"))
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        moved = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
        source = ObservedSource(ModuleSource(moved), 1)
        shapes = [(meta.name, tuple(meta.shape)) for meta in source.metadata()]
        options: dict = {"transport": kind, "timeout_s": 1200.0}
        if HAS_GPU:  # an explicit size also works beside other processes
            size = {"kv_cache_memory_bytes": int(0.3 * torch.cuda.mem_get_info()[1])}
            options |= {"sleep": True, "engine_args": size | (EAGER if eager else {})}
        config = real_engine.engine_config(path, folder, **options)
        began = time.perf_counter()
        with real_engine.running_engine(config) as server:
            say("start of the engine", time.perf_counter() - began, "s")
            graphs = "Graph capturing finished" in config.log_path.read_text()
            assert graphs == (HAS_GPU and not eager), config.log_path.read_text()[-2000:]
            say("CUDA graphs captured:", graphs)
            transport = make_trainer_transport(kind, engine=server, source=source, rank=0)
            server.fill_nan(shapes)
            for version in (1, 2):
                if version == 2:  # other weights, after a sleep
                    with torch.no_grad():
                        for own, sent in zip(model.parameters(), moved.parameters(), strict=True):
                            own.mul_(1.25)
                            sent.copy_(own)
                    before = free()
                    with timed() as clock:
                        server.sleep()
                    say("sleep", clock.seconds, "s")
                    if HAS_GPU:
                        say("memory freed by sleep", free() - before, "GiB")
                        assert free() - before >= 0.2 * torch.cuda.mem_get_info()[1] / 2**30
                    with timed() as clock:
                        server.wake(shapes)
                    say("wake-up of the weights, filled with NaN", clock.seconds, "s")
                source.checksums = {}
                with timed() as clock:
                    send_weights(transport, server, version)
                say(f"update {version} by {kind}", clock.seconds, "s")
                served = server.read_back_checksums("float32")
                assert not (wrong := wrong_tensors(source.checksums, served)), wrong
                same = served.keys() & source.checksums.keys()
                assert same, "no tensor was read back"
                say("tensors read back:", len(same))
                if version == 2:
                    with timed() as clock:
                        server.wake_caches()
                    say("wake-up of the caches", clock.seconds, "s")
                server.resume()
                gap = 0.0
                for ids, found in zip(prompts, server.canary(prompts, 4), strict=True):
                    expected = real_engine.reference_logprobs(model, ids, found.token_ids.tolist())
                    logprobs = torch.from_numpy(found.logprobs).double()
                    gap = max(gap, float((logprobs - expected).abs().max()))
                say("log-prob gap of the canary", gap, "nats")
                assert gap <= atol, gap
                server.serve()
                real_engine.assert_serves(server, model, prompts, atol)


def model(folder: str, sizes: dict) -> None:
    """Write a random Qwen3 of the given sizes."""
    from tests.support.tiny import save_tiny_model

    save_tiny_model(folder, "qwen3", **sizes)
    files = Path(folder).glob("*.safetensors")
    say("model", sum(file.stat().st_size for file in files) / 1e9, "GB")


def run(
    steps: int,
    sections: dict,
    folder: str | None = None,
    resumes: bool = False,
    tolerance: float = float("inf"),
) -> None:
    """``megatron-espo train`` for ``steps`` steps.

    Args:
        sections: settings.
        folder: of the model; ``None``: a tiny one.
        resumes: end the run before its last step, and continue it from its checkpoint.
        tolerance: limit of the log-prob gap, nats.
    """
    from megatron_espo.monitoring.throughput import describe, performance
    from tests.support.tiny import save_tiny_model, write_tiny_run

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        out, file = work / "run", work / "run.yaml"
        sections["model"]["path"] = folder or str(save_tiny_model(work / "model"))
        sections["reward"] = {"function": "tests.support.gpu_steps:random_reward"}
        sections["run"] = {"dir": str(out)} | ({"checkpoint_every": 1} if resumes else {})
        write_tiny_run(work, **sections)
        metrics, before = out / "metrics.jsonl", ""
        for last in (steps - 1, steps) if resumes else (steps,):
            command = [sys.executable, "-m", "megatron_espo", "train", str(file)]
            done = subprocess.run([*command, f"run.steps={last}"], cwd=ROOT).returncode
            if done and (out / "engine.log").exists():
                print((out / "engine.log").read_text()[-20_000:])
            assert not done, f"exit code {done}"
            text = metrics.read_text()
            assert text.startswith(before), "the second launch did not continue the first"
            before = text
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1)), text
    gap = max(line["mismatch/logprob_gap_mean"] for line in lines)
    say("log-prob gap, engine and trainer", gap, "nats")
    assert gap <= tolerance, gap
    assert any(line["optimizer/grad_norm"] > 0 for line in lines)
    measured = lines[1:] or lines  # the first step compiles
    for text in describe(performance(measured)):
        print(f"result: {text}")
    for key in ("throughput/response_tokens_per_s", "throughput/trained_tokens_per_s"):
        say(f"{key},", sum(line[key] for line in measured) / len(measured))
    for key in ("time/sync_s", "time/sleep_s", "time/onload_s", "time/offload_s"):
        if key in measured[-1]:
            say(f"{key},", sum(line[key] for line in measured) / len(measured))


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
