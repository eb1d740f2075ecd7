"""Rules over several settings: each function yields ``(key, message)`` for every broken one."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_espo.addresses import parse_address

if TYPE_CHECKING:
    from megatron_espo.config import schema

Problems = Iterator[tuple[str, str]]

# vLLM raises any lower temperature to this one without failing; the sampled log-probs are then not the trained ones.
LOWEST_TEMPERATURE = 0.01

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# Settings that would silently do nothing: their neutral value, and the objectives that use them.
USED_BY = {
    "clip_low": (None, ("gspo", "grpo", "dr_grpo", "dapo", "cispo", "gmpo")),
    "clip_high": (None, ("gspo", "grpo", "dr_grpo", "dapo", "cispo", "gmpo")),
    "clip_floor": (0.0, ("espo",)),
    "ratio": ("segment", ("espo", "gspo")),
    "dual_clip": (None, ("espo", "gspo", "grpo", "dr_grpo", "dapo")),
}


def model(c: "schema.Model") -> Problems:
    if c.exporter is not None and not FUNCTION.fullmatch(c.exporter):
        yield "exporter", f'expected "module:function" or null, got "{c.exporter}"'


def megatron(c: "schema.Megatron") -> Problems:
    """Megatron-Core's own constraints, told before it is imported."""
    if c.sequence_parallel and c.tensor_model_parallel_size == 1:
        yield (
            "sequence_parallel",
            "expected false with tensor_model_parallel_size 1 (it shards over the TP ranks), got true; "
            "raise tensor_model_parallel_size or turn it off",
        )
    if c.virtual_pipeline_model_parallel_size and c.pipeline_model_parallel_size == 1:
        yield (
            "virtual_pipeline_model_parallel_size",
            f"expected null with pipeline_model_parallel_size 1, got {c.virtual_pipeline_model_parallel_size}",
        )
    if c.fp8 and c.transformer_impl == "local":
        yield "fp8", f"expected null with transformer_impl local (Transformer Engine has the 8-bit matrix products), got {c.fp8}"
    full = c.recompute_granularity == "full"
    for key in ("recompute_method", "recompute_num_layers"):
        value = getattr(c, key)
        if full and value is None:
            yield key, "expected a value with recompute_granularity full, got null"
        if not full and value is not None:
            yield key, f"expected null unless recompute_granularity is full, got {value}"


def optimizer(c: "schema.Optimizer") -> Problems:
    if c.min_lr > c.lr:
        yield "min_lr", f"expected at most lr ({c.lr:g}), got {c.min_lr:g}"


def algorithm(c: "schema.Algorithm") -> Problems:
    q = c.quantiles
    if any(not 0 < x < 1 for x in q) or any(a >= b for a, b in zip(q, q[1:], strict=False)):
        yield "quantiles", f"expected ascending numbers between 0 and 1 (both excluded), got {list(q)}"
    for key, (off, users) in USED_BY.items():
        value = getattr(c, key)
        if value != off and c.objective not in users:
            off_text = "null" if off is None else off
            yield (
                key,
                f"expected {off_text} with objective {c.objective}, which does not use it (only {', '.join(users)}), "
                f"got {value}",
            )
    if c.objective == "dr_grpo" and c.normalize_std:
        yield "normalize_std", "expected false with objective dr_grpo (it only centres rewards), got true"


# Arguments of vLLM's server that this project sets, and what to use instead.
ENGINE_ARGS_OF_OURS = {
    "model": "use model.path",
    "dtype": "use rollout.dtype",
    "seed": "use run.seed",
    "max-model-len": "use rollout.max_model_len",
    "tensor-parallel-size": "use rollout.tensor_parallel_size",
    "data-parallel-size": "use rollout.engines",
    "gpu-memory-utilization": "use rollout.gpu_memory_utilization",
    "enable-sleep-mode": "use rollout.sleep",
    "weight-transfer-config": "use rollout.transport",
    "enable-return-routed-experts": "use rollout.router_replay",
} | dict.fromkeys(
    (
        "api-key", "generation-config", "hf-overrides", "host", "load-format", "logprobs-mode", "middleware", "port",
        "served-model-name", "skip-tokenizer-init", "uds", "worker-extension-cls",
    ),
    "leave it out",
)  # fmt: skip


def rollout(c: "schema.Rollout") -> Problems:
    if c.group_size < 2:
        yield (
            "group_size",
            f"expected integer >= 2, got {c.group_size}; an advantage compares a prompt's responses, so a single "
            "one has none",
        )
    if c.group_size > 1 and c.temperature == 0:
        yield (
            "temperature",
            f"expected a temperature > 0 with group_size {c.group_size}, got {c.temperature:g}; greedy decoding gives "
            "identical responses, which have no advantage",
        )
    if 0 < c.temperature < LOWEST_TEMPERATURE:
        yield (
            "temperature",
            f"expected at least {LOWEST_TEMPERATURE} (vLLM silently raises anything lower to it), "
            f"got {c.temperature:g}",
        )
    if not c.allow_truncated_sampling:
        way_out = "set rollout.allow_truncated_sampling=true to accept biased importance ratios"
        if c.top_p < 1:
            yield "top_p", f"expected 1.0 (off), got {c.top_p:g}; {way_out}"
        if c.top_k > 0:
            yield "top_k", f"expected 0 or -1 (off), got {c.top_k}; {way_out}"
    if c.engines > 1 and c.transport in ("nccl_m2n", "sharded_rdt"):
        yield "engines", f"expected 1 with transport {c.transport} (it has one meeting of all ranks with one engine), got {c.engines}; or take nccl or ipc"
    if c.over_sampling_prompts and not c.max_staleness:
        yield "over_sampling_prompts", f"expected null with max_staleness 0 (a step trains its own prompts only), got {c.over_sampling_prompts}"
    if c.ahead > c.max_staleness * c.prompts_per_step:
        yield (
            "over_sampling_prompts",
            f"expected at most max_staleness x prompts_per_step = {c.max_staleness * c.prompts_per_step}, so that each prompt is trained in time, "
            f"got {c.ahead}",
        )
    for name in c.engine_args:
        if setting := ENGINE_ARGS_OF_OURS.get(name.replace("_", "-")):
            yield "engine_args", f"expected arguments that this project does not set itself, got {name}; {setting}"
    has_own_gpus = c.hosts or c.transport in ("nccl", "nccl_m2n", "sharded_rdt") or (c.transport == "auto" and c.visible_devices is not None)
    if c.sleep and has_own_gpus:
        how = "hosts" if c.hosts else f"transport {c.transport}" if c.transport != "auto" else f'visible_devices "{c.visible_devices}"'
        yield "sleep", f"expected false with rollout.{how} (nobody else needs the memory of GPUs that are the engine's own), got true"
    yield from _hosts(c)
    if c.max_model_len is not None and c.max_response_tokens >= c.max_model_len:
        yield (
            "max_response_tokens",
            f"expected less than rollout.max_model_len ({c.max_model_len}), which holds the prompt too, "
            f"got {c.max_response_tokens}",
        )


def _hosts(c: "schema.Rollout") -> Problems:
    if not c.hosts:
        return
    seen: dict[tuple[str, int], str] = {}
    for text in c.hosts:
        try:
            address = parse_address(text)
        except ValueError as error:
            yield "hosts", str(error)
            continue
        if address in seen:
            yield "hosts", f"expected each address once (a host has one engine), got {text} twice"
        seen[address] = text
    if len(c.hosts) < c.engines:
        yield "hosts", f"expected at least rollout.engines = {c.engines} addresses (more are spares), got {len(c.hosts)}"
    if c.visible_devices is not None:
        yield (
            "visible_devices",
            f"expected null with rollout.hosts (set CUDA_VISIBLE_DEVICES where megatron-espo serve is started), got {c.visible_devices}",
        )
    if c.transport == "ipc":
        yield "transport", "expected auto, files, nccl, nccl_m2n or sharded_rdt with rollout.hosts (ipc stays on one machine), got ipc"


def data(c: "schema.Data") -> Problems:
    yield from _prompt_source(c.prompts, c.task_args)


def evaluation(c: "schema.Eval") -> Problems:
    if c.prompts is not None:
        yield from _prompt_source(c.prompts, c.task_args)
    elif c.task_args:
        yield "task_args", "expected none without eval.prompts; they belong to a reasoning_gym task there"
    if c.temperature == 0 and c.samples > 1:
        yield "samples", f"expected 1 with temperature 0 (greedy responses are all the same), got {c.samples}"
    if c.temperature is not None and 0 < c.temperature < LOWEST_TEMPERATURE:
        yield "temperature", f"expected 0 or at least {LOWEST_TEMPERATURE} (vLLM silently raises anything lower to it), got {c.temperature:g}"


def _prompt_source(prompts: str, task_args: dict) -> Problems:
    is_task = prompts.startswith("reasoning_gym:")
    if prompts == "reasoning_gym:" or not (is_task or prompts.endswith((".jsonl", ".parquet"))):
        yield "prompts", f'expected "reasoning_gym:<task>", a *.jsonl or a *.parquet file, got "{prompts}"'
    elif task_args and not is_task:
        yield "task_args", f'expected none with a file of prompts ("{prompts}"); they belong to reasoning_gym tasks'


def reward(c: "schema.Reward") -> Problems:
    known = ("auto", "reasoning_gym", "math_verify")
    if c.function not in known and not FUNCTION.fullmatch(c.function):
        yield "function", f'expected one of {", ".join(known)}, or "module:function", got "{c.function}"'


def across_sections(c: "schema.Config") -> Problems:
    if c.rollout.prompts_per_step % c.algorithm.num_mini_batches:
        yield (
            "algorithm.num_mini_batches",
            f"expected a divisor of rollout.prompts_per_step = {c.rollout.prompts_per_step} (a mini-batch holds whole "
            f"groups), got {c.algorithm.num_mini_batches}",
        )
    older = f"rollout.max_staleness {c.rollout.max_staleness}" if c.rollout.max_staleness else None
    if older and c.algorithm.rollout_correction not in ("token", "sequence"):
        yield (
            "algorithm.rollout_correction",
            f"expected token or sequence with {older} (the rollouts are an older policy's, "
            f"which the weights then correct), got {c.algorithm.rollout_correction}",
        )
    if c.megatron.fp8 and c.model.dtype != "bfloat16":
        yield "megatron.fp8", f"expected null with model.dtype {c.model.dtype} (8-bit matrix products belong to bfloat16 weights), got {c.megatron.fp8}"
    buffer = c.reward.overlong_buffer_tokens
    if buffer is not None and buffer > c.rollout.max_response_tokens:
        yield (
            "reward.overlong_buffer_tokens",
            f"expected at most rollout.max_response_tokens ({c.rollout.max_response_tokens}), got {buffer}",
        )
    updates = c.run.steps * c.algorithm.num_epochs * c.algorithm.num_mini_batches
    last = c.optimizer.lr_decay_iters or updates
    if c.optimizer.lr_warmup_iters >= last:
        source = "optimizer.lr_decay_iters" if c.optimizer.lr_decay_iters else "the run's optimizer steps"
        yield "optimizer.lr_warmup_iters", f"expected less than {source} ({last}), got {c.optimizer.lr_warmup_iters}"
    for key, prompts in (("data.prompts", c.data.prompts), ("eval.prompts", c.eval.prompts)):
        if c.reward.function == "reasoning_gym" and prompts and not prompts.startswith("reasoning_gym:"):
            yield (
                "reward.function",
                f'expected math_verify or "module:function" with {key} "{prompts}", got reasoning_gym, '
                "whose verifiers need its own tasks",
            )
