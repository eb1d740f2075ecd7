"""The settings of a run, by section. Settings of Megatron-Core keep its names."""

from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from megatron_espo.config import rules
from megatron_espo.config.rollout import Rollout
from megatron_espo.config.rules import Problems, Section, expect
from megatron_espo.config.tasks import FUNCTIONS, Data, Environment, Eval, Judge, Reward, Source


class Run(Section):
    """Folder, length, checkpoints and logs of a run."""

    dir: str = Field("runs/default", min_length=1)
    """Folder of the run's output (checkpoints, metrics, model). Each run needs its own."""
    steps: int = Field(200, ge=1)
    """Steps (paper: 200). Each trains one rollout batch: num_epochs x num_mini_batches updates."""
    seed: int = Field(1, ge=0, le=2**31 - 1)
    """Seed of prompt order, sampling and initial random states."""
    checkpoint_every: int | None = Field(20, ge=1)
    """Steps between checkpoints, from which the same command resumes. null saves none."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    resume: str = Field("latest", min_length=1)
    """Checkpoint to start from: latest (a new run if there is none), never (start from
    model.path), or a name such as step_000020."""
    keep_rollouts: bool = False
    """Keep all rollouts, for run.replay. false keeps those newer than the latest checkpoint."""
    replay: str | None = Field(None, min_length=1)
    """Folder of recorded rollouts (<run.dir>/rollouts of another run) to train on. No engine is
    started."""
    max_seconds: float | None = Field(None, gt=0)
    """Save and stop after this many seconds from the start (of the Slurm job, if there is one)."""
    watchdog_s: float = Field(900.0, gt=0, lt=1800)
    """Seconds without progress on a rank after which the run ends. The error names the rank."""
    save_hf: bool = True
    """Export the final model to <run.dir>/hf in Hugging Face format."""
    samples_per_step: int = Field(2, ge=0)
    """Responses a step in samples.jsonl and TensorBoard, with each token's entropy. 0: none."""
    profile_steps: tuple[int, ...] = Field((), strict=False)
    """Steps of which each rank writes a trace and GPU memory snapshot to <run.dir>/profile."""
    wandb: bool = False
    """Also log to Weights & Biases. Its environment variables set project, entity and mode."""


class Model(Section):
    """The model to train."""

    path: str = Field(min_length=1)
    """Local Hugging Face model folder (config.json, *.safetensors, tokenizer), relative to the
    current directory. Nothing is downloaded."""
    tokenizer: str | None = Field(None, min_length=1)
    """Tokenizer folder or SentencePiece *.model file. null uses model.path."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of training and engine. bfloat16 halves memory and keeps float32 master weights."""
    exporter: str | None = Field(None, min_length=1)
    """Your module:function(chunks, hf_config), called on every rank. It returns an iterator of
    (Hugging Face name, whole tensor) and replaces the built-in weight export to the engine."""
    family: str | None = Field(None, min_length=1)
    """Your module:Class, a subclass of megatron_espo.models.spec.ModelSpec. null chooses a built-in
    family by the architecture in config.json."""

    def problems(self) -> Problems:
        yield from rules.check_function("exporter", self.exporter)
        yield from rules.check_function("family", self.family)


class Megatron(Section):
    """Parallel layout and memory. World size = TP x PP x CP x DP; the data-parallel size is
    derived."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """TP: ranks that share each layer. Saves memory and costs two all-reduces per layer."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """PP: pipeline stages. Little communication, but idle time while the pipeline fills."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """VPP: model chunks per stage (interleaved schedule). Less idle time, more messages."""
    context_parallel_size: int = Field(1, ge=1)
    """CP: ranks that share each sequence, for contexts whose activations do not fit on one rank."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """EP: ranks that share the experts of a layer. Mixture-of-experts models only."""
    expert_tensor_parallel_size: int | None = Field(None, ge=1)
    """Ranks that share each expert. null uses TP; 1 keeps small experts whole."""
    sequence_parallel: bool = False
    """Shard norm and dropout activations over the TP ranks. Less memory, same traffic."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation. auto: Transformer Engine where installed with a GPU, else local."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """8-bit matrix products in the layers (hybrid: E4M3 forward, E5M2 backward). Needs
    Transformer Engine and model.dtype bfloat16. null turns it off."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Scale of fp8: per tensor, by its history, per block (H100), or per small block (B200)."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Most responses in one micro-batch. null limits only the tokens."""
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    """Most tokens (prompt + response) in one micro-batch. Bounds activation memory; larger is
    faster. Does not change the gradient."""
    packed: bool = True
    """Pack sequences without padding (THD). false pads rows to the longest, for attention that
    does not support packing. Same gradient, slower."""
    head_memory_mib: int | None = Field(None, ge=1)
    """Most MiB for logits and their gradient; less recomputes them in chunks. null: no limit."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron-Core's TransformerConfig, OptimizerConfig and
    DistributedDataParallelConfig, such as {moe_permute_fusion: true}. Fields that another setting
    owns are refused."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations to recompute: selective (core attention), full (layers) or null (none)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recomputation: uniform (units of layers) or block (first layers of each stage)."""
    recompute_num_layers: int | None = Field(None, ge=1)
    """With full recomputation: layers per unit (uniform) or per stage (block)."""
    offload: tuple[Literal["optimizer", "gradients", "weights"], ...] = Field((), strict=False)
    """What moves to host memory while the engine samples: optimizer (moments and float32
    weights), gradients (freed), weights. Makes room for an engine with rollout.sleep."""

    def problems(self) -> Problems:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            yield expect("sequence_parallel", "false with tensor_model_parallel_size 1", True)
        vpp = self.virtual_pipeline_model_parallel_size
        if vpp is not None and self.pipeline_model_parallel_size == 1:
            expected = "null with pipeline_model_parallel_size 1"
            yield expect("virtual_pipeline_model_parallel_size", expected, vpp)
        if self.fp8 and self.transformer_impl == "local":
            expected = "null with transformer_impl local (needs Transformer Engine)"
            yield expect("fp8", expected, self.fp8)
        granularity = self.recompute_granularity or "null"
        needed = "a value" if granularity == "full" else "null"
        for key in ("recompute_method", "recompute_num_layers"):
            value = getattr(self, key)
            if (value is None) == (granularity == "full"):
                yield expect(key, f"{needed} with recompute_granularity {granularity}", value)


class Optimizer(Section):
    """Megatron-Core's Adam. All *_iters count optimizer steps."""

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate (paper: 1e-6)."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the run."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from lr to min_lr over the run. constant (the paper's) stays at lr."""
    lr_warmup_iters: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0 to lr."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay rate of the second moment."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to the denominator of Adam's update."""
    spike_factor: float | None = Field(None, gt=1)
    """Skip updates whose gradient norm exceeds this times the median of the last 50. null: none."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm (L2). 0 turns clipping off."""
    use_distributed_optimizer: bool = True
    """Shard optimizer states over the data-parallel ranks: 12 bytes per parameter / DP."""

    def problems(self) -> Problems:
        if self.min_lr > self.lr:
            yield expect("min_lr", f"at most lr ({self.lr:g})", self.min_lr)


_BOUNDED = ("gspo", "grpo", "dr_grpo", "dapo", "cispo", "gmpo", "ce_gppo", "dppo")
OBJECTIVES = ("espo", *_BOUNDED, "sapo")
WITH_ARGS = ("ce_gppo", "dppo", "sapo")
# Settings of some objectives: neutral value, and the objectives that have them.
USED_BY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "clip_low": (None, _BOUNDED),
    "clip_high": (None, _BOUNDED),
    "clip_floor": (0.0, ("espo",)),
    "ratio": ("segment", ("espo", "gspo")),
    "dual_clip": (None, ("espo", "gspo", "grpo", "dr_grpo", "dapo")),
}


class Algorithm(Section):
    """The objective and how often a rollout batch is used."""

    objective: str = Field("espo", min_length=1)
    """espo: one ratio per entropy group with adaptive clipping; gspo, grpo, dr_grpo, dapo, cispo,
    gmpo, ce_gppo, dppo, sapo; or your module:Class."""
    objective_args: dict[str, Any] = Field(default_factory=dict)
    """Settings of your class, of ce_gppo (beta_low, beta_high), dppo (max_ratio) and sapo (tau_pos,
    tau_neg). The other objectives have keys in this section."""
    alpha: float = Field(0.02, gt=0)
    """ESPO: scale of the clip range (Eq. 8); larger clips fewer tokens (paper: 0.01-0.10)."""
    quantiles: tuple[float, ...] = Field((0.8,), strict=False)
    """Entropy quantiles inside a response at which its tokens are grouped, ascending, between 0 and
    1; [0.8] groups the top 20%. ESPO's segments; other objectives only report the groups."""
    ratio: Literal["segment", "segment_times_token"] = "segment"
    """ESPO, GSPO: ratio of the segment, or times the token's (Eq. 9 to the letter; clips more)."""
    clip_floor: float = Field(0.0, ge=0)
    """ESPO: smallest clip range of a group, so that groups of low entropy can change."""
    clip_low: float | None = Field(None, ge=0)
    """Clip range below a ratio of 1; null: the objective's default. Not for espo."""
    clip_high: float | None = Field(None, ge=0)
    """Clip range above a ratio of 1; null: the objective's default. Not for espo."""
    dual_clip: float | None = Field(None, gt=1)
    """Bounds the loss of negative advantages to this factor; null: no bound."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "maxrl"] = "grpo"
    """Rewards of a prompt's responses, centred and divided by: grpo their standard deviation;
    dr_grpo 1; rloo (n - 1) / n; maxrl their mean. The objective dr_grpo needs dr_grpo."""
    zero_variance_scale: float = Field(0.0, ge=0)
    """RL-ZVP: prompts whose responses are all right or all wrong train with this factor times an
    entropy as advantage. 0: they give no gradient."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL penalty (k3) to the initial policy; above 0 costs a scoring pass a step."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus (exact, over the whole vocabulary); keeps responses diverse."""
    rollout_correction: Literal["off", "metrics", "token", "sequence", "geometric"] = "metrics"
    """Importance sampling of trainer over engine probabilities: ratio of a token, of a sequence, or
    its geometric mean; metrics only reports the ratios of tokens."""
    rollout_correction_cap: float = Field(2.0, ge=1)
    """Largest ratio of the rollout correction; larger ratios become this number."""
    rollout_correction_floor: float = Field(0.0, ge=0, le=1)
    """Smallest ratio of the rollout correction; smaller ratios become this number."""
    rollout_mask: dict[str, list[float]] = Field(default_factory=dict)
    """No gradient from tokens, or from whole responses, whose ratio is outside [low, high]. Keys:
    token, sequence, geometric. IcePop: {token: [0.5, 5]}, with rollout_correction token, cap 5."""
    mask_truncated: bool = False
    """No gradient from responses cut at the length limit; they still count in means and weights."""
    num_epochs: int = Field(1, ge=1)
    """Passes over each rollout batch; more reuse, more off-policy."""
    num_mini_batches: int = Field(4, ge=1)
    """Optimizer steps a pass; the batch is cut into this number of equal parts. With one step the
    ratio is exactly 1, so nothing is clipped and the clip ranges (Eq. 8) have no effect."""

    def problems(self) -> Problems:
        name, q = self.objective, self.quantiles
        if any(not 0 < x < 1 for x in q) or list(q) != sorted(set(q)):
            yield expect("quantiles", "ascending numbers between 0 and 1 (both excluded)", list(q))
        is_built_in = name in OBJECTIVES
        if not is_built_in and not rules.FUNCTION.fullmatch(name):
            yield expect("objective", f"one of {', '.join(OBJECTIVES)}, or module:Class", name)
            return
        if self.objective_args and is_built_in and name not in WITH_ARGS:
            yield expect("objective_args", f"none with objective {name}", self.objective_args)
        for key, (neutral, users) in USED_BY.items():
            value = getattr(self, key)
            if value != neutral and name not in users:
                only = f"which does not use it (only {', '.join(users)})"
                expected = f"{rules.show(neutral)} with objective {name}, {only}"
                yield expect(key, expected, value)
        if name == "dr_grpo" and self.advantage != "dr_grpo":
            yield expect("advantage", "dr_grpo with objective dr_grpo", self.advantage)
        for level, limits in self.rollout_mask.items():
            is_range = len(limits) == 2 and 0 <= limits[0] <= 1 <= limits[1]
            if level not in ("token", "sequence", "geometric") or not is_range:
                expected = "token, sequence or geometric with [low <= 1, high >= 1]"
                yield expect("rollout_mask", expected, {level: limits})


class Config(Section):
    """All settings of one run, as ``load_config`` reads them. ``config.checks`` compares them
    with machine and model."""

    run: Run = Field(default_factory=Run)
    model: Model
    megatron: Megatron = Field(default_factory=Megatron)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    algorithm: Algorithm = Field(default_factory=Algorithm)
    rollout: Rollout = Field(default_factory=Rollout)
    data: Data
    environment: Environment = Field(default_factory=Environment)
    reward: Reward = Field(default_factory=Reward)
    judge: Judge = Field(default_factory=Judge)
    eval: Eval = Field(default_factory=Eval)

    @cached_property
    def origins(self) -> dict[str, str]:
        """Where each given key was set, ``{"optimizer.lr": "run.yaml:7"}``; ``""`` maps to the
        file. Not dumped."""
        return {}

    @property
    def sources(self) -> dict[str, Source]:
        """Sources of training and evaluation prompts, by the path of their settings."""
        settings, found = self.eval, self.data.sources
        if settings.prompts is not None:
            columns = self.data.columns if settings.columns is None else settings.columns
            args = settings.task_args
            found["eval"] = Source(prompts=settings.prompts, task_args=args, columns=columns)
        return found

    def problems(self) -> Problems:
        algorithm, rollout, fp8 = self.algorithm, self.rollout, self.megatron.fp8
        parts, rounds = algorithm.num_mini_batches, rollout.max_resampling_rounds
        if rollout.prompts_per_step % parts:
            expected = f"a divisor of rollout.prompts_per_step = {rollout.prompts_per_step}"
            yield expect("algorithm.num_mini_batches", expected, parts)
        if algorithm.zero_variance_scale and rounds:
            expected = "0 with algorithm.zero_variance_scale, which trains what it drops"
            yield expect("rollout.max_resampling_rounds", expected, rounds)
        correction, dtype = algorithm.rollout_correction, self.model.dtype
        for name in ("max_staleness", "quantization"):
            value = getattr(rollout, name)
            if value and correction not in ("token", "sequence", "geometric"):
                expected = f"token, sequence or geometric with rollout.{name} {value}"
                yield expect("algorithm.rollout_correction", expected, correction)
        for key, value in (("megatron.fp8", fp8), ("rollout.quantization", rollout.quantization)):
            if value and dtype != "bfloat16":
                yield expect(key, f"null with model.dtype {dtype}", value)
        buffer, longest = self.reward.overlong_buffer_tokens, rollout.max_response_tokens
        if buffer is not None and algorithm.advantage == "maxrl":
            expected = "null with algorithm.advantage maxrl, which needs rewards of at least 0"
            yield expect("reward.overlong_buffer_tokens", expected, buffer)
        if buffer is not None and buffer > longest:
            expected = f"at most rollout.max_response_tokens ({longest})"
            yield expect("reward.overlong_buffer_tokens", expected, buffer)
        updates = self.run.steps * algorithm.num_epochs * parts
        warmup = self.optimizer.lr_warmup_iters
        if warmup >= updates:
            expected = f"less than the run's optimizer steps ({updates})"
            yield expect("optimizer.lr_warmup_iters", expected, warmup)
        for path, source in self.sources.items():
            is_file = not source.prompts.startswith("reasoning_gym:")
            if "reasoning_gym" in self.reward.weights and is_file:
                expected = f'math_verify or module:function with {path}.prompts "{source.prompts}"'
                key = "reward.terms" if self.reward.terms else "reward.function"
                yield expect(key, expected, "reasoning_gym")
        for name in self.reward.terms:
            yield from rules.check_function("reward.terms", name, *FUNCTIONS, *self.judge.prompts)
        if self.judge.prompts.keys() & self.reward.terms.keys():
            for key in ("url", "model"):
                if getattr(self.judge, key) is None:
                    yield expect(f"judge.{key}", "a value with a judge in reward.terms", None)
