"""Metrics equal means over all tokens, and can be drawn."""

import json
import math
import warnings

import pytest
import torch
import torch.distributed as dist

from megatron_espo.algo import LossInputs, load_objective
from megatron_espo.config import Algorithm
from megatron_espo.monitoring.metrics import (
    average_steps,
    loss_metrics,
    reduce_metrics_everywhere,
    rollout_metrics,
    step_line,
)
from megatron_espo.monitoring.report import draw_learning_curve, write_summary
from megatron_espo.monitoring.throughput import describe, performance
from megatron_espo.types import Prompt, Trajectory
from tests.support.distributed import run_ranks
from tests.support.trajectories import single_turn

VOCAB = 131


def report(lengths: list[int], seed: int):
    """``(loss_metrics, per-token tensors)`` of one micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths, dtype=torch.long)
    tokens = int(lengths.sum())
    logprob, old, rollout = (-torch.rand(tokens, generator=generator) for _ in range(3))
    entropy = torch.rand(tokens, generator=generator) * 4
    objective = load_objective(Algorithm(quantiles=(0.3, 0.8)))
    totals = {"num_responses": 9, "num_tokens": 99}
    segments = objective.segment_tokens(entropy, lengths, vocab_size=VOCAB, **totals)
    inputs = LossInputs(logprob, old, torch.ones(tokens), segments)
    result = objective.loss(inputs)
    clipped_low, clipped_high = objective.clipped(inputs, result)
    per_token = {
        "entropy": entropy,
        "epsilon": segments.low,
        "ratio": result.ratio,
        "clipped_low": clipped_low,
        "clipped_high": clipped_high,
        "no_gradient": result.no_gradient,
        "group": segments.group,
        "gap": (old - rollout).abs(),
        "kl": rollout - old,
        "grpo": ((logprob - old).exp() - 1).abs() > 0.2,
        "extra": logprob * 2,
    }
    extra = {"extra": per_token["extra"]}
    return loss_metrics(objective, inputs, result, rollout, extra), per_token, result.loss


def expected_metrics(reports) -> dict[str, float]:
    """Means over the concatenation of all tokens."""
    joined = {
        name: torch.cat([per_token[name] for _, per_token, _ in reports]) for name in reports[0][1]
    }
    answer = {
        "mismatch/logprob_gap_mean": joined["gap"].mean(),
        "mismatch/logprob_gap_max": joined["gap"].max(),
        "mismatch/kl": joined["kl"].mean(),
        "would_clip/grpo": joined["grpo"].float().mean(),
        "policy/entropy": joined["entropy"].mean(),
        "policy/clipped": (joined["clipped_low"] | joined["clipped_high"]).float().mean(),
        "policy/no_gradient": joined["no_gradient"].float().mean(),
        "extra": joined["extra"].mean(),
        "loss/policy": sum(loss for *_, loss in reports),
    }
    for group in range(3):
        member = joined["group"] == group
        for name in ("entropy", "epsilon", "ratio", "clipped_low", "clipped_high", "no_gradient"):
            answer[f"group{group}/{name}"] = joined[name][member].float().mean()
        answer[f"group{group}/ratio_min"] = joined["ratio"][member].min()
        answer[f"group{group}/ratio_max"] = joined["ratio"][member].max()
    return {name: float(value) for name, value in answer.items()}


def check(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys() | {"would_clip/gspo"}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_micro_batches_give_means_over_all_tokens(one_rank):
    # An empty one takes part too, as on a data-parallel rank with fewer sequences.
    reports = [report([3, 1, 8], seed=1), report([], seed=2), report([5, 30], seed=3)]
    found = reduce_metrics_everywhere([metrics for metrics, *_ in reports], one_rank)
    check(found, expected_metrics(reports))
    assert 0 < found["would_clip/grpo"] < found["would_clip/gspo"] <= 1


def test_ranks_give_means_over_all_tokens():
    found = run_ranks(2, "tests.test_metrics:reduce_on_ranks")
    check(
        found, expected_metrics([report([3, 7], seed=0), report([9], seed=1), report([4], seed=2)])
    )


def reduce_on_ranks() -> dict[str, float]:
    """Runs on two ranks: one micro-batch with tokens on the first, two on the second."""
    reports = [
        [report([3, 7], seed=0), report([], seed=5)],
        [report([9], seed=1), report([4], seed=2)],
    ][dist.get_rank()]
    return reduce_metrics_everywhere([metrics for metrics, *_ in reports], dist.group.WORLD)


def test_group_without_tokens_reports_nothing(one_rank):
    # One token: it is the highest group's, the others are empty.
    found = reduce_metrics_everywhere([report([1], seed=1)[0]], one_rank)
    assert not any(name.startswith(("group0/", "group1/")) for name in found)
    assert (
        found["group2/ratio_min"]
        == found["group2/ratio_max"]
        == pytest.approx(found["group2/ratio"])
    )


def test_step_without_tokens_reports_its_loss_alone(one_rank):
    assert reduce_metrics_everywhere([report([], seed=1)[0]], one_rank) == {"loss/policy": 0.0}


def test_nan_is_shown(one_rank):
    metrics = report([2], seed=1)[0]
    names = {"loss/policy": "total/", "mismatch/logprob_gap_max": "max/"}
    metrics |= {kind + name: torch.tensor(math.nan) for name, kind in names.items()}
    found = reduce_metrics_everywhere([metrics], one_rank)
    assert all(math.isnan(found[name]) for name in names)


def test_rollout_metrics():
    prompt = Prompt("p", "text", "answer", (1,))

    def rollout(length: int, finish_reason: str = "stop") -> Trajectory:
        return single_turn(prompt, (7,) * length, (-1.0,) * length, 0, finish_reason, "text")

    rollouts = [
        [rollout(1), rollout(2)],
        [rollout(3), rollout(4, "length")],
        [rollout(5), rollout(6)],
    ] * 2
    nan = math.nan
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, nan], [nan, nan], [0.5, 0.5]])
    advantages = torch.tensor([[0.0, 0.0], [-0.7, 0.7], *[[0.0, 0.0]] * 4])
    found = rollout_metrics(rollouts, rewards, advantages)
    ran = [1, 1, 0, 1, 0, 0, 1, 0.5, 0.5]
    mean = sum(ran) / 9
    std = math.sqrt(sum((r - mean) ** 2 for r in ran) / 8)
    assert found == pytest.approx(
        {
            "reward/mean": mean,
            "reward/std": std,
            "reward/standard_error": std / 3,
            "reward/equal_groups": 5 / 6,
            "reward/solved_all": 2 / 6,
            "reward/solved_none": 1 / 6,
            "reward/failed": 3,
            "rollout/with_advantage": 2 / 12,
            "rollout/length_mean": 3.5,
            "rollout/length_max": 6,
            "rollout/truncated": 2 / 12,
            "environment/failed": 0,
            "environment/turns": 1,
            "environment/splits": 0,
        }
    )


def make_lines(rewards: list[float]) -> list[dict[str, float]]:
    return [
        {
            "reward/mean": reward,
            "reward/standard_error": 0.1,
            "rollout/length_mean": 7.25,
            "optimizer/grad_norm": 0.5,
            "mismatch/logprob_gap_mean": 2e-4,
            "group0/entropy": 0.1 + 0.01 * step,
            "group1/entropy": 2.0 - 0.01 * step,
            "time/rollout_s": 3.0 + step,
            "time/train_s": 2.0,
            "time/step_s": 5.5 + step,
        }
        for step, reward in enumerate(rewards, 1)
    ]


def write_lines(folder, lines: list[dict[str, float]]) -> None:
    rows = [json.dumps({"step": step} | line) + "\n" for step, line in enumerate(lines, 1)]
    (folder / "metrics.jsonl").write_text("".join(rows))


def test_step_line():
    assert step_line(2, 30, make_lines([0.25, 0.5])[1]) == (
        "step 2/30  reward 0.500  length 7.2  grad norm 0.50  log-prob gap 2.0e-04  "
        "7.5 s (rollout 5.0 train 2.0)"
    )


def test_step_that_trained_nothing_is_shown(tmp_path):
    lines = make_lines([1.0, 1.0])
    trained = ("group", "mismatch")
    lines[0] = {name: value for name, value in lines[0].items() if not name.startswith(trained)}
    assert "log-prob gap none trained" in step_line(1, 2, lines[0])
    write_lines(tmp_path, lines[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_learning_curve(tmp_path)
        write_lines(tmp_path, lines)
        draw_learning_curve(tmp_path)


def test_summary(tmp_path):
    write_lines(tmp_path, make_lines([0.0, 0.1, 0.2, 5.0, 0.5, 0.9, 1.0]))
    summary = write_summary(tmp_path, seconds=12.345, seed=4)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    del summary["performance"]
    expected = {"reward_first3": 0.1, "reward_last3": 0.8, "steps": 7, "seconds": 12.3, "seed": 4}
    assert summary == pytest.approx(expected)


def test_performance_of_a_run():
    rate = "throughput/{}_tokens_per_s_per_gpu".format
    lines = [
        {"time/step_s": 10.0, "time/train_s": 6.0, "time/score_s": 2.0, "time/sync_s": 1.0}
        | {"time/canary_s": 0.5, rate("generated"): 100.0, rate("trained"): 50.0},
        {"time/step_s": 30.0, "time/train_s": 14.0, "time/sync_s": 1.0, "time/checkpoint_s": 2.0}
        | {rate("generated"): 200.0, rate("trained"): 90.0},
    ]
    found = performance(lines, checkpoint_s=6.0)
    # 40 s of steps and 8 s of checkpoints.
    assert found["step_s"] == 24.0 and found["mfu"] is None
    assert found["tokens_per_s_per_gpu"] == {"generated": 175.0, "trained": 80.0}
    seconds = {"rollout": 0.0, "reward": 0.0, "score": 2.0, "train": 18.0, "weight update": 2.0}
    seconds |= {"checkpoint": 8.0, "other": 18.0}
    assert found["phases"] == {
        name: {"seconds": value / 2, "share": value / 48} for name, value in seconds.items()
    }
    assert describe(found)[1].endswith("175.0 generated, 80.0 trained; MFU of training: n/a")
    on_gpu = [line | {"throughput/mfu": mfu} for line, mfu in zip(lines, (0.2, 0.4), strict=True)]
    assert performance(on_gpu)["mfu"] == pytest.approx((0.2 * 6 + 0.4 * 14) / 20)


@pytest.mark.parametrize(
    "rewards", [[0.2, 0.4, 0.9], [-0.9, -0.7, -0.2], [0.5]], ids=["usual", "negative", "one step"]
)
def test_learning_curve_shows_each_curve(tmp_path, rewards):
    from matplotlib.image import imread

    write_lines(tmp_path, make_lines(rewards))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_learning_curve(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = torch.from_numpy(imread(path))[..., :3]
    # The first color draws the reward in the first third of the picture.
    blue = (image - torch.tensor([0x0B, 0x6F, 0xB8]) / 255).abs().amax(-1) < 0.02
    assert blue[:, : image.size(1) // 3].sum() > 30
    for third in image.chunk(3, dim=1):
        assert third.std() > 0.05


def test_several_optimizer_steps_keep_extremes():
    steps = [
        {"a": 1.0, "gap_max": 3.0, "ratio_min": 0.5},
        {"a": 3.0, "gap_max": 1.0, "ratio_min": 0.7, "b": 2.0},
    ]
    assert average_steps(steps) == {"a": 2.0, "gap_max": 3.0, "ratio_min": 0.5, "b": 2.0}
