"""Every metric's name, unit and meaning: what ``docs/metrics.md`` lists, and which charts show them. Names are stable."""

import re
from dataclasses import dataclass

# <g>: entropy group from 0 (lowest); <k>: responses; <phase>: rollout, reward, train, sync, eval, step, ...
METRICS: dict[str, dict[str, tuple[str, str]]] = {
    "Reward": {
        "reward/mean": ("", "mean over all judged responses"),
        "reward/std": ("", "standard deviation over them"),
        "reward/standard_error": ("", "standard deviation / sqrt(responses)"),
        "reward/solved_all": ("share of prompts", "every response has a reward of at least 1"),
        "reward/solved_none": ("share of prompts", "no response has a reward above 0"),
        "reward/equal_groups": ("share of prompts", "all rewards are equal, so that nothing is learnt from them"),
        "reward/failed": ("responses", "the verifier crashed, hung or returned no number"),
    },
    "Evaluation": {
        "eval/avg@<k>": ("", "share of correct responses among k a prompt, mean over prompts"),
        "eval/avg@<k>_low": ("", "lower end of its bootstrap interval over prompts"),
        "eval/avg@<k>_high": ("", "upper end"),
        "eval/pass@<k>": ("", "unbiased estimate of the chance that one of k responses is correct"),
        "eval/pass@<k>_low": ("", "lower end of its bootstrap interval over prompts"),
        "eval/pass@<k>_high": ("", "upper end"),
        "eval/reward_mean": ("", "mean reward, also of partly right responses"),
        "eval/length_mean": ("tokens", "mean response length"),
        "eval/truncated": ("share", "responses cut at the length limit"),
        "eval/failed": ("responses", "not judged; they count as wrong"),
    },
    "ESPO groups": {
        "group<g>/entropy": ("nats", "mean entropy of the group's trained tokens"),
        "group<g>/epsilon": ("", "mean clip range (Eq. 8)"),
        "group<g>/ratio": ("", "mean importance ratio"),
        "group<g>/ratio_min": ("", "smallest importance ratio"),
        "group<g>/ratio_max": ("", "largest importance ratio"),
        "group<g>/clipped_low": ("share of tokens", "ratio below the clip range"),
        "group<g>/clipped_high": ("share of tokens", "ratio above the clip range"),
        "group<g>/no_gradient": ("share of tokens", "clipping took their gradient"),
        "entropy/border<g>": ("nats", "lowest entropy of group g and those above, mean over responses"),
        "would_clip/<objective>": ("share of tokens", "outside the clip range that this objective would have set"),
    },
    "Lengths": {
        "rollout/length_mean": ("tokens", "mean number of sampled tokens in a response"),
        "rollout/length_max": ("tokens", "most sampled tokens in a response"),
        "rollout/truncated": ("share", "responses cut at the length limit"),
        "rollout/with_advantage": ("share", "responses whose advantage is not 0"),
        "environment/turns": ("", "mean number of sampled turns in a trajectory"),
        "environment/splits": ("", "trajectories cut where a client's history differs from the sampled tokens"),
        "environment/failed": ("trajectories", "whose environment failed; not trained"),
        "environment/reward_<part>": ("", "mean of a part of the reward that the environment names"),
        "ledger/dispatched": ("prompts", "handed to the engine so far, restarts included"),
        "ledger/trained": ("prompts", "part of an optimizer step's batch so far"),
        "ledger/in_flight": ("prompts", "in flight, trained in a later step (`rollout.max_staleness`)"),
        "ledger/dropped_equal": ("prompts", "given up by dynamic sampling so far, because their rewards did not differ"),
    },
    "Mismatch": {
        "mismatch/logprob_gap_mean": ("nats", "mean |engine - trainer| log-prob of the same tokens"),
        "mismatch/logprob_gap_max": ("nats", "largest of them"),
        "mismatch/kl": ("nats", "mean (engine - trainer) log-prob: estimates KL(engine || trainer)"),
        "mismatch/canary": ("nats", "mean |engine - trainer| log-prob of the canary's tokens, before the weights were served"),
        "rollout/staleness": ("versions", "between the weights that the step starts from and the weights that sampled; mean over sampled tokens"),
        "rollout/staleness_max": ("versions", "the same, of the oldest sampled token"),
        "sync/verified_tensors": ("tensors", "read back from the engine and found to be those that were sent"),
        "sync/restarts": ("", "engine restarts that the sync needed"),
        "rollout_correction/weight": ("", "mean truncated importance weight trainer / engine"),
        "rollout_correction/truncated": ("share of tokens", "that weight is at its cap"),
    },
    "Optimisation": {
        "loss/policy": ("", "policy loss of the step"),
        "policy/entropy": ("nats", "mean entropy of trained tokens"),
        "policy/clipped": ("share of tokens", "ratio outside the clip range"),
        "policy/no_gradient": ("share of tokens", "clipping took their gradient"),
        "kl/reference": ("nats", "mean KL estimate to the initial policy, with `algorithm.kl_coef`"),
        "optimizer/grad_norm": ("", "global L2 norm before clipping"),
        "optimizer/lr": ("", "learning rate"),
        "optimizer/skipped": ("share of updates", "not made, because a gradient was not finite, or a spike"),
        "train/tokens": ("tokens", "prompt and response tokens trained on, over all ranks and epochs"),
    },
    "Experts": {
        "moe/load_max": ("", "tokens of a layer's busiest expert / those of its average one, mean over layers; 1 is even"),
        "moe/load_min": ("", "the same of the idlest"),
        "moe/idle_experts": ("share", "experts that got no token in the step"),
        "moe/router_mismatch": ("share", "trained tokens x layers for which the trainer's router would have chosen other experts than the engine's, which it was given"),
    },
    "Time": {
        "time/sleep_s": ("s", "with `rollout.sleep`: the engines give their GPU memory back"),
        "time/offload_s": ("s", "with `megatron.offload`: to the host after training, and of the weights after the sync"),
        "time/onload_s": ("s", "the same, back before training"),
        "time/<phase>_s": ("s", "seconds of a phase; `time/step_s`: of the whole step; `verify` and `canary` are parts of `sync`"),
    },
    "Throughput": {
        "throughput/response_tokens_per_s": ("tokens/s", "response tokens / seconds of the rollout phase"),
        "throughput/trained_tokens_per_s": ("tokens/s", "`train/tokens` / seconds of the training phase"),
        "throughput/mfu": ("share", "model FLOPs / (seconds of training x GPUs x peak FLOP/s); known GPUs in bfloat16 only"),
    },
    "System": {
        "system/rss_gib": ("GiB", "memory of rank 0's process"),
        "system/host_memory_gib": ("GiB", "memory taken on rank 0's machine, by everything"),
        "system/offloaded_gib": ("GiB", "with `megatron.offload`: host memory of rank 0 for what leaves its device"),
        "system/gpu_memory_gib": ("GiB", "memory taken on rank 0's GPU, by everything"),
        "system/gpu_peak_allocated_gib": ("GiB", "most that rank 0's torch has allocated"),
    },
}
_PLACEHOLDERS = {"g": r"\d+", "k": r"\d+", "objective": r"\w+", "phase": r"\w+", "part": r".+"}


def as_pattern(name: str) -> str:
    """A regular expression for the metrics that a name of :data:`METRICS` stands for."""
    return "^" + re.sub("<(.*?)>", lambda placeholder: _PLACEHOLDERS[placeholder[1]], name) + "$"


def render_table() -> str:
    """:data:`METRICS` in Markdown."""
    blocks = []
    for category, names in METRICS.items():
        rows = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in names.items()]
        blocks.append("\n".join([f"### {category}\n", "| name | unit | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(blocks) + "\n"


@dataclass(frozen=True)
class Chart:
    """Curves over steps, in the report and on TensorBoard's "Custom Scalars" page.

    Attributes:
        name: file name of the report's picture.
        title: what the chart shows.
        metrics: names of :data:`METRICS`; each metric that they stand for is a curve of its own.
        floor: the report's vertical axis includes 0.
        log: the report's vertical axis is logarithmic.
        band: suffixes of the metrics at the lower and the upper end of a curve's band.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    floor: bool = True
    log: bool = False
    band: tuple[str, str] | None = None


INTERVAL, EXTREMES = ("_low", "_high"), ("_min", "_max")
CHARTS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        Chart("reward", "Reward (mean ± standard error)", ("reward/mean",)),
        Chart("evaluation", "Held-out prompts: avg@k and pass@k, with intervals", ("eval/avg@<k>", "eval/pass@<k>"), band=INTERVAL),
        Chart("prompts", "Share of prompts solved by all, by none", ("reward/solved_all", "reward/solved_none")),
    ),
    "Entropy groups": (
        Chart("group_entropy", "Entropy by group (nats)", ("group<g>/entropy",)),
        Chart("group_epsilon", "Clip range by group (ε)", ("group<g>/epsilon",)),
        Chart("group_ratio", "Importance ratio by group (mean, range)", ("group<g>/ratio",), floor=False, band=EXTREMES),
        Chart("group_clipped", "Share of a group without gradient (clipped)", ("group<g>/no_gradient",)),
        Chart("would_clip", "Share of tokens outside the clip range, here and of others", ("policy/clipped", "would_clip/<objective>")),
    ),
    "Responses and the engine": (
        Chart("length", "Response length (tokens)", ("rollout/length_mean", "rollout/length_max")),
        Chart("truncated", "Share of responses truncated, with advantage", ("rollout/truncated", "rollout/with_advantage")),
        Chart("environment", "Turns of a trajectory, splits and failures of a step", ("environment/turns", "environment/splits", "environment/failed")),
        Chart("mismatch", "|engine − trainer| log-prob (nats)", ("mismatch/logprob_gap_mean", "mismatch/logprob_gap_max"), floor=False, log=True),
    ),
    "Optimisation": (
        Chart("policy_entropy", "Entropy of trained tokens (nats)", ("policy/entropy",)),
        Chart("grad_norm", "Gradient norm before clipping", ("optimizer/grad_norm",)),
        Chart("lr", "Learning rate", ("optimizer/lr",)),
        Chart("kl", "KL to the initial policy (nats)", ("kl/reference",)),
    ),
    "Time and machine": (
        Chart("throughput", "Tokens a second", ("throughput/response_tokens_per_s", "throughput/trained_tokens_per_s")),
        Chart("mfu", "Model FLOPs utilisation", ("throughput/mfu",)),
        Chart("memory", "Memory (GiB)", tuple(METRICS["System"])),
    ),
}


def board_layout() -> dict[str, dict[str, list]]:
    """TensorBoard's "Custom Scalars" page: category -> chart -> regular expressions of the tags in it."""
    layout = {
        category: {chart.title: ["Multiline", [as_pattern(name) for name in chart.metrics]] for chart in charts}
        for category, charts in CHARTS.items()
    }
    layout["Time and machine"]["Seconds by phase"] = ["Multiline", [as_pattern("time/<phase>_s")]]
    return layout


if __name__ == "__main__":
    print(render_table(), end="")
