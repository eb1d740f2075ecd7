"""Every metric's name, unit and meaning: what ``docs/metrics.md`` lists, and how TensorBoard lays them out. Names are stable."""

import re

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
        "rollout/length_mean": ("tokens", "mean response length"),
        "rollout/length_max": ("tokens", "longest response"),
        "rollout/truncated": ("share", "responses cut at the length limit"),
        "rollout/with_advantage": ("share", "responses whose advantage is not 0"),
        "ledger/dispatched": ("prompts", "handed to the engine so far, restarts included"),
        "ledger/trained": ("prompts", "part of an optimizer step's batch so far"),
        "ledger/in_flight": ("prompts", "sampled in part, to be gone on with, with `rollout.extra_prompts`"),
        "ledger/dropped_equal": ("prompts", "given up by dynamic sampling so far, because their rewards did not differ"),
    },
    "Mismatch": {
        "mismatch/logprob_gap_mean": ("nats", "mean |engine - trainer| log-prob of the same tokens"),
        "mismatch/logprob_gap_max": ("nats", "largest of them"),
        "mismatch/kl": ("nats", "mean (engine - trainer) log-prob: estimates KL(engine || trainer)"),
        "mismatch/canary": ("nats", "mean |engine - trainer| log-prob of the canary's tokens, before the weights were served"),
        "rollout/staleness": ("versions", "of the weights that the step starts from, less that of those that sampled a response's first token; mean over responses"),
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
        "time/wait_s": ("s", "with `rollout.max_staleness`: training is done, and the batch sampled meanwhile (`rollout`, `reward`) is not"),
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
_PLACEHOLDERS = {"g": r"\d+", "k": r"\d+", "objective": r"\w+", "phase": r"\w+"}


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


def _chart(*names: str) -> list:
    return ["Multiline", [as_pattern(name) for name in names]]


# TensorBoard's "Custom Scalars" page: category -> chart -> regular expressions of the tags in it.
BOARD_LAYOUT = {
    "Reward": {
        "Reward": _chart("reward/mean", "eval/reward_mean"),
        "Prompts with nothing to learn": _chart("reward/solved_all", "reward/solved_none", "reward/equal_groups"),
        "avg@k and pass@k on held-out prompts": _chart("eval/avg@<k>", "eval/pass@<k>"),
    },
    "ESPO groups": {
        "Entropy by group (nats)": _chart("group<g>/entropy", "entropy/border<g>"),
        "Clip range by group": _chart("group<g>/epsilon"),
        "Importance ratio by group": _chart("group<g>/ratio", "group<g>/ratio_min", "group<g>/ratio_max"),
        "Clipped share by group": _chart("group<g>/clipped_low", "group<g>/clipped_high"),
        "What other objectives would clip": _chart("policy/clipped", "would_clip/<objective>"),
    },
    "Lengths": {
        "Response length (tokens)": _chart("rollout/length_mean", "rollout/length_max"),
        "Truncated": _chart("rollout/truncated", "eval/truncated"),
    },
    "Mismatch": {
        "|engine - trainer| log-prob (nats)": _chart("mismatch/logprob_gap_mean", "mismatch/logprob_gap_max"),
        "KL(engine || trainer)": _chart("mismatch/kl"),
    },
    "Optimisation": {
        "Gradient norm": _chart("optimizer/grad_norm"),
        "Learning rate": _chart("optimizer/lr"),
        "Policy entropy (nats)": _chart("policy/entropy"),
        "KL to the initial policy": _chart("kl/reference"),
    },
    "Time": {"Seconds": _chart("time/<phase>_s")},
    "Throughput": {
        "Tokens a second": _chart("throughput/response_tokens_per_s", "throughput/trained_tokens_per_s"),
        "Model FLOPs utilisation": _chart("throughput/mfu"),
    },
    "System": {"Memory (GiB)": _chart("system/rss_gib", "system/host_memory_gib", "system/gpu_memory_gib", "system/gpu_peak_allocated_gib")},
}


if __name__ == "__main__":
    print(render_table(), end="")
