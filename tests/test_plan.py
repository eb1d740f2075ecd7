"""``megatron-espo plan``: parameters, the weight transfer, the pipeline, what it prints."""

from dataclasses import replace
from math import ceil
from types import SimpleNamespace

import pytest
import torch
import yaml

from megatron_espo.plan.pipeline import Pipeline
from megatron_espo.weights.families import model_groups
from tests.distributed import run_ranks
from tests.plan_models import LLAMA_3_70B, QWEN2_5_72B, QWEN3_235B_A22B, QWEN3_SMALL, plan_command

TP8_PP4 = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "sequence_parallel": True}
TP8_PP5_VPP4 = TP8_PP4 | {"pipeline_model_parallel_size": 5, "virtual_pipeline_model_parallel_size": 4}
TP4_PP2_EP16 = {
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 16,
    "sequence_parallel": True,
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def hf_shapes(hf_config) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers' own model has them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {name: value for name, value in hf_config.items() if name not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf_config["model_type"], **sizes))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def per_gpu(hf, tp: int, layers: int, first: bool, last: bool) -> int:
    """Parameters of one rank of a dense model without tied embeddings, written out by hand."""
    h, f, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    qkv = (heads + 2 * hf["num_key_value_heads"]) * (h // heads)
    bias = qkv // tp if hf["model_type"] == "qwen2" else 0
    layer = 2 * h + (qkv * h + h * h + 3 * f * h) // tp + bias
    return layers * layer + (first + last) * ceil(hf["vocab_size"] / tp) * h + last * h


@pytest.mark.parametrize(
    "hf_config, gpus, layout, total",
    [
        pytest.param(LLAMA_3_70B, 64, TP8_PP4, 70_553_706_496, id="Llama-3-70B, 64"),
        pytest.param(LLAMA_3_70B, 520, TP8_PP5_VPP4, 70_553_706_496, id="Llama-3-70B, 520, interleaved"),
        pytest.param(QWEN2_5_72B, 512, TP8_PP4, 72_706_203_648, id="Qwen2.5-72B, 512"),
    ],
)
def test_big_models_are_counted_and_every_tensor_is_sent_once(tmp_path, hf_config, gpus, layout, total):
    code, text, plan = plan_command(tmp_path, hf_config, "--gpus", str(gpus), megatron=layout, rollout={"tensor_parallel_size": 8})
    assert code in (0, 1), text
    shapes = hf_shapes(hf_config)
    assert plan["total_parameters"] == total == sum(torch.Size(shape).numel() for shape in shapes.values())
    stages = plan["parameters"]
    assert sum(stage["whole"] for stage in stages) == total
    tp, pp = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    for stage in stages:
        position = stage["stage"]
        assert stage["per_gpu"] == per_gpu(hf_config, tp, 80 // pp, position == 0, position == pp - 1)
    memory = plan["memory"][0]
    assert memory["weights"] == pytest.approx(2 * stages[0]["per_gpu"], rel=1e-5)  # DDP pads its buffers a little
    assert memory["gradients"] == 2 * memory["weights"]
    assert memory["main_weights"] * plan["data_parallel_size"] == pytest.approx(2 * memory["weights"], rel=1e-5)
    assert memory["adam"] == 2 * memory["main_weights"]
    check_transfer(plan, shapes)


def check_transfer(plan, shapes) -> None:
    """Number and bytes of the transfer's tensors."""
    groups = plan["transfer"]["groups"]
    assert sum(group["tensors"] for group in groups) == len(shapes)
    assert sum(group["gathered_bytes"] for group in groups) == plan["transfer"]["bytes"] == 2 * sum(torch.Size(s).numel() for s in shapes.values())


def test_engines_on_other_machines_take_the_network_and_none_of_the_trainers_memory(tmp_path):
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    plans = {}
    for transport in ("auto", "files"):
        rollout = {"hosts": ["10.0.0.5:7700", "10.0.0.6:7700"], "tensor_parallel_size": 2, "transport": transport, "max_model_len": 4096}
        code, text, plans[transport] = plan_command(tmp_path, QWEN3_SMALL, "--network-gbps", "80", megatron=sizes, rollout=rollout)
        assert code == 0 and "vLLM: 1 x 2 of other machines' GPUs" in text, text
        assert [stage["engine"] for stage in plans[transport]["memory"]] == [0, 0]
    of_nccl, of_files = (plan["transfer"] for plan in plans.values())
    assert (of_nccl["transport"], of_nccl["engine_s"]) == ("nccl", of_nccl["bytes"] / 10e9)
    assert of_files["engine_s"] == 2 * of_files["bytes"] / 10e9, "into the shared folder and out of it"
    groups = [group["gathered_bytes"] for group in of_files["groups"]]
    assert (of_nccl["file_bytes"], of_files["file_bytes"]) == (0, max(groups[::2]) + max(groups[1::2]))


def test_experts_are_counted_and_sent_once(tmp_path):
    code, text, plan = plan_command(tmp_path, QWEN3_235B_A22B, "--gpus", "256", megatron=TP4_PP2_EP16)
    assert code in (0, 1), text
    shapes = hf_shapes(QWEN3_235B_A22B)
    if not any(".experts.0." in name for name in shapes):  # transformers 5 stacks a layer's experts
        shapes = {name: shape for group in model_groups(QWEN3_235B_A22B) for m in group for name, shape in m.huggingface}
    assert plan["total_parameters"] == 235_093_634_560
    check_transfer(plan, shapes)


@pytest.mark.slow
def test_memory_of_the_transfer_is_what_the_ranks_really_take(tmp_path):
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    small = QWEN3_SMALL | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1025, "num_hidden_layers": 2}
    model = {"path": str(tmp_path), "dtype": "float32"}
    _, text, plan = plan_command(tmp_path, small, megatron=sizes, model=model, rollout={"transport": "nccl"})
    assert plan, text
    real = run_ranks(4, "tests.ranks.plan:stream_peak", folder=str(tmp_path), sizes=sizes)
    assert plan["transfer"]["sender"] == "rank 0"
    # gloo gathers into memory of its own first, and its threads let go of it late; NCCL does neither.
    buffer = max(group["gathered_bytes"] for group in plan["transfer"]["groups"]) / 16
    assert plan["transfer"]["peak_bytes"] <= real <= plan["transfer"]["peak_bytes"] + 4 * buffer


def simulate_1f1b(stages: int, micro_batches: int) -> tuple[float, list[int]]:
    """Idle share and most micro-batches in flight of each stage when a forward and a backward pass take 1 and 2."""
    order = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, micro_batches)
        steady = [item for i in range(micro_batches - warm_up) for item in (("f", warm_up + i), ("b", i))]
        order.append([("f", i) for i in range(warm_up)] + steady + [("b", i) for i in range(micro_batches - warm_up, micro_batches)])
    done: dict[tuple[str, int, int], int] = {}
    clock, position = [0] * stages, [0] * stages
    while any(position[s] < len(order[s]) for s in range(stages)):
        for s in range(stages):
            if position[s] == len(order[s]):
                continue
            kind, i = order[s][position[s]]
            before = ("f", i, s - 1) if kind == "f" else ("b", i, s + 1)
            if 0 <= before[2] < stages and before not in done:
                continue
            clock[s] = max(clock[s], done.get(before, 0)) + (1 if kind == "f" else 2)
            done[kind, i, s] = clock[s]
            position[s] += 1
    flying = []
    for steps in order:
        held = [sum(1 if kind == "f" else -1 for kind, _ in steps[: n + 1]) for n in range(len(steps))]
        flying.append(max(held))
    return 1 - 3 * micro_batches / max(clock), flying


@pytest.mark.parametrize("stages, micro_batches", [(1, 3), (4, 2), (4, 4), (4, 32), (8, 11)])
def test_bubble_and_micro_batches_in_flight_are_those_of_1f1b(stages, micro_batches):
    from megatron_espo.plan.pipeline import plan_pipeline

    config = SimpleNamespace(
        megatron=SimpleNamespace(
            pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=None, max_tokens_per_micro_batch=100,
            micro_batch_size=None,
        ),
        rollout=SimpleNamespace(max_model_len=50, max_response_tokens=25, prompts_per_step=micro_batches * 2, group_size=4),
        algorithm=SimpleNamespace(num_mini_batches=1),
    )  # fmt: skip
    pipeline = plan_pipeline(config, {}, data_parallel_size=2, expected_tokens=25)  # four responses in a micro-batch
    idle, flying = simulate_1f1b(stages, micro_batches)
    assert pipeline.micro_batches == micro_batches
    assert pipeline.bubble == pytest.approx(idle)
    assert [pipeline.in_flight(stage) for stage in range(stages)] == flying


def test_interleaving_keeps_more_in_flight_and_idles_less():
    """Warm-up of Megatron's interleaved schedule: 2 (PP - stage - 1) + (VPP - 1) PP forward passes, then one more."""
    pipeline = Pipeline(4, 2, 1, 1, 8, 3 / (2 * 8 + 3))
    assert [pipeline.in_flight(stage) for stage in range(4)] == [11, 9, 7, 5]
    assert replace(pipeline, micro_batches=4).in_flight(0) == 8  # no more than there are


def test_it_prints_a_table_of_100_columns_and_a_verdict(tmp_path):
    layout = {"megatron": TP8_PP4 | RECOMPUTE, "rollout": {"tensor_parallel_size": 8}}
    code, text, plan = plan_command(tmp_path, LLAMA_3_70B, "--gpus", "64", **layout)
    assert code == 0 and plan["fits"] and not plan["problems"]
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[-1].startswith("fits: ")
    assert "70,553,706,496" in text and "2,270,765,056" in text
    # What the formula of the sync says, by hand: all bytes over NVLink once less one rank's, over the network once.
    size = 2 * 70_553_706_496
    norms = 2 * (161 * 8192)  # held whole by every rank: not gathered
    assert plan["transfer"]["gather_s"] == pytest.approx((size - norms) * 7 / 8 / 450e9, rel=1e-6)
    assert plan["transfer"]["pipeline_s"] == pytest.approx(size / 50e9)


def test_of_phases_that_take_turns_the_worst_counts_not_their_sum(tmp_path):
    leaves = ["optimizer", "gradients", "weights"]
    turns = {"megatron": TP8_PP4 | RECOMPUTE | {"offload": leaves}}
    turns["rollout"] = {"tensor_parallel_size": 8, "sleep": True, "gpu_memory_utilization": 0.85}
    code, text, plan = plan_command(tmp_path, LLAMA_3_70B, "--gpus", "64", "--host-gbps", "80", **turns)
    assert code == 0 and max(map(len, text.splitlines())) <= 100 and "Trainer and engine in each phase of a step" in text
    first, other = plan["memory"][:2]  # only the first eight GPUs have an engine
    for stage, engine, engine_weights in ((first, 68 * 10**9, plan["engine"]["weight_bytes"]), (other, 0, 0)):
        weights, states = stage["weights"], stage["main_weights"] + stage["adam"]
        moment = stage["activations"] + max(stage["working"], stage["head"])
        assert stage["phases"] == {
            "training": [weights + stage["gradients"] + states + moment, 0],
            "sync": [weights + stage["sync"], engine_weights],
            "canary": [weights, engine],
            "rollouts": [0, engine],
        }
        assert stage["total"] == max(map(sum, stage["phases"].values()))
        assert stage["host"] == weights + states
    most = max(stage["host"] for stage in plan["memory"])
    assert plan["host_bytes"] == 8 * most and plan["offload_s"] == pytest.approx(2 * most / 10e9)


def test_what_does_not_fit_comes_with_a_change_that_does(tmp_path):
    layout = TP8_PP4 | {"pipeline_model_parallel_size": 2}
    code, text, plan = plan_command(tmp_path, LLAMA_3_70B, "--gpus", "64", megatron=layout)
    assert code == 1 and not plan["fits"]
    assert text.splitlines()[-1].startswith("does not fit") and "GB" in plan["problems"][0]
    assert plan["fixes"][0].startswith("rollout.sleep=true megatron.offload=[optimizer,gradients] megatron.recompute_granularity=full "), plan["fixes"]
    settings = plan["fixes"][0].rpartition(": ")[0].split()
    overrides = {}
    for setting in settings:
        section, _, rest = setting.partition(".")
        key, _, value = rest.partition("=")
        overrides.setdefault(section, {})[key] = yaml.safe_load(value)
    overrides["megatron"] = layout | overrides.get("megatron", {})
    code, text, _ = plan_command(tmp_path, LLAMA_3_70B, "--gpus", "64", **overrides)
    assert code == 0, text


@pytest.mark.parametrize(
    "options, changes, words",
    [
        (["--gpus", "60"], {}, ["megatron.tensor_model_parallel_size", "multiple of 32", "got 60"]),
        (["--gpus", "0"], {}, ["--gpus", "above 0"]),
        (["--gpu-memory", "80 apples"], {}, ["--gpu-memory", "80 apples"]),
        ([], {"model": {"path": "nowhere"}}, ["model.path", "config.json", "nowhere"]),
        ([], {"megatron": {"tensor_model_parallel_size": 3}}, ["tensor_model_parallel_size", "divisor", "got 3"]),
    ],
)
def test_mistakes_are_one_clear_message(tmp_path, options, changes, words):
    sections = {"megatron": TP8_PP4} | changes
    code, text, plan = plan_command(tmp_path, LLAMA_3_70B, *options, **sections)
    assert code == 2 and plan is None
    assert text.startswith("error: ") and "Traceback" not in text
    assert all(word in text for word in words), text
