"""The settings of a run, section by section. Megatron-Core's own names wherever it has one."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from megatron_espo.config import placement, rules
from megatron_espo.config.rollout import Rollout
from megatron_espo.config.section import Section
from megatron_espo.config.tasks import Data, Environment, Eval, Reward


class Run(Section):
    """Where a run lives and how long it lasts."""

    dir: str = Field(
        "runs/default",
        min_length=1,
        description="Output folder (checkpoints, metrics, exported model); relative to the current directory. "
        "Give every experiment its own.",
    )
    name: str | None = Field(None, description="Label in logs and plots; null takes the name of run.dir.")
    steps: int = Field(
        200,
        ge=1,
        description="Rollout batches to train on (paper: 200); one has num_epochs x num_mini_batches updates.",
    )
    seed: int = Field(1, ge=0, le=2**31 - 1, description="Seed of prompt order, sampling and initial random states.")
    checkpoint_every: int | None = Field(
        20,
        ge=1,
        description="Steps between checkpoints (and one at the end): after whatever happens, the same command goes on "
        "from the latest. null saves none.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept; older ones are removed.")
    resume: str = Field(
        "latest",
        min_length=1,
        description="Where to start: latest (a new run if there is no checkpoint), never (from model.path), or the "
        "name of one, such as step_000020.",
    )
    keep_rollouts: bool = Field(
        False, description="Keep every step's rollouts for run.replay; otherwise only those newer than a checkpoint."
    )
    replay: str | None = Field(
        None, min_length=1, description="Train from the rollouts in this folder (<run.dir>/rollouts of another run): no engine."
    )
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="Save and end after so many seconds, counted from the start of the Slurm job where there is one.",
    )
    watchdog_s: float = Field(
        900.0,
        gt=0,
        lt=1800,
        description="Seconds in which no rank makes progress before the rank that stands still is named and the run ends.",
    )
    agree_every: int = Field(
        10,
        ge=0,
        description="Steps between comparisons of the weights of ranks that hold the same ones (a step's data and gradient norm are compared "
        "every step); 0: none.",
    )
    save_hf: bool = Field(
        True, description="Export the final model to <run.dir>/hf in Hugging Face format; false saves disk and time."
    )
    samples_per_step: int = Field(
        2,
        ge=0,
        description="Responses a step written to samples.jsonl and TensorBoard with each token's entropy and group; 0: none.",
    )
    wandb: bool = Field(
        False, description="Send the metrics to Weights & Biases too; its own environment variables set project, entity and mode."
    )


class Model(Section):
    """The policy to train."""

    path: str = Field(
        min_length=1,
        description="Local Hugging Face model folder (config.json, *.safetensors, tokenizer); relative to the current "
        "directory, not to this file. Never looked up on a hub.",
    )
    tokenizer: str | None = Field(
        None, min_length=1, description="Tokenizer folder or SentencePiece *.model file; null takes model.path."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Training precision. bfloat16 halves memory and keeps float32 master weights; float32 is exact "
        "and slow.",
    )
    exporter: str | None = Field(
        None,
        min_length=1,
        description="Your module:function(chunks, hf_config) on every rank: an iterator of (Hugging Face name, whole "
        "tensor) that replaces the built-in export into the engine; null takes that.",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.model(self)


class Megatron(Section):
    """Layout over ranks. World size = TP x PP x CP x DP; the data-parallel size is whatever remains."""

    tensor_model_parallel_size: int = Field(
        1, ge=1, description="TP: ranks that share each layer. Saves memory, costs two all-reduces a layer."
    )
    pipeline_model_parallel_size: int = Field(
        1, ge=1, description="PP: pipeline stages. Cheap to communicate; idles while the pipeline fills."
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=2, description="VPP: model chunks a stage (interleaved schedule). Less idling, more messages."
    )
    context_parallel_size: int = Field(
        1, ge=1, description="CP: ranks that share each sequence. For contexts whose activations do not fit."
    )
    expert_model_parallel_size: int = Field(
        1, ge=1, description="EP: ranks that share a layer's experts; mixture-of-experts models only."
    )
    expert_tensor_parallel_size: int | None = Field(
        None, ge=1, description="Ranks that share each expert; null: TP. 1 with EP keeps many small experts whole."
    )
    sequence_parallel: bool = Field(
        False, description="Shard norm and dropout activations over the TP ranks: less memory, same traffic."
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="Layer implementation; auto takes Transformer Engine on a GPU where installed, else local."
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        None,
        description="8-bit floating point in the layers' matrix products (hybrid: E4M3 forward, E5M2 backward); needs Transformer Engine and model.dtype "
        "bfloat16, which weights keep. null: none.",
    )
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = Field(
        "tensorwise", description="How fp8 scales: by tensor, by its history, by blocks (H100), by small blocks (B200)."
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="Most responses in one micro-batch; null leaves the limit to tokens alone."
    )
    max_tokens_per_micro_batch: int = Field(
        16384,
        ge=1,
        description="Most tokens (prompt + response) packed into one micro-batch; bounds activation memory. Larger is "
        "faster until memory runs out. Never changes the gradient.",
    )
    packed: bool = Field(
        True,
        description="Lay sequences one after the other without padding (THD); false: rows padded to the longest, for "
        "attention that cannot. Same gradient, slower.",
    )
    head_memory_mib: int | None = Field(
        None,
        ge=1,
        description="Most MiB for logits and their gradient; null keeps all logits of a micro-batch. Less recomputes "
        "them by chunks: slower, same numbers.",
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        None,
        description="Activations computed again in backward: selective (attention core), full (layers), null none.",
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="With full recomputation: uniform units over all layers, or the first layers of each stage."
    )
    recompute_num_layers: int | None = Field(
        None, ge=1, description="With full recomputation: layers a unit (uniform) or a stage (block)."
    )
    offload: tuple[Literal["optimizer", "gradients", "weights"], ...] = Field(
        (),
        strict=False,
        description="What lies in host memory while the engine samples: optimizer (moments and float32 weights), gradients (freed, not "
        "copied), weights. Makes room for an engine with rollout.sleep.",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.megatron(self)


class Optimizer(Section):
    """Megatron-Core's Adam. All *_iters count optimizer steps."""

    lr: float = Field(1e-6, gt=0, description="Peak learning rate (paper: 1e-6).")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    lr_decay_style: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Shape of the decay from lr to min_lr; constant (the paper's) stays at lr."
    )
    lr_warmup_iters: int = Field(0, ge=0, description="Optimizer steps of linear warm-up from 0 to lr.")
    lr_decay_iters: int | None = Field(
        None, ge=1, description="Optimizer steps until min_lr is reached; null takes all of the run's."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW).")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_eps: float = Field(1e-8, gt=0, description="Added to the denominator of Adam's update.")
    spike_factor: float | None = Field(
        None, gt=1, description="Skip an update whose gradient norm is above so many times the recent median; null: none is skipped."
    )
    spike_window: int = Field(50, ge=1, description="Latest gradient norms in that median; the guard begins after 10, or so many if fewer.")
    clip_grad: float = Field(1.0, ge=0, description="Largest global gradient norm (L2); 0 turns clipping off.")
    use_distributed_optimizer: bool = Field(
        True, description="Shard optimizer states over the data-parallel ranks: 12 bytes a parameter / DP."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.optimizer(self)


class Algorithm(Section):
    """The objective and how often a rollout batch is used."""

    objective: Literal["espo", "gspo", "grpo", "dr_grpo", "dapo", "cispo", "gmpo"] = Field(
        "espo", description="espo: one ratio per entropy group with adaptive clipping; the others are baselines."
    )
    alpha: float = Field(
        0.02, gt=0, description="ESPO's clip scale (Eq. 8). Larger clips fewer tokens; paper tried 0.01-0.10."
    )
    quantiles: tuple[float, ...] = Field(
        (0.8,),
        strict=False,
        description="ESPO: entropy quantiles inside a response where groups are cut, ascending, between 0 and 1; "
        "[0.8] puts the top 20% of tokens into their own group.",
    )
    ratio: Literal["segment", "segment_times_token"] = Field(
        "segment",
        description="ESPO, GSPO: the segment's ratio, or Eq. 9 to the letter (times the token's; clips more).",
    )
    clip_floor: float = Field(
        0.0, ge=0, description="ESPO: smallest clip range of a group; keeps sure tokens trainable."
    )
    clip_low: float | None = Field(
        None, ge=0, description="Clip range below a ratio of 1; null takes the objective's own. Not for espo."
    )
    clip_high: float | None = Field(
        None, ge=0, description="Clip range above a ratio of 1; null takes the objective's own. Not for espo."
    )
    dual_clip: float | None = Field(
        None, gt=1, description="Bounds the loss of negative advantages to this factor; null turns it off."
    )
    normalize_std: bool = Field(
        True, description="Divide advantages by the group's standard deviation; dr_grpo needs false."
    )
    kl_coef: float = Field(
        0.0, ge=0, description="Weight of the KL penalty (k3) to the initial policy; above 0 costs a scoring pass a step."
    )
    entropy_coef: float = Field(
        0.0, ge=0, description="Weight of the entropy bonus (exact, over the whole vocabulary); keeps exploring."
    )
    rollout_correction: Literal["off", "metrics", "token", "sequence"] = Field(
        "metrics",
        description="Truncated importance sampling of trainer over engine probabilities, by token or by sequence; "
        "metrics only reports the ratios.",
    )
    rollout_correction_cap: float = Field(2.0, gt=0, description="Largest ratio of the rollout correction.")
    mask_truncated: bool = Field(
        False, description="No gradient from responses cut at the length limit; they still count in the means."
    )
    num_epochs: int = Field(1, ge=1, description="Passes over each rollout batch; more reuse, more off-policy.")
    num_mini_batches: int = Field(
        1, ge=1, description="Optimizer steps a pass; the batch of responses is cut into so many equal parts."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.algorithm(self)


class Config(Section):
    """All settings of one run. ``load_config`` makes one; ``validate_*`` check it against the machine and the model."""

    run: Run = Field(default_factory=Run)
    model: Model
    megatron: Megatron = Field(default_factory=Megatron)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    algorithm: Algorithm = Field(default_factory=Algorithm)
    rollout: Rollout = Field(default_factory=Rollout)
    data: Data
    environment: Environment = Field(default_factory=Environment)
    reward: Reward = Field(default_factory=Reward)
    eval: Eval = Field(default_factory=Eval)

    @cached_property
    def origins(self) -> dict[str, str]:
        """Place of each given key, ``{"optimizer.lr": "run.yaml:7"}``, and the file under ``""``; not in dumps."""
        return {}

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from rules.across_sections(self)

    def validate_for(self, world_size: int) -> int:
        """Check the layout against ``world_size`` ranks; return the data-parallel size. InputError lists what fails."""
        return placement.validate_world_size(self, world_size)

    def validate_model(self, hf_config: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check layout and lengths against the model and return its Hugging Face config.

        Without ``hf_config`` the folder ``model.path`` is read and its weight and tokenizer files are looked for too.
        InputError lists what fails.
        """
        return placement.validate_model(self, hf_config)

    def validate_router(self, hf_config: dict[str, Any]) -> None:
        """InputError for a mixture of experts whose router is not replayed, unless that is allowed."""
        placement.validate_router(self, hf_config)

    def validate_paths(self) -> None:
        """InputError where ``run.dir`` cannot be written, ``run.replay`` holds no rollouts, or a prompt file cannot be read."""
        placement.validate_paths(self)
