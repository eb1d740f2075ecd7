"""The settings of a run, by section. Settings of Megatron-Core keep its names."""

from functools import cached_property
from operator import attrgetter
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from megatron_espo.config.rollout import Rollout
from megatron_espo.config.rules import FUNCTION, Count, Items, Problems, Section, Share, Text, show
from megatron_espo.config.tasks import FUNCTIONS, Data, Environment, Eval, Judge, Reward, Source


class Run(Section):
    """Folder, length, checkpoints and logs of a run."""

    dir: Text = "runs/default"
    """Folder of the run's output (checkpoints, metrics, model). Each run needs its own."""
    steps: Count = 200
    """Steps (paper: 200). Each trains one rollout batch: num_epochs x num_mini_batches updates."""
    seed: int = Field(1, ge=0, le=2**31 - 1)
    """Seed of prompt order, sampling and initial random states."""
    checkpoint_every: Count | None = 20
    """Steps between checkpoints, from which the same command resumes. null saves none."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep."""
    resume: Text = "latest"
    """Checkpoint to start from: latest (a new run if there is none), never (start from
    model.path), or a name such as step_000020. A requeued job uses it again."""
    keep_rollouts: bool = False
    """Keep all rollouts, for run.replay. false keeps those newer than the latest checkpoint."""
    replay: Text | None = None
    """Folder of recorded rollouts (<run.dir>/rollouts of another run) to train on. No engine is
    started."""
    max_seconds: PositiveFloat | None = None
    """Save and stop after this many seconds from the start (of the Slurm job, if there is one)."""
    watchdog_s: float = Field(900.0, gt=0, lt=1800)
    """Seconds without progress on a rank after which the run ends. The error names the rank."""
    save_hf: bool = True
    """Export the final model to <run.dir>/hf in Hugging Face format."""
    samples_per_step: NonNegativeInt = 2
    """Responses a step in samples.jsonl and TensorBoard, with each token's entropy. 0: none."""
    profile_steps: Items[int] = ()
    """Steps of which each rank writes a trace and GPU memory snapshot to <run.dir>/profile."""
    wandb: bool = False
    """Also log to Weights & Biases. Its environment variables set project, entity and mode."""


class Model(Section):
    """The model to train."""

    path: Text
    """Local Hugging Face model folder (config.json, *.safetensors, tokenizer), relative to the
    current directory. Nothing is downloaded."""
    tokenizer: Text | None = None
    """Tokenizer folder or SentencePiece *.model file. null uses model.path."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of training and engine. bfloat16 halves memory and keeps float32 master weights."""
    exporter: Text | None = None
    """Your module:function(chunks, hf_config), called on every rank. It returns an iterator of
    (Hugging Face name, whole tensor) and replaces the built-in weight export to the engine."""
    family: Text | None = None
    """Your module:Class, a subclass of megatron_espo.models.spec.ModelSpec. null chooses a built-in
    family by the architecture in config.json."""

    def problems(self) -> Problems:
        yield from self.expect_function("exporter", self.exporter)
        yield from self.expect_function("family", self.family)


class Megatron(Section):
    """Parallel layout and memory. World size = TP x PP x CP x DP; the data-parallel size is
    derived."""

    tensor_model_parallel_size: Count = 1
    """TP: ranks that share each layer. Saves memory and costs two all-reduces per layer."""
    pipeline_model_parallel_size: Count = 1
    """PP: pipeline stages. Little communication, but idle time while the pipeline fills."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """VPP: model chunks per stage (interleaved schedule). Less idle time, more messages."""
    context_parallel_size: Count = 1
    """CP: ranks that share each sequence, for contexts whose activations do not fit on one rank."""
    expert_model_parallel_size: Count = 1
    """EP: ranks that share the experts of a layer. Mixture-of-experts models only."""
    expert_tensor_parallel_size: Count | None = None
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
    micro_batch_size: Count | None = None
    """Most responses in one micro-batch. null limits only the tokens."""
    max_tokens_per_micro_batch: Count = 16384
    """Most tokens (prompt + response) in one micro-batch. Bounds activation memory; larger is
    faster. Does not change the gradient."""
    packed: bool = True
    """Pack sequences without padding (THD). false pads rows to the longest, for attention that
    does not support packing. Same gradient, slower."""
    head_memory_mib: Count | None = None
    """Most MiB for logits and their gradient; less recomputes them in chunks. null: no limit."""
    overrides: dict[str, Any] = {}
    """Fields of Megatron-Core's TransformerConfig, OptimizerConfig and
    DistributedDataParallelConfig, such as {moe_permute_fusion: true}. Fields that another setting
    owns are refused."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations to recompute: selective (core attention), full (layers) or null (none)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recomputation: uniform (units of layers) or block (first layers of each stage)."""
    recompute_num_layers: Count | None = None
    """With full recomputation: layers per unit (uniform) or per stage (block)."""
    offload: Items[Literal["optimizer", "gradients", "weights"]] = ()
    """What moves to host memory while the engine samples: optimizer (moments and float32
    weights), gradients (freed), weights. Makes room for an engine with rollout.sleep."""

    def problems(self) -> Problems:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            yield self.expect("sequence_parallel", "false with tensor_model_parallel_size 1")
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            expected = "null with pipeline_model_parallel_size 1"
            yield self.expect("virtual_pipeline_model_parallel_size", expected)
        if self.fp8 and self.transformer_impl == "local":
            yield self.expect("fp8", "null with transformer_impl local (needs Transformer Engine)")
        granularity = self.recompute_granularity or "null"
        needed = "a value" if granularity == "full" else "null"
        for key in ("recompute_method", "recompute_num_layers"):
            if (getattr(self, key) is None) == (granularity == "full"):
                yield self.expect(key, f"{needed} with recompute_granularity {granularity}")


class Optimizer(Section):
    """Megatron-Core's Adam. All *_iters count optimizer steps."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate (paper: 1e-6)."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the run."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from lr to min_lr over the run. constant (the paper's) stays at lr."""
    lr_warmup_iters: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0 to lr."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (AdamW)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay rate of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the denominator of Adam's update."""
    spike_factor: float | None = Field(None, gt=1)
    """Skip updates whose gradient norm exceeds this times the median of the last 50. null: none."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm (L2). 0 turns clipping off."""
    use_distributed_optimizer: bool = True
    """Shard optimizer states over the data-parallel ranks: 12 bytes per parameter / DP."""

    def problems(self) -> Problems:
        if self.min_lr > self.lr:
            yield self.expect("min_lr", f"at most lr ({self.lr:g})")


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

    objective: Text = "espo"
    """espo: one ratio per entropy group with adaptive clipping; gspo, grpo, dr_grpo, dapo, cispo,
    gmpo, ce_gppo, dppo, sapo; or your module:Class."""
    objective_args: dict[str, Any] = {}
    """Settings of your class, of ce_gppo (beta_low, beta_high), dppo (max_ratio) and sapo (tau_pos,
    tau_neg). The other objectives have keys in this section."""
    alpha: PositiveFloat = 0.02
    """ESPO: scale of the clip range (Eq. 8); larger clips fewer tokens (paper: 0.01-0.10)."""
    quantiles: Items[float] = (0.8,)
    """Entropy quantiles inside a response at which its tokens are grouped, ascending, between 0 and
    1; [0.8] groups the top 20%. ESPO's segments; other objectives only report the groups."""
    ratio: Literal["segment", "segment_times_token"] = "segment"
    """ESPO, GSPO: ratio of the segment, or times the token's (Eq. 9 to the letter; clips more)."""
    clip_floor: NonNegativeFloat = 0.0
    """ESPO: smallest clip range of a group, so that groups of low entropy can change."""
    clip_low: NonNegativeFloat | None = None
    """Clip range below a ratio of 1; null: the objective's default. Not for espo."""
    clip_high: NonNegativeFloat | None = None
    """Clip range above a ratio of 1; null: the objective's default. Not for espo."""
    dual_clip: float | None = Field(None, gt=1)
    """Bounds the loss of negative advantages to this factor; null: no bound."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "maxrl"] = "grpo"
    """Rewards of a prompt's responses, centred and divided by: grpo their standard deviation;
    dr_grpo 1; rloo (n - 1) / n; maxrl their mean. The objective dr_grpo needs dr_grpo."""
    zero_variance_scale: NonNegativeFloat = 0.0
    """RL-ZVP: prompts whose responses are all right or all wrong train with this factor times an
    entropy as advantage. 0: they give no gradient."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty (k3) to the initial policy; above 0 costs a scoring pass a step."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus (exact, over the whole vocabulary); keeps responses diverse."""
    rollout_correction: Literal["off", "metrics", "token", "sequence", "geometric"] = "metrics"
    """Importance sampling of trainer over engine probabilities: ratio of a token, of a sequence, or
    its geometric mean; metrics only reports the ratios of tokens."""
    rollout_correction_cap: float = Field(2.0, ge=1)
    """Largest ratio of the rollout correction; larger ratios become this number."""
    rollout_correction_floor: Share = 0.0
    """Smallest ratio of the rollout correction; smaller ratios become this number."""
    rollout_mask: dict[str, list[float]] = {}
    """No gradient from tokens, or from whole responses, whose ratio is outside [low, high]. Keys:
    token, sequence, geometric. IcePop: {token: [0.5, 5]}, with rollout_correction token, cap 5."""
    mask_truncated: bool = False
    """No gradient from responses cut at the length limit; they still count in means and weights."""
    num_epochs: Count = 1
    """Passes over each rollout batch; more reuse, more off-policy."""
    num_mini_batches: Count = 4
    """Optimizer steps a pass; the batch is cut into this number of equal parts. With one step the
    ratio is exactly 1, so nothing is clipped and the clip ranges (Eq. 8) have no effect."""

    @property
    def corrects_rollouts(self) -> bool:
        """Whether importance sampling corrects for differences between engine and trainer."""
        return self.rollout_correction in ("token", "sequence", "geometric")

    def problems(self) -> Problems:
        name, q = self.objective, self.quantiles
        if any(not 0 < x < 1 for x in q) or list(q) != sorted(set(q)):
            yield self.expect("quantiles", "ascending numbers between 0 and 1 (both excluded)")
        is_built_in = name in OBJECTIVES
        if not is_built_in and not FUNCTION.fullmatch(name):
            yield self.expect("objective", f"one of {', '.join(OBJECTIVES)}, or module:Class")
            return
        if self.objective_args and is_built_in and name not in WITH_ARGS:
            yield self.expect("objective_args", f"none with objective {name}")
        for key, (neutral, users) in USED_BY.items():
            if getattr(self, key) != neutral and name not in users:
                only = f"which does not use it (only {', '.join(users)})"
                yield self.expect(key, f"{show(neutral)} with objective {name}, {only}")
        if name == "dr_grpo" and self.advantage != "dr_grpo":
            yield self.expect("advantage", "dr_grpo with objective dr_grpo")
        for level, limits in self.rollout_mask.items():
            is_range = len(limits) == 2 and 0 <= limits[0] <= 1 <= limits[1]
            if level not in ("token", "sequence", "geometric") or not is_range:
                expected = "token, sequence or geometric with [low <= 1, high >= 1]"
                yield self.expect("rollout_mask", expected, {level: limits})


class Config(Section):
    """All settings of one run, as ``load_config`` reads them. ``config.checks`` compares them
    with machine and model."""

    run: Run = Run()
    model: Model
    megatron: Megatron = Megatron()
    optimizer: Optimizer = Optimizer()
    algorithm: Algorithm = Algorithm()
    rollout: Rollout = Rollout()
    data: Data
    environment: Environment = Environment()
    reward: Reward = Reward()
    judge: Judge = Judge()
    eval: Eval = Eval()

    @cached_property
    def origins(self) -> dict[str, str]:
        """Where each given key was set, ``{"optimizer.lr": "run.yaml:7"}``; ``""`` maps to
        the place of defaults. Not dumped."""
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
        algorithm, rollout, dtype = self.algorithm, self.rollout, self.model.dtype
        parts = algorithm.num_mini_batches
        if rollout.prompts_per_step % parts:
            expected = f"a divisor of rollout.prompts_per_step = {rollout.prompts_per_step}"
            yield self.expect("algorithm.num_mini_batches", expected)
        if algorithm.zero_variance_scale and rollout.max_resampling_rounds:
            expected = "0 with algorithm.zero_variance_scale, which trains what it drops"
            yield self.expect("rollout.max_resampling_rounds", expected)
        for name in ("max_staleness", "quantization"):
            if (value := getattr(rollout, name)) and not algorithm.corrects_rollouts:
                expected = f"token, sequence or geometric with rollout.{name} {value}"
                yield self.expect("algorithm.rollout_correction", expected)
        for key in ("megatron.fp8", "rollout.quantization"):
            if attrgetter(key)(self) and dtype != "bfloat16":
                yield self.expect(key, f"null with model.dtype {dtype}")
        buffer, longest = self.reward.overlong_buffer_tokens or 0, rollout.max_response_tokens
        if buffer and algorithm.advantage == "maxrl":
            expected = "null with algorithm.advantage maxrl, which needs rewards of at least 0"
            yield self.expect("reward.overlong_buffer_tokens", expected)
        if buffer > longest:
            expected = f"at most rollout.max_response_tokens ({longest})"
            yield self.expect("reward.overlong_buffer_tokens", expected)
        updates = self.run.steps * algorithm.num_epochs * parts
        if self.optimizer.lr_warmup_iters >= updates:
            expected = f"less than the run's optimizer steps ({updates})"
            yield self.expect("optimizer.lr_warmup_iters", expected)
        for path, source in self.sources.items():
            is_file = not source.prompts.startswith("reasoning_gym:")
            if "reasoning_gym" in self.reward.weights and is_file:
                expected = f'math_verify or module:function with {path}.prompts "{source.prompts}"'
                key = "reward.terms" if self.reward.terms else "reward.function"
                yield self.expect(key, expected, "reasoning_gym")
        for name in self.reward.terms:
            yield from self.expect_function("reward.terms", name, *FUNCTIONS, *self.judge.prompts)
        if self.judge.prompts.keys() & self.reward.terms.keys():
            for key in ("judge.url", "judge.model"):
                if attrgetter(key)(self) is None:
                    yield self.expect(key, "a value with a judge in reward.terms")
