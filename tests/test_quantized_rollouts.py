"""Engines with fewer bits than the trainer: settings, and the audit of the served weights."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
from safetensors.torch import load_file
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend

from megatron_espo.config import load_config
from megatron_espo.distributed.checksum import tensor_sketch
from megatron_espo.errors import InputError
from megatron_espo.rollout import read_back
from megatron_espo.rollout.server import server_command
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.weights.verification import audit_quantization
from tests.support.distributed import run_ranks
from tests.support.real_engine import engine_config, running_engine
from tests.support.tiny import save_tiny_model

HIDDEN, FFN, EXPERTS = 32, 48, 3
PREFIX = "model.layers.0."


# -- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "algorithm.rollout_correction: expected token, .* with rollout.quantization fp8, got"),
        (
            ["algorithm.rollout_correction=token", "model.dtype=float32"],
            "rollout.quantization: expected null with model.dtype float32, got .fp8.",
        ),
        (
            ["algorithm.rollout_correction=token", "rollout.engine_args={quantization: mxfp8}"],
            "rollout.engine_args: .* use rollout.quantization",
        ),
    ],
)
def test_unsupported_combinations_are_refused(tmp_path, overrides, message):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\ndata: {prompts: p.jsonl}\nrollout: {quantization: fp8}\n")
    with pytest.raises(InputError, match=message) as caught:
        load_config(str(path), overrides)
    assert str(caught.value).count("expected") == 1
    load_config(str(path), ["algorithm.rollout_correction=geometric"])


@pytest.mark.parametrize(
    ("given", "argument"), [("fp8", "fp8_per_channel"), ("mxfp8", "mxfp8"), (None, None)]
)
def test_the_quantization_reaches_the_command_line(given, argument):
    command = server_command(engine_config("m", "f", quantization=given), [])
    found = command[command.index("--quantization") + 1] if argument else None
    assert found == argument and ("--quantization" in command) == bool(argument)


# -- sketches ------------------------------------------------------------------------------


def test_sketches_add_up_over_shards_and_estimate_norms():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 24, generator=draw)
    whole = tensor_sketch(matrix)
    blocks = [(r, c) for r in range(0, 40, 8) for c in (0, 10)]
    parts = [tensor_sketch(matrix[r : r + 8, c : c + 10 + c], r, c) for r, c in blocks]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-4)
    rank_one = torch.randn(200, 1, generator=draw) * torch.randn(1, 100, generator=draw)
    single = torch.zeros(300, 100)
    single[123, 45] = 7
    random, constant = torch.randn(500, 300, generator=draw), torch.ones(64, 64)
    for values in (random, single, constant, rank_one):
        estimate = tensor_sketch(values).square().mean().sqrt()
        assert 0.4 < estimate / values.norm() < 1.8
    # The mean over many matrices shows no bias: its standard error is 2 %.
    matrices = torch.randn(300, 16, 16, generator=draw)
    squares = [tensor_sketch(m, 16 * i).square().mean() for i, m in enumerate(matrices)]
    assert sum(squares) / len(squares) == pytest.approx(256, rel=0.08)


# -- the audit on layers as vLLM builds them ----------------------------------------------


class Kernel:
    """Multiplies with the dequantized weight, as a kernel does."""

    def apply(self, layer, x):
        weight = layer.weight.float() * getattr(layer, "weight_scale", 1)
        return nn.functional.linear(x.float(), weight).to(x.dtype)


def quantize(weight, dims=-1):
    """fp8 with one scale for all values along ``dims``."""
    scale = weight.abs().amax(dims, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def layer_of(kind, weight, rank, ranks, sizes=None):
    layer = object.__new__(kind)
    nn.Module.__init__(layer)
    layer.tp_rank, layer.tp_size, layer.quant_method = rank, ranks, Kernel()
    layer.output_sizes = [size * ranks for size in sizes or [len(weight)]]
    layer.output_partition_sizes = sizes or [len(weight)]
    layer.input_size = layer.input_size_per_partition = weight.shape[1]
    layer.weight, layer.weight_scale = quantize(weight)
    return layer


def make_weights():
    draw = torch.Generator().manual_seed(1)
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes["mlp.gate"] = (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for name in ("gate", "up", "down"):
            shape = (HIDDEN, FFN) if name == "down" else (FFN, HIDDEN)
            shapes[f"mlp.experts.{expert}.{name}_proj"] = shape
    return {
        f"{PREFIX}{name}.weight": torch.randn(shape, generator=draw).bfloat16()
        for name, shape in shapes.items()
    }


def make_model(weights, rank=0, ranks=1, dims=-1, block=None):
    """A layer with fused attention, a router in high precision, and experts; one rank's part."""

    def get(name, dim):
        return weights[f"{PREFIX}{name}.weight"].float().chunk(ranks, dim)[rank]

    attention, mlp, model = nn.Module(), nn.Module(), nn.Module()
    qkv = [get(f"self_attn.{name}_proj", 0) for name in "qkv"]
    sizes = [len(part) for part in qkv]
    kind = linear.QKVParallelLinear
    attention.qkv_proj = layer_of(kind, torch.cat(qkv), rank, ranks, sizes)
    output = get("self_attn.o_proj", 1)
    attention.o_proj = layer_of(linear.RowParallelLinear, output, rank, ranks)
    router = weights[f"{PREFIX}mlp.gate.weight"]
    mlp.gate = layer_of(linear.ReplicatedLinear, router.float(), rank, ranks)
    mlp.gate.weight, mlp.gate.weight_scale = router, 1
    experts = nn.Module()
    halves = [[get(f"mlp.experts.{e}.{n}_proj", 0) for n in ("gate", "up")] for e in range(EXPERTS)]
    w13 = torch.stack([torch.cat(pair) for pair in halves])
    w2 = torch.stack([get(f"mlp.experts.{e}.down_proj", 1) for e in range(EXPERTS)])
    if block:
        experts.weight_block_size = block
    for name, values in (("w13", w13), ("w2", w2)):
        scale_shape = values
        if block:  # one scale for each block
            scale_shape = nn.functional.max_pool2d(values.abs(), block, ceil_mode=True)
            scale = scale_shape / 448
            wide = scale.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
            codes = values / wide[:, : values.shape[1], : values.shape[2]]
            codes = codes.to(torch.float8_e4m3fn)
        else:
            codes, scale = quantize(values, dims)
        setattr(experts, f"{name}_weight", codes)
        setattr(experts, f"{name}_weight_scale", scale if block or dims == -1 else scale.view(-1))
    experts.quant_method = SimpleNamespace(fp8_backend=Fp8MoeBackend.TRITON)
    experts.moe_config = SimpleNamespace(
        intermediate_size_per_partition_unpadded=FFN // ranks,
        hidden_dim_unpadded=HIDDEN,
        tp_rank=rank,
    )
    experts.get_expert_mapping = lambda: RoutedExperts.build_expert_params_mapping(
        "gate_proj", "down_proj", "up_proj", EXPERTS, routed_experts_prefix=""
    )
    experts._map_global_expert_id_to_local_expert_id = lambda expert: expert
    mlp.experts = nn.Module()
    mlp.experts.routed_experts = experts
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module()])
    model.model.layers[0].self_attn, model.model.layers[0].mlp = attention, mlp
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return model


def audit(weights, models, monkeypatch):
    parts = []
    for rank, model in enumerate(models):
        monkeypatch.setattr(read_back, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        cpu = torch.device("cpu")
        parts.append(read_back.read_back_sketches(model, torch.bfloat16, cpu))
    engine = object.__new__(VLLMEngine)
    engine._worker = lambda *args, **kwargs: parts
    sent = {n: (float(w.float().norm()), tensor_sketch(w).tolist()) for n, w in weights.items()}
    rows, wrong = audit_quantization(sent, engine.read_back_sketches(), "fp8")
    return {row["name"].removeprefix(PREFIX): SimpleNamespace(**row) for row in rows}, wrong


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("dims", "block"), [(-1, None), ((-1, -2), None), (None, [16, 16])])
def test_a_right_quantization_passes(monkeypatch, ranks, dims, block):
    weights = make_weights()
    models = [make_model(weights, rank, ranks, dims, block) for rank in range(ranks)]
    rows, wrong = audit(weights, models, monkeypatch)
    assert wrong is None and len(rows) == len(weights)
    router = rows.pop("mlp.gate.weight")
    assert router.error < 0.005 and not router.quantized and router.dtype == "bfloat16"
    for row in rows.values():
        assert 0.01 < row.error < 0.05 and row.quantized and row.dtype == "float8_e4m3fn", row
    # The checksums cover what is not quantized.
    served = read_back.read_back_checksums(models[0], torch.bfloat16)
    assert ranks == 2 or served.keys() & weights.keys() == {f"{PREFIX}mlp.gate.weight"}


def find_faults(monkeypatch, change):
    """Change the model; return the audit's rows and the message."""
    weights = make_weights()
    model = make_model(weights)
    layer = model.model.layers[0]
    change(layer, layer.mlp.experts.routed_experts)
    return audit(weights, [model], monkeypatch)


def test_a_tensor_left_in_high_precision_is_named(monkeypatch):
    def change(layer, experts):
        layer.self_attn.o_proj.weight = make_weights()[f"{PREFIX}self_attn.o_proj.weight"]
        layer.self_attn.o_proj.weight_scale = 1

    rows, wrong = find_faults(monkeypatch, change)
    names = [name for name, row in rows.items() if not row.quantized]
    assert wrong is None and names == ["self_attn.o_proj.weight", "mlp.gate.weight"]


def test_exchanged_experts_are_named(monkeypatch):
    def change(layer, experts):
        for values in (experts.w2_weight, experts.w2_weight_scale):
            values.view(torch.uint8 if values.dtype.itemsize == 1 else torch.float32)[[0, 2]] = (
                values.view(torch.uint8 if values.dtype.itemsize == 1 else torch.float32)[[2, 0]]
            )

    _, wrong = find_faults(monkeypatch, change)
    name = rf"{PREFIX}mlp.experts.{{}}.down_proj.weight"
    for one, other in ((0, 2), (2, 0)):
        text = (
            rf"{name.format(one)} \(float8_e4m3fn\): relative error 1\.\d+, expected at most 0.1 "
        )
        assert re.search(text + rf"\(it holds the values of {name.format(other)}\)", wrong), wrong
    assert wrong.startswith("2 of ")


def test_a_wrong_layout_of_experts_is_named(monkeypatch):
    """Gate and up projection exchanged, and a weight in the layout of another kernel."""

    def change(layer, experts):
        experts.quant_method.fp8_backend = Fp8MoeBackend.FLASHINFER_CUTLASS

    _, wrong = find_faults(monkeypatch, change)
    assert wrong.startswith(f"{2 * EXPERTS} of ") and (
        f"it holds the values of {PREFIX}mlp.experts.0.up_proj.weight" in wrong
    )

    def shuffle(layer, experts):
        experts.w2_weight = experts.w2_weight.transpose(1, 2).reshape(experts.w2_weight.shape)

    _, wrong = find_faults(monkeypatch, shuffle)
    assert wrong.startswith(f"{EXPERTS} of ") and "holds" not in wrong


def test_a_wrong_scale_is_named(monkeypatch):
    def change(layer, experts):
        layer.self_attn.qkv_proj.weight_scale[HIDDEN : 2 * HIDDEN] *= 1.5
        experts.w13_weight_scale[1, :FFN] *= torch.nan

    rows, wrong = find_faults(monkeypatch, change)
    assert rows["self_attn.k_proj.weight"].error == pytest.approx(0.5, rel=0.5)
    assert wrong.startswith("2 of ") and f"{PREFIX}self_attn.k_proj.weight (float8" in wrong
    assert f"{PREFIX}mlp.experts.1.gate_proj.weight" in wrong


def test_experts_that_cannot_be_read_back_are_named(monkeypatch):
    def change(layer, experts):
        experts.quant_method.fp8_backend = Fp8MoeBackend.MARLIN

    rows, wrong = find_faults(monkeypatch, change)
    unknown = [name for name, row in rows.items() if row.error is None]
    assert wrong is None and len(unknown) == 3 * EXPERTS and all("experts" in n for n in unknown)


# -- vLLM ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_weight_updates_into_a_quantized_engine_are_audited(tmp_path):
    """vLLM's CPU build runs fp8 with scales per channel in dense models."""
    folder = str(save_tiny_model(tmp_path / "model"))
    swap = [f"{PREFIX}self_attn.{name}_proj.weight" for name in "kv"]
    answer = run_ranks(1, "tests.support.ranks.sync:quantized", folder=folder, swap=swap)
    rows = {row["name"]: row for row in answer["table"]}
    matrices = {n for n, t in load_file(f"{folder}/model.safetensors").items() if t.dim() > 1}
    assert rows.keys() == matrices | {"lm_head.weight"}
    high = {name for name, row in rows.items() if not row["quantized"]}
    assert high == {"model.embed_tokens.weight", "lm_head.weight"}
    for metrics in answer["metrics"]:
        assert 0.01 < metrics["sync/quantization_error_max"] < 0.06
        assert metrics["sync/unquantized"] == 2 and metrics["sync/unaudited"] == 0
        assert 0 < metrics["mismatch/canary"] < 0.5
    assert answer["metrics"][0]["sync/verified_tensors"] > 2
    message = r"version 2: rank 0, phase verify: 2 of \d+ matrices are not served as they were sent"
    assert re.search(message, answer["error"]), answer["error"]
    assert f"it holds the values of {swap[0]}" in answer["error"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_tensor", "fp8_per_block"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_quantized_engine_on_a_gpu_serves_the_checkpoint(tmp_path, family, quantization):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    if family == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    folder = save_tiny_model(tmp_path / "model", family, **sizes)
    config = engine_config(
        folder,
        tmp_path,
        dtype="bfloat16",
        load_weights=True,
        quantization=quantization,
    )
    tensors = load_file(folder / "model.safetensors")
    sent = {
        name: (float(tensor.float().norm()), tensor_sketch(tensor.bfloat16()).tolist())
        for name, tensor in tensors.items()
        if tensor.dim() > 1
    }
    with running_engine(config) as engine:
        rows, wrong = audit_quantization(sent, engine.read_back_sketches(), quantization)
    assert wrong is None
    high = {row["name"] for row in rows if row["error"] is not None and not row["quantized"]}
    assert all("embed" in name or "lm_head" in name or "mlp.gate." in name for name in high)
    unread = [row["name"] for row in rows if row["error"] is None]
    assert all(".experts." in name for name in unread) and (unread == [] or quantization != "fp8")
