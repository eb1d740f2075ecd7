"""Settings of the rollouts and of the engines that make them."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megatron_espo.config import rules
from megatron_espo.config.section import Section


class Rollout(Section):
    """Sampling with vLLM."""

    prompts_per_step: int = Field(128, ge=1, description="Prompts in one rollout batch (paper: 128).")
    group_size: int = Field(
        8, description="Responses for each prompt, at least 2 (paper: 8); advantages compare within this group."
    )
    temperature: float = Field(
        1.0, ge=0, description="Sampling temperature; training log-probs use the same. Lower explores less."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus sampling; below 1 the trained distribution is not the sampled one."
    )
    top_k: int = Field(0, ge=-1, description="Sample from the k likeliest tokens only; 0 or -1 turns it off.")
    allow_truncated_sampling: bool = Field(
        False, description="Accept top_p < 1 or top_k > 0 although importance ratios are then biased."
    )
    router_replay: bool = Field(
        True, description="Train each token of a mixture of experts in those experts that the engine chose for it; of no effect on other models."
    )
    allow_router_mismatch: bool = Field(
        False, description="Accept router_replay false: engine and trainer each choose a token's experts and now and then differ."
    )
    max_response_tokens: int = Field(
        2048, ge=1, description="Longest response, in tokens (paper: 16384); longer ones are cut and counted."
    )
    max_resampling_rounds: int = Field(
        0,
        ge=0,
        description="DAPO's dynamic sampling: replace prompts whose responses have equal rewards by new ones, "
        "at most so many times a step; 0 turns it off.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Longest prompt + response, in tokens; null takes the model's context. Less saves memory.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Engine precision; auto takes model.dtype, which keeps the log-prob gap small."
    )
    engines: int = Field(
        1,
        ge=1,
        description="Engines, spread evenly over the trainer's ranks: every (world size / engines)-th has one as "
        "its child, or on one of hosts. On GPUs: one a node, or more.",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Ranks of one engine; independent of Megatron's TP.")
    hosts: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Machines for the engines, host:port of each one's server (megatron-espo serve); more than engines are spares. "
        "Empty: engines are children of the trainer's ranks.",
    )
    host_timeout_s: float = Field(
        60.0,
        ge=5,
        description="With hosts: seconds without contact after which an engine's machine is given up and its server ends, and in which "
        "another machine must answer.",
    )
    transport: Literal["auto", "files", "ipc", "nccl", "nccl_m2n", "sharded_rdt"] = Field(
        "auto",
        description="How weights reach the engine: files (in memory; with hosts in run.dir), ipc (same GPU), nccl "
        "(other GPUs), nccl_m2n (other GPUs, from all ranks), sharded_rdt (other GPUs, over Ray).",
    )
    visible_devices: str | None = Field(
        None, min_length=1, description="GPUs of the engine, such as 6,7; null shares those of the trainer. Not with hosts."
    )
    verify_every: int = Field(
        20,
        ge=0,
        description="Syncs between two comparisons of every tensor with what the engine serves; 0: at its start only.",
    )
    canary_prompts: int = Field(
        4, ge=0, description="Prompts whose log-probs engine and trainer compare after every sync; 0 turns it off."
    )
    canary_tolerance: float | None = Field(
        None, gt=0, description="Largest mean difference there, in nats a token; null: 0.1 in bfloat16, 0.001 in float32."
    )
    max_restarts: int = Field(
        2, ge=0, description="Restarts of a failed engine, with a new weight sync, before the run is given up."
    )
    gpu_memory_utilization: float = Field(
        0.5, gt=0, le=1, description="Share of each GPU that the engine may take; the rest is the trainer's."
    )
    sleep: bool = Field(
        False,
        description="The engine holds no GPU memory while the trainer trains, and gets all weights anew afterwards; for engines that "
        "share the trainer's GPUs. gpu_memory_utilization can then be high.",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of vLLM's server by their names, such as {max_num_seqs: 64}; those that this project sets are refused.",
    )
    longest_first: bool = Field(
        False,
        description="Give the engine those prompts first whose responses were longest when they were last sampled, new prompts "
        "before all: fewer long responses are left alone at a batch's end. The same responses come of it.",
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="Most weight updates between the sampling of a token and the step that trains it. 0: each step samples its own prompts and waits "
        "for them. Above 0 the engines sample while the trainer trains (needs algorithm.rollout_correction token or sequence).",
    )
    over_sampling_prompts: int | None = Field(
        None,
        ge=1,
        description="With max_staleness: prompts in flight beyond prompts_per_step; null: max_staleness x prompts_per_step.",
    )
    timeout_s: float = Field(
        900.0,
        gt=0,
        description="Seconds without news (start-up done, a finished response) before an engine is given up.",
    )
    log_prob_gap_warn: float = Field(
        0.05, gt=0, description="Warn above this mean |engine - trainer| log-prob difference, in nats a token."
    )
    log_prob_gap_stop: float | None = Field(
        None, gt=0, description="End the run above this mean difference, before its step is saved; null: never."
    )

    @property
    def ahead(self) -> int:
        """Prompts in flight beyond those that a step trains."""
        if not self.max_staleness:
            return 0
        return self.over_sampling_prompts or self.max_staleness * self.prompts_per_step

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.rollout(self)
