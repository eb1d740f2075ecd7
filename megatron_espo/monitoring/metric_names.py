"""Name, unit and meaning of every metric (``docs/metrics.md`` contains this table), and the charts.

Names are stable.
"""

import re
from dataclasses import dataclass

# A mean |engine - trainer| log-prob gap above this, in nats per token, is a warning.
LARGE_GAP = 0.05

# name | unit | meaning. <g>: entropy group, 0 is the lowest; <k>: number of responses; <phase>:
# rollout, reward, train, sync, ...
_TABLE = """
Reward
  reward/mean | | mean over all judged responses
  reward/std | | standard deviation over all judged responses
  reward/standard_error | | standard deviation / sqrt(responses)
  reward/solved_all | share of prompts | every response has a reward of at least 1
  reward/solved_none | share of prompts | no response has a reward above 0
  reward/equal_groups | share of prompts | all rewards are equal, so the prompt gives no gradient
  reward/failed | responses | the verifier crashed, hung or returned no number
Evaluation
  eval/avg@<k> | | share of correct responses among k a prompt, mean over prompts
  eval/avg@<k>_low | | lower end of its bootstrap interval over prompts
  eval/avg@<k>_high | | upper end
  eval/pass@<k> | | unbiased estimate of the probability that one of k responses is correct
  eval/pass@<k>_low | | lower end of its bootstrap interval over prompts
  eval/pass@<k>_high | | upper end
  eval/reward_mean | | mean reward, partly correct responses included
  eval/length_mean | tokens | mean response length
  eval/truncated | share | responses that reached the length limit
  eval/failed | responses | not judged; they count as wrong
ESPO groups
  group<g>/entropy | nats | mean entropy of the group's trained tokens
  group<g>/epsilon | | mean clip range (Eq. 8)
  group<g>/ratio | | mean importance ratio
  group<g>/ratio_min | | smallest importance ratio
  group<g>/ratio_max | | largest importance ratio
  group<g>/clipped_low | share of tokens | ratio below the clip range
  group<g>/clipped_high | share of tokens | ratio above the clip range
  group<g>/no_gradient | share of tokens | clipping removes their gradient
  entropy/boundary<g> | nats | lowest entropy of group g and those above, mean over responses
  would_clip/<objective> | share of tokens | outside the clip range that this objective sets
Lengths
  rollout/length_mean | tokens | mean number of sampled tokens in a response
  rollout/length_max | tokens | largest number of sampled tokens in a response
  rollout/truncated | share | responses that reached the length limit
  rollout/with_advantage | share | responses whose advantage is not 0
  environment/turns | | mean number of sampled turns in a trajectory
  environment/splits | | trajectories split because a client's history differs from the samples
  environment/failed | trajectories | the environment failed; not trained
  environment/reward_<part> | | mean of a part of the reward that the environment names
  ledger/dispatched | prompts | sent to the engine so far, restarts included
  ledger/trained | prompts | trained so far
  ledger/in_flight | prompts | in flight, trained in a later step (`rollout.max_staleness`)
  ledger/dropped_equal | prompts | dropped by dynamic sampling so far, because rewards are equal
Mismatch
  mismatch/logprob_gap_mean | nats | mean |engine - trainer| log-prob of the same tokens
  mismatch/logprob_gap_max | nats | largest of them
  mismatch/kl | nats | mean (engine - trainer) log-prob: estimates KL(engine || trainer)
  mismatch/canary | nats | mean |engine - trainer| log-prob of the canary's tokens, before serving
  rollout/staleness | versions | from the weights that sampled to the current ones; mean over tokens
  rollout/staleness_max | versions | the same, of the oldest sampled token
  sync/verified_tensors | tensors | read back from the engine and equal to those that were sent
  sync/restarts | | engine restarts during the weight update
  rollout_correction/weight | | mean truncated importance weight trainer / engine
  rollout_correction/truncated | share of tokens | the weight is at its cap
Optimisation
  loss/policy | | policy loss of the step
  policy/entropy | nats | mean entropy of trained tokens
  policy/clipped | share of tokens | ratio outside the clip range
  policy/no_gradient | share of tokens | clipping removes their gradient
  kl/reference | nats | mean KL estimate to the initial policy, with `algorithm.kl_coef`
  optimizer/grad_norm | | global L2 norm before clipping
  optimizer/lr | | learning rate
  optimizer/skipped | share of updates | skipped, because a gradient was not finite, or a spike
  train/tokens | tokens | trained prompt and response tokens, over all ranks and epochs
Experts
  moe/load_max | | tokens of a layer's busiest expert / mean over its experts, mean over layers
  moe/load_min | | the same of the least busy expert
  moe/idle_experts | share | experts that got no token in the step
  moe/router_mismatch | share | tokens x layers for which the trainer's router chooses other experts
Time
  time/sleep_s | s | with `rollout.sleep`: the engines release their GPU memory
  time/offload_s | s | with `megatron.offload`: trainer state to the host
  time/onload_s | s | with `megatron.offload`: trainer state to the devices, before training
  time/score_s | s | part of `train`: log-probs of the old and of the initial policy
  time/checkpoint_s | s | training waited for a checkpoint, after the step before this one
  time/<phase>_s | s | a phase; `step`: the whole step; `verify` and `canary` are parts of `sync`
Throughput
  throughput/response_tokens_per_s | tokens/s | response tokens / seconds of the rollout phase
  throughput/trained_tokens_per_s | tokens/s | `train/tokens` / seconds of the training phase
  throughput/generated_tokens_per_s_per_gpu | tokens/s | response tokens / (step seconds x ranks)
  throughput/trained_tokens_per_s_per_gpu | tokens/s | `train/tokens` / (step seconds x ranks)
  throughput/mfu | share | model FLOPs / (training seconds x GPUs x peak FLOP/s); bfloat16 only
System
  system/rss_gib | GiB | memory of rank 0's process
  system/host_memory_gib | GiB | memory in use on rank 0's machine
  system/offloaded_gib | GiB | with `megatron.offload`: rank 0's host memory for offloaded state
  system/gpu_memory_gib | GiB | memory in use on rank 0's GPU
  system/gpu_peak_allocated_gib | GiB | peak of rank 0's torch allocations
"""
_PLACEHOLDERS = {"g": r"\d+", "k": r"\d+", "objective": r"\w+", "phase": r"\w+", "part": r".+"}


def _parse(table: str) -> dict[str, dict[str, tuple[str, str]]]:
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            rows = found[line] = {}
            continue
        name, unit, meaning = (cell.strip() for cell in line.split("|", 2))
        rows[name] = (unit, meaning)
    return found


METRICS = _parse(_TABLE)
"""``{category: {name: (unit, meaning)}}``."""


def as_pattern(name: str) -> str:
    """A regular expression for the metrics that a name of :data:`METRICS` stands for."""
    return "^" + re.sub("<(.*?)>", lambda placeholder: _PLACEHOLDERS[placeholder[1]], name) + "$"


def render_table() -> str:
    """:data:`METRICS` in Markdown."""
    blocks = []
    for category, names in METRICS.items():
        rows = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in names.items()]
        head = [f"### {category}\n", "| name | unit | meaning |", "|---|---|---|"]
        blocks.append("\n".join([*head, *rows]))
    return "\n\n".join(blocks) + "\n"


@dataclass(frozen=True)
class Chart:
    """Curves over steps, in the report, in ``learning_curve.png`` and on TensorBoard's "Custom
    Scalars" page.

    Attributes:
        title: what the chart shows.
        metrics: names of :data:`METRICS`, separated by spaces; each metric that they stand for is a
            curve.
        floor: the vertical axis includes 0.
        log: the vertical axis is logarithmic.
        band: suffixes of the metrics at the lower and the upper end of a curve's band.
        stacked: curves are stacked areas.
    """

    title: str
    metrics: str
    floor: bool = True
    log: bool = False
    band: tuple[str, str] | None = None
    stacked: bool = False

    @property
    def patterns(self) -> list[str]:
        """Regular expressions of the metrics."""
        return [as_pattern(name) for name in self.metrics.split()]


INTERVAL, EXTREMES = ("_low", "_high"), ("_min", "_max")
REWARD = Chart("Reward (mean ± standard error)", "reward/mean")
GROUP_ENTROPY = Chart("Entropy by group (nats)", "group<g>/entropy")
PHASES = Chart("Seconds by phase", "time/<phase>_s", stacked=True)
_EVALUATION = "Held-out prompts: avg@k and pass@k, with intervals"
_RATIO = "Importance ratio by group (mean, range)"
_GAP = "mismatch/logprob_gap_mean mismatch/logprob_gap_max"
_THROUGHPUT = "throughput/response_tokens_per_s throughput/trained_tokens_per_s"
_WOULD_CLIP = "Share of tokens outside the clip range, here and of others"
_ENVIRONMENT = "Turns of a trajectory, splits and failures of a step"
CHARTS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        REWARD,
        Chart(_EVALUATION, "eval/avg@<k> eval/pass@<k>", band=INTERVAL),
        Chart("Share of prompts solved by all, by none", "reward/solved_all reward/solved_none"),
    ),
    "Entropy groups": (
        GROUP_ENTROPY,
        Chart("Clip range by group (ε)", "group<g>/epsilon"),
        Chart(_RATIO, "group<g>/ratio", floor=False, band=EXTREMES),
        Chart("Share of a group without gradient (clipped)", "group<g>/no_gradient"),
        Chart(_WOULD_CLIP, "policy/clipped would_clip/<objective>"),
    ),
    "Responses and the engine": (
        Chart("Response length (tokens)", "rollout/length_mean rollout/length_max"),
        Chart("Share truncated, with advantage", "rollout/truncated rollout/with_advantage"),
        Chart(_ENVIRONMENT, "environment/turns environment/splits environment/failed"),
        Chart("|engine − trainer| log-prob (nats)", _GAP, floor=False, log=True),
    ),
    "Optimisation": (
        Chart("Entropy of trained tokens (nats)", "policy/entropy"),
        Chart("Gradient norm before clipping", "optimizer/grad_norm"),
        Chart("Learning rate", "optimizer/lr"),
        Chart("KL to the initial policy (nats)", "kl/reference"),
    ),
    "Time and machine": (
        PHASES,
        Chart("Tokens a second", _THROUGHPUT),
        Chart("Model FLOPs utilisation", "throughput/mfu"),
        Chart("Memory (GiB)", " ".join(METRICS["System"])),
    ),
}


def board_layout() -> dict[str, dict[str, list]]:
    """TensorBoard's "Custom Scalars" page: category -> chart -> regular expressions of the tags in
    it.
    """
    return {
        category: {chart.title: ["Multiline", chart.patterns] for chart in charts}
        for category, charts in CHARTS.items()
    }


if __name__ == "__main__":
    print(render_table(), end="")
