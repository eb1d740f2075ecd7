"""Rewrites the tables of docs/scaling.md and draws docs/scaling.png: the step at 8 to 4,096 GPUs, computed, not measured.

    python tools/scaling.py

Layouts, bytes, pipeline and sync are `megatron-espo plan`'s, the step is `megatron_espo.plan.step`'s; what is assumed stands below.
"""

import math
import os
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan touches no GPU

from megatron_espo.config import Config, load_config
from megatron_espo.plan.engine import plan_engine
from megatron_espo.plan.make import Builder, Links, Machine, Plan, make_plan, smallest_world
from megatron_espo.plan.pipeline import plan_pipeline
from megatron_espo.plan.step import Decoder, Rollouts, Step, Trainer, one_step_off, simulate_rollouts, synchronous

# One H100 (SXM): bytes a second of its memory, FLOP/s in bfloat16, and how much of each is reached.
MEMORY, FLOPS, MEMORY_SHARE, FLOPS_SHARE = 3.35e12, 989e12, 0.6, 0.4
OVERHEAD_S = 0.005  # of a decoding step, beside reading weights and caches: launches, all-reduces, sampling
MOST_SEQUENCES = 256  # that one engine decodes at once, if its cache holds them
# Response tokens: log-normal, cut at the limit. Half of the spread lies between prompts, half between responses to one.
MEDIAN, SIGMA, LIMIT, GROUP = 4000, 0.9, 16384, 8
ESTIMATE_SIGMA = 0.4  # error of a prompt's length estimate, in logs
CARRIED_STEPS, AVERAGED = 10, 4  # with partial rollouts: steps simulated one after the other, the last of which are averaged
LINKS = Links(450e9, 50e9, 8)
WAYS = ("synchronous", "longest first", "one-step-off", "longest first, one-step-off", "partial, one-step-off")

LLAMA_70B = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192}
LLAMA_70B |= {"intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA_70B |= {"max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False}
QWEN3_14B = LLAMA_70B | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 40, "hidden_size": 5120}
QWEN3_14B |= {"intermediate_size": 17408, "num_attention_heads": 40, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}


class Case(NamedTuple):
    """A row: model, its settings, how many GPUs, prompts in a step."""

    name: str
    model: dict
    settings: str
    gpus: int
    prompts: int


CASES = [
    Case("Qwen3-14B", QWEN3_14B, "qwen3_14b_1node", 8, 128),
    Case("Llama-3-70B", LLAMA_70B, "llama3_70b_8nodes", 64, 128),
    Case("Llama-3-70B", LLAMA_70B, "llama3_70b_16nodes", 512, 128),
    Case("Llama-3-70B", LLAMA_70B, "llama3_70b_16nodes", 4096, 128),
    Case("Llama-3-70B", LLAMA_70B, "llama3_70b_16nodes", 512, 1024),
    Case("Llama-3-70B", LLAMA_70B, "llama3_70b_16nodes", 4096, 8192),
]


class Machines:
    """What a case's GPUs can do: decoders and trainers of any number of them."""

    def __init__(self, case: Case) -> None:
        self.case, self.engine_gpus = case, 2 if case.gpus == 8 else 8  # smaller engines where one node does it all
        overrides = [f"rollout.prompts_per_step={case.prompts}", f"rollout.tensor_parallel_size={self.engine_gpus}"]
        self.config: Config = load_config(str(ROOT / "examples" / f"{case.settings}.yaml"), overrides)
        self.build = Builder(case.model, Machine(80 * 10**9, LINKS, mean_length()))
        self.plan: Plan = make_plan(self.config, self.build, case.gpus)
        self.replica = min(smallest_world(self.config), case.gpus // 2)  # half a node trains with half the tensor-parallel size

    def decoder(self, gpus: int, share: float) -> Decoder:
        """``gpus`` GPUs of which engines may take the ``share`` of the memory."""
        rollout = self.config.rollout.model_copy(update={"gpu_memory_utilization": share})
        engine = plan_engine(self.config.model_copy(update={"rollout": rollout}), self.case.model, self.build.groups, 2, "nccl", 80 * 10**9)
        slots = max(1, min(MOST_SEQUENCES, engine.kv_tokens // mean_length()))
        read = MEMORY * MEMORY_SHARE
        compute = 2 * self.plan.total_parameters / (self.engine_gpus * FLOPS * FLOPS_SHARE)
        cache = engine.kv_bytes_per_token * mean_length() / 2 / read  # a response is half as long on average while it grows
        return Decoder(gpus // self.engine_gpus, self.engine_gpus, slots, engine.weight_bytes / read + OVERHEAD_S, cache + compute)

    def trainer(self, gpus: int, tokens: float) -> Trainer:
        """Training on ``tokens``: 6 FLOPs a parameter and token, 8 with full recomputation."""
        bubble = plan_pipeline(self.config, self.case.model, gpus // self.replica, mean_length()).bubble
        factor = 8 if self.config.megatron.recompute_granularity == "full" else 6
        return Trainer(gpus, factor * self.plan.total_parameters * tokens / (gpus * FLOPS * FLOPS_SHARE * (1 - bubble)), bubble)

    def splits(self) -> list[int]:
        """GPUs that engines may have where trainer and engines have their own."""
        step = math.lcm(self.engine_gpus, self.replica)
        found = range(step, self.case.gpus, max(step, self.case.gpus // 8 // step * step))
        return [gpus for gpus in found if (self.case.gpus - gpus) % self.replica == 0]


def mean_length() -> int:
    """Mean response tokens of the distribution."""
    draw = random.Random(0)
    return int(sum(min(LIMIT, MEDIAN * math.exp(SIGMA * draw.gauss(0, 1))) for _ in range(20000)) / 20000)


def draw_lengths(prompts: int, seed: int) -> tuple[list[float], list[int]]:
    """Lengths of a batch's responses, prompt by prompt, and their order, longest estimate first."""
    draw, part = random.Random(seed), SIGMA / math.sqrt(2)
    lengths, estimates = [], []
    for _ in range(prompts):
        centre = MEDIAN * math.exp(part * draw.gauss(0, 1))
        estimates += [centre * math.exp(ESTIMATE_SIGMA * draw.gauss(0, 1))] * GROUP
        lengths += [min(LIMIT, centre * math.exp(part * draw.gauss(0, 1))) for _ in range(GROUP)]
    return lengths, sorted(range(len(lengths)), key=lambda i: -estimates[i])


def simulate_partial(case: Case, decoder: Decoder) -> Rollouts:
    """Half as many prompts again in flight; a step takes the first batch that is finished, the rest goes on."""
    wanted, left, found = case.prompts * GROUP, [], []
    for step in range(CARRIED_STEPS):
        fresh, _ = draw_lengths(math.ceil((wanted * 1.5 - len(left)) / GROUP), seed=100 + step)
        found.append(simulate_rollouts([*left, *fresh], decoder, enough=wanted))
        left = [found[-1].unfinished[i] for i in sorted(found[-1].unfinished)]
    last = found[-AVERAGED:]
    return replace(last[-1], seconds=fmean(r.seconds for r in last), idle_gpu_s=fmean(r.idle_gpu_s for r in last))


def steps_of(case: Case, machines: Machines) -> dict[str, tuple[Step, int | None]]:
    """Each way's step, and the engines' GPUs where they are engines' only: the split with the shortest step."""
    lengths, longest_first = draw_lengths(case.prompts, seed=1)
    sync_s = machines.plan.transfer.seconds
    shared = machines.config.rollout.gpu_memory_utilization
    together, alone = machines.decoder(case.gpus, shared), machines.trainer(case.gpus, sum(lengths))
    turn_s = sync_s + machines.plan.offload_s
    found: dict[str, tuple[Step, int | None]] = {
        "synchronous": (synchronous(simulate_rollouts(lengths, together), alone, turn_s), None),
        "longest first": (synchronous(simulate_rollouts(lengths, together, order=longest_first), alone, turn_s), None),
    }
    for name in WAYS[2:]:
        candidates = []
        for gpus in machines.splits():
            decoder, trainer = machines.decoder(gpus, 0.9), machines.trainer(case.gpus - gpus, sum(lengths))
            if name.startswith("partial"):
                rollouts = simulate_partial(case, decoder)
            else:
                rollouts = simulate_rollouts(lengths, decoder, order=longest_first if name.startswith("longest") else None)
            candidates.append((one_step_off(rollouts, decoder, trainer, sync_s), gpus))
        found[name] = min(candidates, key=lambda candidate: candidate[0].seconds)
    return found


def render(rows: list[tuple[Case, Machines, dict]]) -> str:
    """Both tables in Markdown."""
    text = ["| GPUs | model | layout | micro-batches | bubble | GB a GPU | sync, GB | sync, s | to the host and back, s |"]
    text += ["|---|---|---|---|---|---|---|---|---|"]
    for case, machines, _ in rows:
        plan = machines.plan
        sizes = [f"{name} {plan.layout[key]}" for name, key in (("TP", "tensor_model_parallel_size"), ("PP", "pipeline_model_parallel_size"))]
        layout = f"{' '.join(sizes)} DP {plan.data_parallel_size}"
        sent = 2 * plan.total_parameters / 1e9
        text.append(
            f"| {case.gpus:,} | {case.name} | {layout}; {case.prompts:,} prompts | {plan.pipeline.micro_batches} | {plan.pipeline.bubble:.1%} | "
            f"{max(stage.total for stage in plan.memory) / 1e9:.1f} | {sent:.1f} | {plan.transfer.seconds:.1f} | {plan.offload_s:.2f} |"
        )
    text += ["", f"| GPUs | prompts | {' | '.join(WAYS)} |", "|---|---|" + "---|" * len(WAYS)]
    for case, _, found in rows:
        cells = [f"{step.seconds:.0f} s, {step.idle:.0%}" + (f" ({gpus:,})" if gpus else "") for step, gpus in (found[way] for way in WAYS)]
        text.append(f"| {case.gpus:,} | {case.prompts:,} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw_picture(rows: list[tuple[Case, Machines, dict]], path: Path) -> None:
    """Idle share by number of GPUs, a bar for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.2), dpi=120)
    width = 0.8 / len(WAYS)
    for number, way in enumerate(WAYS):
        places = [row + (number - (len(WAYS) - 1) / 2) * width for row in range(len(rows))]
        axes.bar(places, [100 * found[way][0].idle for _, _, found in rows], width, label=way)
    axes.set_xticks(range(len(rows)), [f"{case.gpus:,} GPUs\n{case.prompts:,} prompts" for case, _, _ in rows])
    axes.set_ylabel("idle share of all GPU-seconds, %")
    axes.set_title("Computed, not measured", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    rows = []
    for case in CASES:
        machines = Machines(case)
        rows.append((case, machines, steps_of(case, machines)))
    document = ROOT / "docs" / "scaling.md"
    before, mark, rest = document.read_text().partition("<!-- Written by `python tools/scaling.py`. -->\n")
    _, end, after = rest.partition("<!-- End. -->")
    assert mark and end, f"{document}: no place for the tables"
    document.write_text(f"{before}{mark}{render(rows)}\n{end}{after}")
    draw_picture(rows, ROOT / "docs" / "scaling.png")


if __name__ == "__main__":
    main()
