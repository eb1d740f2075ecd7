"""Logging of a step: TensorBoard, samples, throughput, Weights & Biases, documented names."""

import json
import re
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from megatron_espo.config import Config
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.models.registry import read_spec
from megatron_espo.monitoring.reporter import Reporter
from megatron_espo.monitoring.throughput import matmul_parameters, system_metrics, training_flops
from megatron_espo.types import Prompt
from tests.support.distributed import ROOT
from tests.support.documented import is_documented
from tests.support.trajectories import single_turn

HF = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 64,
    "vocab_size": 24,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
}


def make_config(folder: Path, **run) -> Config:
    sections = {
        "run": {"dir": str(folder), "steps": 2, **run},
        "model": {"path": "m"},
        "data": {"prompts": "reasoning_gym:chain_sum"},
    }
    return Config.model_validate(sections)


class OneRank:
    """A process group of one."""

    def rank(self) -> int:
        return 0


def make_reporter(folder: Path, **run) -> Reporter:
    runtime = types.SimpleNamespace(
        groups=types.SimpleNamespace(tp=OneRank(), cp=OneRank()), is_main=True, device="cpu"
    )
    tokenizer = types.SimpleNamespace(decode=lambda ids: "".join(f" {i}" for i in ids))
    reporter = Reporter(make_config(folder, **run), read_spec(HF), runtime, tokenizer)
    reporter.open(after_step=0)
    return reporter


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def two_groups() -> ScoredGroups:
    prompts = [Prompt("easy", "1 + 1", "2", (1, 2, 3)), Prompt("hard", "7 * 8", "56", (4, 5))]
    rollouts = [
        [single_turn(p, (10 + j, 11, 12), (-1.0,) * 3, 0, "stop", "text") for j in range(2)]
        for p in prompts
    ]
    return ScoredGroups(rollouts, torch.tensor([[1.0, 1.0], [0.0, 1.0]]), dispatched=2)


def test_a_step_is_written_everywhere(tmp_path, one_rank, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = make_reporter(tmp_path)
    groups, advantages = two_groups(), torch.tensor([[0.0, 0.0], [-1.0, 1.0]])
    assert reporter.start_step(groups) == {(1, 1): 0, (1, 0): 1}
    batch = types.SimpleNamespace(lengths=torch.tensor([3, 3]), logged_sample=(1, None))
    entropy = torch.tensor([0.1, 2.0, 0.2, 0.3, 3.0, 0.4])
    segments = types.SimpleNamespace(
        entropy=entropy,
        group=torch.tensor([0, 1, 0, 0, 1, 0]),
        response=torch.tensor([0, 0, 0, 1, 1, 1]),
        length=torch.tensor([3, 3]),
    )
    reporter.record(batch, segments)
    metrics = {"optimizer/grad_norm": 0.5, "train/tokens": 10.0, "mismatch/logprob_gap_mean": 0.3}
    reporter.write(1, groups, advantages, metrics, {"rollout": 2.0, "train": 4.0, "step": 7.0})
    reporter.close()

    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (
        line["throughput/response_tokens_per_s"] == 12 / 2
        and line["throughput/trained_tokens_per_s"] == 10 / 4
    )
    assert (
        line["entropy/boundary1"] == pytest.approx(2.5)
        and line["reward/mean"] == 0.75
        and line["time/step_s"] == 7
    )
    assert all(is_documented(name) for name in line if name != "step")
    first, second = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert (
        first["entropies"] is None
        and first["reward"] == 1
        and first["prompt_id"] == second["prompt_id"] == "hard"
    )
    assert (
        second["entropies"] == pytest.approx([0.1, 2.0, 0.2])
        and second["groups"] == [0, 1, 0]
        and second["pieces"] == [" 10", " 11", " 12"]
    )
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == line.keys() - {"step"}
    (event,) = board.Scalars("reward/mean")
    assert (event.step, event.value) == (1, 0.75)
    (histogram,) = map(json.loads, (tmp_path / "entropy.jsonl").read_text().splitlines())
    assert list(map(sum, histogram["counts"])) == [4, 2] and len(histogram["boundaries"]) == 1
    assert {"samples/0/text_summary", "samples/1/text_summary"} <= set(board.Tags()["tensors"])
    text = board.Tensors("samples/1/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reward **0.0**" in text and "    7 * 8" in text and text.endswith("    text")
    printed = capsys.readouterr().out
    assert (
        printed.startswith("step 1/2  reward 0.750")
        and "warning: mean |engine - trainer| log-prob gap 0.3 nats" in printed
    )


NOTHING_TRAINED = {"optimizer/grad_norm": 0.0, "train/tokens": 0.0}
SECONDS = {"train": 0.5, "step": 1.0}


def test_a_resumed_run_removes_later_steps(tmp_path, one_rank):
    reporter = make_reporter(tmp_path, samples_per_step=1)
    for step in (1, 2, 3):
        reporter.start_step(two_groups())
        reporter.write(step, two_groups(), torch.zeros(2, 2), NOTHING_TRAINED, SECONDS)
    reporter.close()
    written = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    reporter.open(after_step=3)
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == written, "nothing to remove"
    reporter.close()
    with pytest.MonkeyPatch.context() as disk:
        disk.setattr("os.fsync", Mock(side_effect=OSError("quota exceeded")))
        with pytest.raises(OSError, match="quota"):
            reporter.open(after_step=2)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3, "a full disk loses nothing"
    reporter.open(after_step=2)
    reporter.close()
    for name in ("metrics", "samples", "entropy"):
        assert [
            json.loads(line)["step"]
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ] == [1, 2], name


def test_no_samples_are_written_with_samples_per_step_0(tmp_path, one_rank):
    reporter = make_reporter(tmp_path, samples_per_step=0)
    assert reporter.start_step(two_groups()) == {}
    reporter.write(1, two_groups(), torch.zeros(2, 2), NOTHING_TRAINED, SECONDS)
    assert json.loads((tmp_path / "entropy.jsonl").read_text())["boundaries"] == [
        None
    ]  # NaN is no JSON
    assert not (tmp_path / "samples.jsonl").exists()


def test_names_in_the_source_are_in_the_table():
    """Every metric name in the source, such as "reward/mean", is in docs/metrics.md."""
    prefixes = "reward|rollout|mismatch|policy|loss|optimizer|train|ledger|sync|kl"
    prefixes += "|rollout_correction|throughput|system|eval|entropy"
    found = set()
    for path in (ROOT / "megatron_espo").rglob("*.py"):
        if path.name != "cases.py":
            found |= set(re.findall(rf'"((?:{prefixes})/[a-z_]+)"', path.read_text()))
    assert len(found) > 20 and {name for name in found if not is_documented(name)} == set()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flops_are_those_that_torch_counts(tmp_path, family):
    """torch counts all products of a real forward and backward, and the masked half of causal
    attention.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(
        family, **sizes, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    length = 24
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(1, length, dtype=torch.long)).logits.sum().backward()
    found = config.to_dict() | {"architectures": [type(model).__name__]}
    masked = 6 * 3 * 4 * 32 * length**2
    # torch also counts the few FLOPs of the rotary angles.
    assert counter.get_total_flops() - masked == pytest.approx(
        training_flops(read_spec(found), [length]), rel=1e-3
    )


def test_parameters_count_the_chosen_experts():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    mixture = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | experts
    counts = [matmul_parameters(read_spec(hf)) for hf in (HF | mixture, HF)]
    assert counts[0] - counts[1] == 3 * 8 * 16 + 8 * 4


def test_memory_is_this_machines():
    found = system_metrics()
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
    assert (
        0.01 < found["system/rss_gib"] <= peak + 0.01
        and found["system/host_memory_gib"] > found["system/rss_gib"] / 2
    )


def stand_in(calls: list, *names: str) -> types.ModuleType:
    """A module that records calls."""
    module = types.ModuleType("stand_in")
    for name in names:
        setattr(
            module,
            name,
            lambda *args, _name=name, **kwargs: calls.append((_name, args, kwargs)) or module,
        )
    return module


def test_wandb_copies_tensorboard(tmp_path, monkeypatch):
    """Uses a stand-in for the package and the service."""
    calls: list = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", stand_in(calls, "init"))
    make_reporter(tmp_path, wandb=True).close()
    ((_, _, options),) = calls
    assert options["name"] == str(tmp_path) and options["config"]["run"]["steps"] == 2
    assert options["sync_tensorboard"]  # wandb then sends what TensorBoard gets


def test_wandb_without_the_package_raises(tmp_path):
    with pytest.raises(InputError, match="run.wandb: expected the package wandb"):
        make_reporter(tmp_path, wandb=True)
