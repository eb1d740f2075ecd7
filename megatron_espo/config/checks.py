"""Checks of a configuration against the number of ranks, the model and the files. Standard
library only."""

import math
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from megatron_espo.config import model_folder
from megatron_espo.config.rules import Problems, expect
from megatron_espo.config.schema import Config, Megatron
from megatron_espo.errors import InputError
from megatron_espo.files import read_object
from megatron_espo.models.registry import read_spec
from megatron_espo.models.spec import Experts, ModelSpec


def check_world_size(config: Config, world_size: int) -> int:
    """Check the parallel layout against the number of ranks.

    Returns:
        The data-parallel size.

    Raises:
        InputError: lists every problem.
    """
    m = config.megatron
    sizes = {
        f"megatron.{kind}_parallel_size": getattr(m, f"{kind}_parallel_size")
        for kind in ("tensor_model", "pipeline_model", "context")
    }
    model_ranks = math.prod(sizes.values())
    dp, rest = divmod(world_size, model_ranks)
    if dp == 0 or rest:
        product = " x ".join(map(str, sizes.values()))
        expected = f"a world size TP x PP x CP x DP = {product} x DP, a multiple of {model_ranks}"
        lower = ", ".join(key for key, size in sizes.items() if size > 1)
        advice = f"start another number of ranks or lower {lower}"
        largest = max(sizes, key=sizes.__getitem__)
        _raise(config, [expect(largest, expected, world_size, advice)])
    _raise(config, _rank_problems(config, world_size, dp))
    return dp


def _rank_problems(config: Config, world_size: int, dp: int) -> Problems:
    m, rollout = config.megatron, config.rollout
    expert_tp = m.expert_tensor_parallel_size or m.tensor_model_parallel_size
    stage = m.tensor_model_parallel_size * m.context_parallel_size * dp
    if stage % (expert_tp * m.expert_model_parallel_size):
        expected = f"expert-TP x EP to divide the {stage} ranks of a pipeline stage"
        got = f"{expert_tp} x {m.expert_model_parallel_size}"
        yield expect("megatron.expert_model_parallel_size", expected, got)
    share_gpus = rollout.engines > 1 and not rollout.hosts
    engine_gpus = rollout.engines * rollout.tensor_parallel_size if share_gpus else 1
    if world_size % rollout.engines or engine_gpus > world_size:
        limit = ", with engines x rollout.tensor_parallel_size at most that" if share_gpus else ""
        yield expect(
            "rollout.engines", f"a divisor of the {world_size} ranks{limit}", rollout.engines
        )
    responses = rollout.prompts_per_step * rollout.group_size
    needed = dp * config.algorithm.num_mini_batches
    if responses < needed:
        expected = f"at least DP x algorithm.num_mini_batches = {needed} responses a step"
        yield expect("rollout.prompts_per_step", expected, responses, "start fewer ranks")


def check_model(config: Config, spec: ModelSpec | None = None) -> ModelSpec:
    """Check layout and lengths against the model, and return it.

    Args:
        spec: the model. ``None`` reads it from ``model.path`` and also checks the weight and
            tokenizer files there.

    Raises:
        InputError: lists every problem.
    """
    is_folder = spec is None
    if spec is None:
        _raise(config, model_folder.problems(config.model.path, config.model.tokenizer))
        spec = read_model(config)
    _raise(config, _layout_problems(config, spec))
    _raise(config, _length_problems(config, spec))
    if is_folder:
        tensors = model_folder.tensor_problems(Path(config.model.path), spec)
        _raise(config, (("model.path", message) for message in tensors))
    return spec


def check_router(config: Config, spec: ModelSpec) -> None:
    """Check that a model with experts uses router replay or a rollout correction.

    Raises:
        InputError: it is not.
    """
    correction = config.algorithm.rollout_correction
    is_corrected = correction in ("token", "sequence", "geometric")
    if spec.experts and not config.rollout.router_replay and not is_corrected:
        expected = "true for a model with experts, because engine and trainer choose others"
        advice = "algorithm.rollout_correction token, sequence or geometric corrects for it"
        _raise(config, [expect("rollout.router_replay", expected, False, advice)])


def check_paths(config: Config) -> None:
    """Check that prompts and recorded rollouts are readable and that ``run.dir`` is writable.

    Raises:
        InputError: lists every problem.
    """
    _raise(config, _path_problems(config))


def _path_problems(config: Config) -> Problems:
    for path, source in config.sources.items():
        prompts = source.prompts
        is_readable = os.path.isfile(prompts) and os.access(prompts, os.R_OK)
        if not (is_readable or prompts.startswith("reasoning_gym:")):
            expected = f"a readable file (relative to {os.getcwd()})"
            yield expect(f"{path}.prompts", expected, prompts)
    replay, folder = config.run.replay, config.run.dir
    if replay and not any(Path(replay).glob("step_*.npz")):
        expected = "a folder of recorded rollouts (step_000001.npz ...)"
        advice = "run.keep_rollouts=true records all steps of a run"
        yield expect("run.replay", expected, replay, advice)
    judge = config.judge
    for name, text in judge.prompts.items():
        with suppress(OSError, ValueError):
            if "{response}" in judge.template(name):
                continue
        expected = f"a text with {{response}} or a file with one (relative to {os.getcwd()})"
        yield expect("judge.prompts", expected, text)
    if judge.key and os.environ.get("RANK", "0") == "0" and not os.environ.get(judge.key):
        yield "judge.key", "expected an environment variable that is set, got another name"
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())  # a full disk may take the file, but not its content
    except OSError as error:
        yield expect("run.dir", "a writable folder", folder, f"{error.strerror}")


def read_model(config: Config) -> ModelSpec:
    """Read ``config.json`` of the model folder.

    Raises:
        InputError: it is not a JSON object, or a model that the package cannot train.
    """
    path = Path(config.model.path, "config.json")
    if not path.is_file():
        advice = (
            f"`hf download <owner>/<name> config.json --local-dir {config.model.path}` is enough "
            "for a plan; a run needs the whole folder"
        )
        fail(config, "model.path", f'expected config.json in "{path.parent}", found none; {advice}')
    try:
        hf_config = read_object(path)
    except InputError as error:
        fail(config, "model.path", str(error))
    return parse_model(config, hf_config)


def parse_model(config: Config, hf_config: dict[str, Any]) -> ModelSpec:
    """Read the content of a ``config.json``; InputError as :func:`read_model`."""
    try:
        return read_spec(hf_config, config.model.family)
    except InputError as error:
        _raise(config, (("model.path", line) for line in str(error).splitlines()))
        raise


def _layout_problems(config: Config, spec: ModelSpec) -> Problems:
    m, experts, heads = config.megatron, spec.experts, spec.num_attention_heads
    tp, pp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    vpp = m.virtual_pipeline_model_parallel_size
    key = "megatron.tensor_model_parallel_size"
    yield from _check_divides(key, tp, heads, "attention heads")
    # Megatron could replicate key-value heads; the weight update needs one owner for each.
    yield from _check_divides(key, tp, spec.num_key_value_heads, "key-value heads")
    for name in ("q_rank", "kv_down") if spec.is_latent else ():
        yield from _check_divides(key, tp, spec.sizes[name], "columns of a latent projection")
    if experts is None or not all(experts.layers):
        yield from _check_divides(key, tp, spec.intermediate_size, "feed-forward columns")
    layers = spec.num_hidden_layers
    if vpp is None:
        yield from _check_divides("megatron.pipeline_model_parallel_size", pp, layers, "layers")
    elif layers % (pp * vpp):
        expected = f"PP x VPP to divide the model's {layers} layers"
        got = f"{pp} x {vpp} = {pp * vpp}"
        yield "megatron.virtual_pipeline_model_parallel_size", f"expected {expected}, got {got}"
    yield from _expert_problems(m, experts, spec.architecture)
    ffn = (experts.ffn if experts else spec.intermediate_size) // tp
    columns = {"hidden columns": spec.hidden_size, "feed-forward columns per rank": ffn}
    for what, count in columns.items():
        if m.fp8 and count % 16:
            expected = f"null with {count} {what} (8-bit products need multiples of 16)"
            yield "megatron.fp8", f"expected {expected}, got {m.fp8}"
    # A row of float32 logits, and a copy in the training dtype where that is narrower.
    row = spec.vocab_size // tp * (6 if config.model.dtype == "bfloat16" else 4)
    if m.head_memory_mib is not None and m.head_memory_mib << 20 < row:
        expected = f"at least {-(-row >> 20)} (one token's logits)"
        yield "megatron.head_memory_mib", f"expected {expected}, got {m.head_memory_mib}"
    key = "rollout.tensor_parallel_size"
    yield from _check_divides(key, config.rollout.tensor_parallel_size, heads, "attention heads")


def _expert_problems(m: Megatron, experts: Experts | None, architecture: str) -> Problems:
    tp, ep = m.tensor_model_parallel_size, m.expert_model_parallel_size
    expert_tp = m.expert_tensor_parallel_size
    if experts is None:
        where = f"for a model without experts ({architecture})"
        if ep > 1:
            yield "megatron.expert_model_parallel_size", f"expected 1 {where}, got {ep}"
        if expert_tp is not None:
            yield "megatron.expert_tensor_parallel_size", f"expected null {where}, got {expert_tp}"
        return
    yield from _check_divides("megatron.expert_model_parallel_size", ep, experts.count, "experts")
    key = "expert_tensor_parallel_size" if expert_tp else "tensor_model_parallel_size"
    yield from _check_divides(f"megatron.{key}", expert_tp or tp, experts.ffn, "columns per expert")
    key, columns = "megatron.tensor_model_parallel_size", experts.shared_ffn
    yield from _check_divides(key, tp, columns, "columns of shared experts")
    if tp > 1 and not m.sequence_parallel:
        expected = f"true for a model with experts and tensor_model_parallel_size {tp}"
        yield "megatron.sequence_parallel", f"expected {expected}, got false"


def _length_problems(config: Config, spec: ModelSpec) -> Problems:
    context, longest = spec.max_position_embeddings, config.rollout.max_response_tokens
    limit = config.rollout.max_model_len or context
    if limit > context:
        expected = f"at most the model's context (max_position_embeddings {context})"
        yield "rollout.max_model_len", f"expected {expected}, got {limit}"
    if longest >= limit:
        expected = f"less than the context of {limit} tokens, which includes the prompt"
        yield "rollout.max_response_tokens", f"expected {expected}, got {longest}"
    window = spec.sliding_window
    if window and window < min(limit, context):
        expected = f"at most {window}, the attention window (sliding windows are not supported)"
        yield "rollout.max_model_len", f"expected {expected}, got {limit}"


def _check_divides(key: str, size: int, count: int, what: str) -> Problems:
    if count % size:
        yield expect(key, f"a divisor of the model's {count} {what}", size)


def _raise(config: Config, problems: Iterable[tuple[str, str]]) -> None:
    """Raise one InputError that lists every problem."""
    if lines := [_locate(config, key, message) for key, message in problems]:
        raise InputError("\n".join(lines))


def fail(config: Config, key: str, message: str) -> NoReturn:
    """Raise an InputError that names the setting ``key`` and its place."""
    raise InputError(_locate(config, key, message))


def _locate(config: Config, key: str, message: str) -> str:
    """Prepend the place where the key was set."""
    name, place = key, ""
    while "." in name and not place:
        place, name = config.origins.get(name, ""), name.rpartition(".")[0]
    place = place or (f"{config.origins['']} (default)" if config.origins else "")
    return f"{place}: {key}: {message}" if place else f"{key}: {message}"
