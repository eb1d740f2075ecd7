"""Checks of a configuration against the number of ranks, the model and the files. Standard
library only."""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import NoReturn

from megatron_espo.config import model_folder
from megatron_espo.config.rules import Problem, Problems, locate
from megatron_espo.config.schema import Config
from megatron_espo.config.tasks import Source
from megatron_espo.errors import InputError
from megatron_espo.files import read_object
from megatron_espo.models.registry import read_spec
from megatron_espo.models.spec import ModelSpec


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
        largest = max(sizes, key=sizes.__getitem__)
        advice = f"start another number of ranks or lower {largest}"
        _raise(config, [config.expect(largest, expected, world_size, advice)])
    _raise(config, _rank_problems(config, world_size, dp))
    return dp


def _rank_problems(config: Config, world_size: int, dp: int) -> Problems:
    m, rollout = config.megatron, config.rollout
    expert_tp = m.expert_tensor_parallel_size or m.tensor_model_parallel_size
    stage = m.tensor_model_parallel_size * m.context_parallel_size * dp
    if stage % (expert_tp * m.expert_model_parallel_size):
        expected = f"expert-TP x EP to divide the {stage} ranks of a pipeline stage"
        got = f"{expert_tp} x {m.expert_model_parallel_size}"
        yield config.expect("megatron.expert_model_parallel_size", expected, got)
    share_gpus = rollout.engines > 1 and not rollout.hosts
    engine_gpus = rollout.engines * rollout.tensor_parallel_size if share_gpus else 1
    if world_size % rollout.engines or engine_gpus > world_size:
        limit = ", with engines x rollout.tensor_parallel_size at most that" if share_gpus else ""
        yield config.expect("rollout.engines", f"a divisor of the {world_size} ranks{limit}")
    responses = rollout.prompts_per_step * rollout.group_size
    needed = dp * config.algorithm.num_mini_batches
    if responses < needed:
        expected = f"at least DP x algorithm.num_mini_batches = {needed} responses a step"
        yield config.expect("rollout.prompts_per_step", expected, responses, "start fewer ranks")


def check_model(config: Config, spec: ModelSpec | None = None) -> ModelSpec:
    """Check layout and lengths against the model, and return it.

    Args:
        spec: the model. ``None`` reads it from ``model.path`` and also checks the weight and
            tokenizer files there.

    Raises:
        InputError: lists every problem.
    """
    if spec is None:
        _raise(config, model_folder.problems(config.model.path, config.model.tokenizer))
        spec = check_model(config, read_model(config))
        tensors = model_folder.tensor_problems(Path(config.model.path), spec)
        _raise(config, (("model.path", message) for message in tensors))
        return spec
    _raise(config, _layout_problems(config, spec))
    _raise(config, _length_problems(config, spec))
    return spec


def check_router(config: Config, spec: ModelSpec) -> None:
    """Check that a model with experts uses router replay or a rollout correction.

    Raises:
        InputError: it is not.
    """
    is_corrected = config.rollout.router_replay or config.algorithm.corrects_rollouts
    if spec.experts and not is_corrected:
        expected = "true for a model with experts, because engine and trainer choose others"
        advice = "algorithm.rollout_correction token, sequence or geometric corrects for it"
        _raise(config, [config.expect("rollout.router_replay", expected, advice=advice)])


def check_paths(config: Config, sources: dict[str, Source] | None = None) -> None:
    """Check that prompts and recorded rollouts are readable and that ``run.dir`` is writable.

    Args:
        sources: of the prompts; None: all of ``config``.

    Raises:
        InputError: lists every problem.
    """
    _raise(config, _path_problems(config, sources or config.sources))


def _path_problems(config: Config, sources: dict[str, Source]) -> Problems:
    for path, source in sources.items():
        prompts = source.prompts
        is_readable = os.path.isfile(prompts) and os.access(prompts, os.R_OK)
        if not (is_readable or prompts.startswith("reasoning_gym:")):
            expected = f"a readable file (relative to {os.getcwd()})"
            yield config.expect(f"{path}.prompts", expected, prompts)
    replay, folder = config.run.replay, config.run.dir
    if replay and not any(Path(replay).glob("step_*.npz")):
        expected = "a folder of recorded rollouts (step_000001.npz ...)"
        advice = "run.keep_rollouts=true records all steps of a run"
        yield config.expect("run.replay", expected, advice=advice)
    judge = config.judge
    for name, text in judge.prompts.items():
        with suppress(OSError, ValueError):
            if "{response}" in judge.template(name):
                continue
        expected = f"a text with {{response}} or a file with one (relative to {os.getcwd()})"
        yield config.expect("judge.prompts", expected, text)
    if judge.key and os.environ.get("RANK", "0") == "0" and not os.environ.get(judge.key):
        yield "judge.key", "expected an environment variable that is set, got another name"
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())  # a full disk may take the file, but not its content
    except OSError as error:
        yield config.expect("run.dir", "a writable folder", advice=f"{error.strerror}")


def read_model(config: Config) -> ModelSpec:
    """Read ``config.json`` of the model folder.

    Raises:
        InputError: it is not a JSON object, or a model that the package cannot train.
    """
    path = Path(config.model.path, "config.json")
    if not path.is_file():
        command = f"hf download <owner>/<name> config.json --local-dir {config.model.path}"
        advice = f"a plan needs only this file: `{command}`"
        fail(config, "model.path", f'expected config.json in "{path.parent}", found none; {advice}')
    try:
        return read_spec(read_object(path), config.model.family)
    except InputError as error:
        _raise(config, (("model.path", line) for line in str(error).splitlines()))
        raise


def _layout_problems(config: Config, spec: ModelSpec) -> Problems:
    m, experts, layers = config.megatron, spec.experts, spec.num_hidden_layers
    tp, pp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    for key, count, what in _divided(config, spec):
        if count % attrgetter(key)(config):
            yield config.expect(key, f"a divisor of the model's {count} {what}")
    if (vpp := m.virtual_pipeline_model_parallel_size) and layers % (pp * vpp):
        expected = f"PP x VPP to divide the model's {layers} layers"
        got = f"{pp} x {vpp} = {pp * vpp}"
        yield "megatron.virtual_pipeline_model_parallel_size", f"expected {expected}, got {got}"
    where = f"for a model without experts ({spec.architecture})"
    if experts is None and m.expert_model_parallel_size > 1:
        yield config.expect("megatron.expert_model_parallel_size", f"1 {where}")
    if experts is None and m.expert_tensor_parallel_size:
        yield config.expect("megatron.expert_tensor_parallel_size", f"null {where}")
    if experts and tp > 1 and not m.sequence_parallel:
        expected = f"true for a model with experts and tensor_model_parallel_size {tp}"
        yield config.expect("megatron.sequence_parallel", expected)
    ffn = (experts.ffn if experts else spec.intermediate_size) // tp
    columns = {"hidden columns": spec.hidden_size, "feed-forward columns per rank": ffn}
    for what, count in columns.items():
        if m.fp8 and count % 16:
            expected = f"null with {count} {what} (8-bit products need multiples of 16)"
            yield config.expect("megatron.fp8", expected)
    # A row of float32 logits, and a copy in the training dtype where that is narrower.
    row = spec.vocab_size // tp * (6 if config.model.dtype == "bfloat16" else 4)
    if m.head_memory_mib and m.head_memory_mib << 20 < row:
        expected = f"at least {-(-row >> 20)} (one token's logits)"
        yield config.expect("megatron.head_memory_mib", expected)


def _divided(config: Config, spec: ModelSpec) -> Iterator[tuple[str, int, str]]:
    """Yield the key of a parallel size, the number that it must divide, and what that counts."""
    m, tp, experts = config.megatron, "megatron.tensor_model_parallel_size", spec.experts
    yield tp, spec.num_attention_heads, "attention heads"
    yield "rollout.tensor_parallel_size", spec.num_attention_heads, "attention heads"
    # Megatron could replicate key-value heads; the weight update needs one owner for each.
    yield tp, spec.num_key_value_heads, "key-value heads"
    if spec.is_latent:
        yield tp, spec.sizes["q_rank"], "columns of a latent projection"
        yield tp, spec.sizes["kv_down"], "columns of a latent projection"
    if experts is None or not all(experts.layers):
        yield tp, spec.intermediate_size, "feed-forward columns"
    if m.virtual_pipeline_model_parallel_size is None:
        yield "megatron.pipeline_model_parallel_size", spec.num_hidden_layers, "layers"
    if experts:
        yield "megatron.expert_model_parallel_size", experts.count, "experts"
        expert_tp = "megatron.expert_tensor_parallel_size" if m.expert_tensor_parallel_size else tp
        yield expert_tp, experts.ffn, "columns per expert"
        yield tp, experts.shared_ffn, "columns of shared experts"


def _length_problems(config: Config, spec: ModelSpec) -> Problems:
    context, longest = spec.max_position_embeddings, config.rollout.max_response_tokens
    limit = config.rollout.max_model_len or context
    if limit > context:
        expected = f"at most the model's context (max_position_embeddings {context})"
        yield config.expect("rollout.max_model_len", expected)
    if longest >= limit:
        expected = f"less than the context of {limit} tokens, which includes the prompt"
        yield config.expect("rollout.max_response_tokens", expected)
    window = spec.sliding_window
    if window and window < min(limit, context):
        expected = f"at most {window}, the attention window (sliding windows are not supported)"
        yield config.expect("rollout.max_model_len", expected, limit)


def _raise(config: Config, problems: Iterable[Problem]) -> None:
    """Raise one InputError that lists every problem."""
    if lines := [locate(config.origins, key, message) for key, message in problems]:
        raise InputError("\n".join(lines))


def fail(config: Config, key: str, message: str) -> NoReturn:
    """Raise an InputError that names the setting ``key`` and its place."""
    raise InputError(locate(config.origins, key, message))
