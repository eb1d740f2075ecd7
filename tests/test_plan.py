"""``megatron-espo plan``: parameters, weight transfer, pipeline, output."""

from dataclasses import replace
from math import ceil

import pytest
import torch
import yaml

from megatron_espo.config import Config
from megatron_espo.data.packing import PackingSpec, TrainSequence, batch_totals, pack
from megatron_espo.models.registry import read_spec
from megatron_espo.tools.plan.memory import Pipeline, plan_engine, plan_pipeline
from tests.support.distributed import run_ranks
from tests.support.plan_models import (
    LLAMA_3_70B,
    QWEN2_5_72B,
    QWEN3_235B_A22B,
    QWEN3_SMALL,
    plan_command,
    sizes,
)
from tests.support.weights_models import checkpoint_of, load_spec, make_model, save_model

LLAMA = read_spec(LLAMA_3_70B)
TP8_PP4 = sizes(tensor_model=8, pipeline_model=4) | {"sequence_parallel": True}
TP8_PP5_VPP4 = TP8_PP4 | sizes(pipeline_model=5, virtual_pipeline_model=4)
TP4_PP2_EP16 = TP8_PP4 | sizes(tensor_model=4, pipeline_model=2, expert_model=16)
TP2_PP2 = sizes(tensor_model=2, pipeline_model=2)
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def hf_shapes(hf_config) -> dict[str, torch.Size]:
    """Names and shapes of transformers' own model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(hf_config)
    del settings["architectures"]
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def per_gpu(hf, tp: int, layers: int, first: bool, last: bool) -> int:
    """Parameters of one rank of a dense model without tied embeddings, written out by hand."""
    h, f, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    qkv = (heads + 2 * hf["num_key_value_heads"]) * (h // heads)
    bias = qkv // tp if hf["model_type"] == "qwen2" else 0
    layer = 2 * h + (qkv * h + h * h + 3 * f * h) // tp + bias
    return layers * layer + (first + last) * ceil(hf["vocab_size"] / tp) * h + last * h


def check_transfer(plan, shapes) -> None:
    """Bytes of the transfer's tensors."""
    groups, size = plan["transfer"]["groups"], 2 * sum(s.numel() for s in shapes.values())
    assert sum(bytes_ for _, bytes_ in groups) == plan["transfer"]["bytes"] == size


@pytest.mark.parametrize(
    "hf_config, gpus, layout, total",
    [
        pytest.param(LLAMA_3_70B, 64, TP8_PP4, 70_553_706_496, id="Llama-3-70B"),
        pytest.param(LLAMA_3_70B, 520, TP8_PP5_VPP4, 70_553_706_496, id="interleaved"),
        pytest.param(QWEN2_5_72B, 512, TP8_PP4, 72_706_203_648, id="Qwen2.5-72B"),
    ],
)
def test_parameters_of_big_models_and_bytes_of_the_transfer(
    tmp_path, hf_config, gpus, layout, total
):
    rollout = {"tensor_parallel_size": 8}
    code, text, plan = plan_command(
        tmp_path, hf_config, "--gpus", str(gpus), megatron=layout, rollout=rollout
    )
    assert code in (0, 1), text
    shapes = hf_shapes(hf_config)
    assert plan["total_parameters"] == total == sum(shape.numel() for shape in shapes.values())
    stages = plan["memory"]
    tp, pp = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    for i, stage in enumerate(stages):
        assert stage["stage"] == i
        assert stage["parameters"] == per_gpu(hf_config, tp, 80 // pp, i == 0, i == pp - 1)
    memory = stages[0]
    weights = memory["weights"]  # DDP pads its buffers by a few bytes
    assert weights == pytest.approx(2 * memory["parameters"], rel=1e-5)
    assert memory["gradients"] == 2 * weights
    main_weights = memory["main_weights"] * plan["data_parallel_size"]
    assert main_weights == pytest.approx(2 * weights, rel=1e-5)
    assert memory["adam"] == 2 * memory["main_weights"]
    check_transfer(plan, shapes)


@pytest.mark.parametrize("family", ["glm4", "glm4_moe", "deepseek_v2"])
def test_parameters_of_a_family(tmp_path, family):
    """A fused tensor and four norms; shared experts and routers with a bias; latent attention."""
    save_model(family, tmp_path, max_position_embeddings=4096)
    spec = load_spec(tmp_path)
    layout = TP2_PP2 | {"sequence_parallel": True}
    _, text, plan = plan_command(
        tmp_path, spec.hf_config, megatron=layout, rollout={"max_response_tokens": 32}
    )
    total = sum(tensor.numel() for tensor in checkpoint_of(make_model(family)).values())
    assert plan, text
    assert plan["total_parameters"] == total


def test_engines_on_other_machines_use_the_network_and_no_memory_of_the_trainer(tmp_path):
    plans = {}
    for transport in ("auto", "files"):
        rollout = {
            "hosts": ["10.0.0.5:7700", "10.0.0.6:7700"],
            "tensor_parallel_size": 2,
            "transport": transport,
            "max_model_len": 4096,
        }
        code, text, plan = plan_command(
            tmp_path, QWEN3_SMALL, "--network-gbps", "80", megatron=TP2_PP2, rollout=rollout
        )
        assert code == 0 and "vLLM: 1 x 2 of GPUs of their own" in text, text
        assert [stage["engine"] for stage in plan["memory"]] == [0, 0]
        plans[transport] = plan["transfer"]
    nccl, files = plans.values()
    assert (nccl["transport"], nccl["engine_s"]) == ("nccl", nccl["bytes"] / 10e9)
    # Once into the shared folder, once out of it.
    assert files["engine_s"] == 2 * files["bytes"] / 10e9


def test_ipc_needs_a_buffer_that_holds_the_largest_tensor(tmp_path):
    for vocab_size in (1000, 300_000):
        model = QWEN3_SMALL | {"vocab_size": vocab_size, "hidden_size": 2048}
        peaks = {}
        for transport in ("ipc", "nccl"):
            _, text, plan = plan_command(
                tmp_path, model, megatron=TP2_PP2, rollout={"transport": transport}
            )
            assert plan, text
            peaks[transport] = plan["transfer"]["peak_bytes"]
        assert peaks["ipc"] - peaks["nccl"] == max(1 << 30, 2 * vocab_size * 2048)


@pytest.mark.slow
def test_experts_are_counted_and_sent_once(tmp_path):
    code, text, plan = plan_command(
        tmp_path, QWEN3_235B_A22B, "--gpus", "256", megatron=TP4_PP2_EP16
    )
    assert code in (0, 1), text
    shapes = hf_shapes(QWEN3_235B_A22B)
    if not any(".experts.0." in name for name in shapes):  # transformers 5 stacks experts
        own = read_spec(QWEN3_235B_A22B).tensor_shapes
        shapes = {name: torch.Size(shape) for name, shape in own.items()}
    assert plan["total_parameters"] == 235_093_634_560
    check_transfer(plan, shapes)


@pytest.mark.slow
def test_memory_of_the_transfer_equals_a_measured_transfer(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    save_model("qwen3", tmp_path, vocab_size=1025, max_position_embeddings=4096, **shape)
    small = load_spec(tmp_path).hf_config
    model = {"path": str(tmp_path), "dtype": "float32"}
    _, text, plan = plan_command(
        tmp_path, small, megatron=TP2_PP2, model=model, rollout={"transport": "nccl"}
    )
    assert plan, text
    target = "tests.support.ranks.weights:stream_peak"
    options = {"sizes": TP2_PP2, "holds_last": True}
    real = run_ranks(4, target, folder=str(tmp_path), **options)["peak"]
    transfer = plan["transfer"]
    # gloo, unlike NCCL, gathers into its own memory first, and its threads free it late.
    buffer = max(bytes_ for _, bytes_ in transfer["groups"]) / 16
    assert transfer["peak_bytes"] <= real <= transfer["peak_bytes"] + 8 * buffer


def simulate_1f1b(stages: int, n: int) -> tuple[float, list[int]]:
    """Idle share, and the most micro-batches in flight on each stage.

    A forward pass of one of the ``n`` micro-batches takes 1, a backward pass 2.
    """
    order = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, n)
        steady = [item for i in range(n - warm_up) for item in (("f", warm_up + i), ("b", i))]
        cool_down = [("b", i) for i in range(n - warm_up, n)]
        order.append([("f", i) for i in range(warm_up)] + steady + cool_down)
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
    in_flight = []
    for steps in order:
        changes = [1 if kind == "f" else -1 for kind, _ in steps]
        in_flight.append(max(sum(changes[: k + 1]) for k in range(len(changes))))
    return 1 - 3 * n / max(clock), in_flight


def plan_config(**sections):
    """Settings of a model on which nothing depends."""
    base = {"model": {"path": "model"}, "data": {"prompts": "prompts.jsonl"}}
    return Config.model_validate(base | sections)


@pytest.mark.parametrize("stages, micro_batches", [(1, 3), (4, 2), (4, 4), (4, 32), (8, 11)])
def test_bubble_and_micro_batches_in_flight_equal_a_simulation_of_1f1b(stages, micro_batches):
    rollout = {"max_response_tokens": 25, "prompts_per_step": micro_batches * 2, "group_size": 4}
    config = plan_config(
        megatron=sizes(pipeline_model=stages) | {"max_tokens_per_micro_batch": 100},
        rollout=rollout | {"max_model_len": 50},
        algorithm={"num_mini_batches": 1},
    )
    # Four responses in a micro-batch.
    pipeline = plan_pipeline(config, LLAMA, data_parallel_size=2, expected_tokens=25)
    idle, in_flight = simulate_1f1b(stages, micro_batches)
    assert pipeline.micro_batches == micro_batches
    assert pipeline.bubble == pytest.approx(idle)
    assert [pipeline.in_flight(stage) for stage in range(stages)] == in_flight


def test_the_largest_micro_batch_has_the_longest_prompt_and_response():
    config = plan_config(
        megatron={"max_tokens_per_micro_batch": 20},
        rollout={"max_response_tokens": 10, "max_model_len": 50},
    )
    sequence = TrainSequence([1] * 40, [2] * 10, [-1.0] * 10, 1.0)
    totals = batch_totals([sequence], num_responses=1, num_response_tokens=10)
    (batch,) = pack([sequence], totals, PackingSpec(20, 0, 1))
    assert plan_pipeline(config, LLAMA, 1, None).tokens == batch.tokens.numel() == 50


def test_a_quantized_engine_has_matrices_of_one_byte_a_value():
    rollout = {"tensor_parallel_size": 8, "quantization": "fp8"}
    config = plan_config(rollout=rollout, algorithm={"rollout_correction": "token"})
    parameters = per_gpu(LLAMA_3_70B, 8, 80, True, True)
    whole, norms = per_gpu(LLAMA_3_70B, 8, 0, True, True), 80 * 2 * 8192
    engine = plan_engine(config, LLAMA, True, 80 * 10**9)
    assert engine.weight_bytes == parameters + whole + norms


def test_the_reference_policy_takes_host_memory(tmp_path):
    plans = [
        plan_command(tmp_path, QWEN3_SMALL, "--host-gbps", "80", algorithm={"kl_coef": kl})[2]
        for kl in (0.0, 0.1)
    ]
    weights = plans[0]["memory"][0]["weights"]
    assert [plan["host_bytes"] for plan in plans] == [0, weights]
    # To the host and back, once for the reference's weights and once for the model's own.
    assert [plan["offload_s"] for plan in plans] == [0, 4 * weights / 10e9]


def test_interleaving_keeps_more_in_flight_and_idles_less():
    """Megatron's warm-up: 2 (PP - stage - 1) + (VPP - 1) PP forward passes, then one more."""
    pipeline = Pipeline(4, 2, 1, 1, 8, 3 / (2 * 8 + 3))
    assert [pipeline.in_flight(stage) for stage in range(4)] == [11, 9, 7, 5]
    assert replace(pipeline, micro_batches=4).in_flight(0) == 8  # at most all of them


def test_it_prints_tables_of_100_columns_and_a_verdict(tmp_path):
    layout = {"megatron": TP8_PP4 | RECOMPUTE, "rollout": {"tensor_parallel_size": 8}}
    code, text, plan = plan_command(tmp_path, LLAMA_3_70B, "--gpus", "64", **layout)
    assert code == 0 and plan["fits"] and not plan["problems"]
    assert max(map(len, text.splitlines()[1:])) <= 100  # the first is the model's folder
    assert text.splitlines()[-1].startswith("fits: ")
    assert "70,553,706,496" in text and "2,270,765,056" in text
    # The estimate by hand: each of 8 GPUs receives an eighth over the network, then 7 over NVLink.
    size, transfer = 2 * 70_553_706_496, plan["transfer"]
    assert transfer["pipeline_s"] == pytest.approx(size / 8 / 50e9, rel=1e-6)
    assert transfer["gather_s"] == pytest.approx(size * 7 / 8 / 450e9, rel=1e-6)
    # Only the last gather of each layer has no batch to overlap with.
    assert transfer["pipeline_s"] < transfer["seconds"] < 1.1 * transfer["pipeline_s"]


def test_the_total_is_the_worst_phase_where_parts_are_offloaded(tmp_path):
    megatron = TP8_PP4 | RECOMPUTE | {"offload": ["optimizer", "gradients", "weights"]}
    rollout = {"tensor_parallel_size": 8, "sleep": True, "gpu_memory_utilization": 0.85}
    options = ("--gpus", "64", "--host-gbps", "80")
    code, text, plan = plan_command(
        tmp_path, LLAMA_3_70B, *options, megatron=megatron, rollout=rollout
    )
    assert code == 0 and max(map(len, text.splitlines()[1:])) <= 100
    assert "Trainer and engine in each phase of a step" in text
    first, other = plan["memory"][:2]  # only the first eight GPUs have an engine
    shared = (68 * 10**9, plan["engine"]["weight_bytes"])
    for stage, (engine, engine_weights) in ((first, shared), (other, (0, 0))):
        weights, states = stage["weights"], stage["main_weights"] + stage["adam"]
        moment = stage["activations"] + stage["working"]
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


def test_a_run_that_does_not_fit_gets_a_change_that_fits(tmp_path):
    layout = TP8_PP4 | sizes(pipeline_model=2)
    code, text, plan = plan_command(tmp_path, LLAMA_3_70B, "--gpus", "64", megatron=layout)
    assert code == 1 and not plan["fits"]
    assert text.splitlines()[-1].startswith("does not fit") and "GB" in plan["problems"][0]
    fix = plan["fix"].rpartition(": ")[0]
    offload = "megatron.offload=[optimizer,gradients]"
    assert f"rollout.sleep=true {offload} megatron.recompute_granularity=full " in fix
    assert offload in text
    overrides = {"megatron": layout}
    for setting in fix.split():
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        overrides[section] = overrides.get(section, {}) | {name: yaml.safe_load(value)}
    code, text, _ = plan_command(tmp_path, LLAMA_3_70B, "--gpus", "64", **overrides)
    assert code == 0, text


@pytest.mark.parametrize(
    "options, changes, words",
    [
        (["--gpus", "60"], {}, ["megatron.tensor_model_parallel_size", "multiple of 32", "got 60"]),
        (["--gpus", "0"], {}, ["--gpus", "above 0"]),
        (["--gpu-memory", "-80"], {}, ["--gpu-memory", "above 0"]),
        ([], {"algorithm": {"objective": "nowhere:X"}}, ["algorithm.objective", "nowhere:X"]),
        (["--json", "nowhere/plan.json"], {}, ["--json", "folder that exists"]),
        (["--json", "."], {}, ["--json: expected a file", "'.'"]),
    ],
)
def test_a_mistake_is_one_message(tmp_path, options, changes, words):
    sections = {"megatron": TP8_PP4} | changes
    code, text, plan = plan_command(tmp_path, LLAMA_3_70B, *options, **sections)
    assert code == 2 and plan is None
    assert text.startswith("error: ") and "Traceback" not in text
    assert all(word in text for word in words), text
