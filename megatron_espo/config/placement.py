"""Does the run fit these ranks, this model and these files? Standard library only."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_espo.config import model_folder
from megatron_espo.config.experts import Experts, read_experts
from megatron_espo.errors import InputError

if TYPE_CHECKING:
    from megatron_espo.config.schema import Config

# Architectures whose layers are Megatron's own: (QKV bias, norms on queries and keys).
ARCHITECTURES = {
    "LlamaForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
    "Qwen3MoeForCausalLM": (False, True),
    "MistralForCausalLM": (False, False),
}
# Keys of config.json without which the model cannot be laid out.
SIZES = (
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def _refuse(config: "Config", problems: Iterator[tuple[str, str]]) -> None:
    """Raise one InputError that lists every problem with the place its key was set (or that it is a default)."""
    lines = []
    for key, message in problems:
        place = config.origins.get(key) or (f"{config.origins['']} (default)" if config.origins else "")
        lines.append(f"{place}: {key}: {message}" if place else f"{key}: {message}")
    if lines:
        raise InputError("\n".join(lines))


def validate_world_size(config: "Config", world_size: int) -> int:
    """Data-parallel size of ``world_size`` ranks, or InputError."""
    m = config.megatron
    tp, pp, cp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.context_parallel_size
    model_ranks = tp * pp * cp
    dp, rest = divmod(world_size, model_ranks)

    def problems() -> Iterator[tuple[str, str]]:
        if dp == 0 or rest:
            sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp}
            largest = max(sizes, key=sizes.__getitem__)
            fits = f"{dp * model_ranks} or {(dp + 1) * model_ranks}" if dp else f"{model_ranks}"
            yield (
                f"megatron.{largest}",
                f"expected a world size that is TP x PP x CP x DP = {tp} x {pp} x {cp} x DP, a multiple of "
                f"{model_ranks}, got {world_size}; start {fits} ranks (torchrun --nproc-per-node), or lower one of "
                + ", ".join(f"megatron.{key}" for key, size in sizes.items() if size > 1),
            )
            return
        yield from _expert_rank_problems(m, dp)
        engines, each = config.rollout.engines, config.rollout.tensor_parallel_size
        if config.rollout.hosts:
            if world_size % engines:
                yield "rollout.engines", f"expected a divisor of the {world_size} ranks (each engine belongs to one), got {engines}"
        elif world_size % engines or (engines > 1 and engines * each > world_size):
            yield (
                "rollout.engines",
                f"expected a divisor of the {world_size} ranks with engines x rollout.tensor_parallel_size <= {world_size} "
                f"(engines do not share GPUs with each other), got {engines} x {each}",
            )
        batch = config.rollout.prompts_per_step * config.rollout.group_size
        needed = dp * config.algorithm.num_mini_batches
        if batch < needed:
            yield (
                "rollout.prompts_per_step",
                f"expected prompts_per_step x group_size >= DP x algorithm.num_mini_batches = {needed} (one response "
                f"for each rank and update), got {config.rollout.prompts_per_step} x {config.rollout.group_size} = "
                f"{batch}; raise it or start fewer ranks",
            )

    _refuse(config, problems())
    return dp


def _expert_rank_problems(m: Any, dp: int) -> Iterator[tuple[str, str]]:
    tp, pp, cp, ep = (
        m.tensor_model_parallel_size,
        m.pipeline_model_parallel_size,
        m.context_parallel_size,
        m.expert_model_parallel_size,
    )
    expert_tp = m.expert_tensor_parallel_size or tp
    if tp * cp * dp % (expert_tp * ep):
        yield (
            "megatron.expert_model_parallel_size",
            f"expected expert-TP x EP = {expert_tp} x {ep} to divide the TP x CP x DP = {tp} x {cp} x {dp} = "
            f"{tp * cp * dp} ranks of a pipeline stage (experts live on the ranks of the dense layers); start a multiple "
            f"of {pp * math.lcm(tp * cp, expert_tp * ep)} ranks, or lower megatron.expert_model_parallel_size or "
            "megatron.expert_tensor_parallel_size",
        )


def validate_model(config: "Config", hf_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The model's Hugging Face config, once layout, lengths and (if it is read here) files fit; or InputError."""
    if hf_config is None:
        _refuse(config, model_folder.problems(config))
        hf_config = read_hf_config(config)
    architectures = hf_config.get("architectures") or ["(none named)"]
    if architectures[0] not in ARCHITECTURES:
        message = f"expected an architecture out of {', '.join(ARCHITECTURES)}, got {', '.join(architectures)}"
        _refuse(config, iter([("model.path", f'{message} ("{config.model.path}")')]))
    # transformers 5 writes num_experts under another name.
    known = {"num_experts": hf_config.get("num_local_experts"), **hf_config}
    sizes = SIZES + EXPERT_SIZES if "Moe" in architectures[0] else SIZES
    missing = [key for key in sizes if not isinstance(known.get(key), int)]
    if missing:
        message = f"expected integers {', '.join(missing)} in config.json, found none"
        _refuse(config, iter([("model.path", f'{message} ("{config.model.path}")')]))
    _refuse(config, _layout_problems(config, hf_config))
    _refuse(config, _length_problems(config, hf_config))
    return hf_config


def validate_router(config: "Config", hf_config: dict[str, Any]) -> None:
    """InputError for a mixture of experts without router replay, unless ``rollout.allow_router_mismatch``; and for that one beside replay."""
    if read_experts(hf_config):
        _refuse(config, _router_problems(config.rollout))


def _router_problems(rollout: Any) -> Iterator[tuple[str, str]]:
    if rollout.router_replay and rollout.allow_router_mismatch:
        yield (
            "rollout.allow_router_mismatch",
            "expected false with rollout.router_replay true, got true: routers that are replayed do not differ; remove it, or set "
            "rollout.router_replay to false to train without",
        )
    if not rollout.router_replay and not rollout.allow_router_mismatch:
        yield (
            "rollout.router_replay",
            "expected true for a model with experts, got false: rounding makes engine and trainer send some tokens to different experts, whose "
            "importance ratios are then wrong, and large models have collapsed of it. Where the engine cannot return its choices, set "
            "rollout.allow_router_mismatch to true and algorithm.rollout_correction to token, and watch mismatch/logprob_gap_max; float32 "
            "engines and trainers hardly differ",
        )


def validate_paths(config: "Config") -> None:
    """InputError where ``run.dir`` cannot be written, ``run.replay`` holds no rollouts, or a prompt file cannot be read."""
    _refuse(config, _path_problems(config))


def _path_problems(config: "Config") -> Iterator[tuple[str, str]]:
    for key, prompts in (("data.prompts", config.data.prompts), ("eval.prompts", config.eval.prompts or "reasoning_gym:")):
        if not prompts.startswith("reasoning_gym:") and not (os.path.isfile(prompts) and os.access(prompts, os.R_OK)):
            yield key, f'expected a readable file (relative to the current directory, {os.getcwd()}), got "{prompts}"'
    replay = config.run.replay
    if replay and not any(Path(replay).glob("step_*.npz")):
        yield (
            "run.replay",
            f'expected the rollouts folder of another run (step_000001.npz ...), got "{replay}"; '
            "a run keeps all of its rollouts with run.keep_rollouts=true",
        )
    try:
        os.makedirs(config.run.dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.run.dir):
            pass
    except OSError as error:
        yield "run.dir", f'expected a folder that can be made and written to, got "{config.run.dir}" ({error.strerror})'


def read_hf_config(config: "Config") -> dict[str, Any]:
    """The content of the model folder's ``config.json``, or InputError; other files are not looked at."""
    path = Path(config.model.path, "config.json")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(loaded, dict):
            return loaded
        reason = f"a JSON {type(loaded).__name__}"
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__} ({error})"
    _refuse(config, iter([("model.path", f"expected a JSON object in {path}, got {reason}; fetch it again")]))
    raise AssertionError("unreachable")


def _layout_problems(config: "Config", hf: dict[str, Any]) -> Iterator[tuple[str, str]]:
    m = config.megatron
    tp, pp, vpp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size
    heads, experts = hf["num_attention_heads"], read_experts(hf)
    split_by_tp = {
        "attention heads": heads,
        # Megatron could copy key-value heads to more ranks than there are; the weight sync keeps one owner for each.
        "key-value heads": hf.get("num_key_value_heads") or heads,
    }
    if experts is None or not all(experts.layers):
        split_by_tp["feed-forward columns"] = hf["intermediate_size"]
    for what, count in split_by_tp.items():
        if count % tp:
            yield "megatron.tensor_model_parallel_size", f"expected a divisor of the model's {count} {what}, got {tp}"
    layers = hf["num_hidden_layers"]
    if vpp is None and layers % pp:
        yield "megatron.pipeline_model_parallel_size", f"expected a divisor of the model's {layers} layers, got {pp}"
    if vpp is not None and layers % (pp * vpp):
        yield (
            "megatron.virtual_pipeline_model_parallel_size",
            f"expected PP x VPP to divide the model's {layers} layers, got {pp} x {vpp} = {pp * vpp}",
        )
    yield from _expert_problems(m, experts, hf["architectures"][0])
    for what, count in {"hidden columns": hf["hidden_size"], "feed-forward columns a rank": (experts.ffn if experts else hf["intermediate_size"]) // tp}.items():
        if m.fp8 and count % 16:
            yield "megatron.fp8", f"expected null with {count} {what} (8-bit matrix products need multiples of 16), got {m.fp8}"
    # One row of float32 logits, and the same in the training dtype where that is narrower.
    row = hf["vocab_size"] // tp * (6 if config.model.dtype == "bfloat16" else 4)
    if m.head_memory_mib is not None and m.head_memory_mib << 20 < row:
        needed = -(-row >> 20)
        yield "megatron.head_memory_mib", f"expected at least {needed} (one token's logits), got {m.head_memory_mib}"
    if heads % config.rollout.tensor_parallel_size:
        yield (
            "rollout.tensor_parallel_size",
            f"expected a divisor of the model's {heads} attention heads, got {config.rollout.tensor_parallel_size}",
        )
    if hf.get("quantization_config"):
        yield "model.path", "expected unquantised weights, got a quantization_config in config.json; use the model in bfloat16"


def _expert_problems(m: Any, experts: Experts | None, architecture: str) -> Iterator[tuple[str, str]]:
    tp, ep, expert_tp = m.tensor_model_parallel_size, m.expert_model_parallel_size, m.expert_tensor_parallel_size
    if experts is None:
        if ep > 1:
            yield (
                "megatron.expert_model_parallel_size",
                f"expected 1 for a model without experts ({architecture}), got {ep}",
            )
        if expert_tp is not None:
            yield (
                "megatron.expert_tensor_parallel_size",
                f"expected null for a model without experts ({architecture}), got {expert_tp}",
            )
        return
    if experts.count % ep:
        yield "megatron.expert_model_parallel_size", f"expected a divisor of the model's {experts.count} experts, got {ep}"
    if experts.ffn % (expert_tp or tp):
        key = "expert_tensor_parallel_size" if expert_tp else "tensor_model_parallel_size"
        yield f"megatron.{key}", f"expected a divisor of the {experts.ffn} columns of an expert, got {expert_tp or tp}"
    if tp > 1 and not m.sequence_parallel:
        yield (
            "megatron.sequence_parallel",
            f"expected true for a model with experts and tensor_model_parallel_size {tp} (Megatron-Core refuses to train "
            "experts on whole sequences there), got false",
        )


def _length_problems(config: "Config", hf: dict[str, Any]) -> Iterator[tuple[str, str]]:
    context, r = hf["max_position_embeddings"], config.rollout
    limit = context if r.max_model_len is None else r.max_model_len
    if limit > context:
        yield (
            "rollout.max_model_len",
            f"expected at most the model's context (max_position_embeddings {context}), got {limit}",
        )
    if r.max_response_tokens >= limit:
        yield (
            "rollout.max_response_tokens",
            f"expected less than the context of {limit} tokens, which holds the prompt too, "
            f"got {r.max_response_tokens}",
        )
    # Qwen's configs carry a window that use_sliding_window switches on; Mistral's window is on wherever it is set.
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    if window and window < min(limit, context):
        yield (
            "rollout.max_model_len",
            f"expected at most {window}, the model's attention window (sliding windows are not trained), got {limit}",
        )
