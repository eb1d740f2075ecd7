"""Settings of rollouts and of the vLLM engines that sample them."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from megatron_espo.config.rules import Count, Items, Problems, Section, Text, show
from megatron_espo.distributed.addresses import parse_address

# vLLM silently raises lower temperatures to this value.
LOWEST_TEMPERATURE = 0.01

# Arguments of vLLM's server that this project sets, and what to use instead.
RESERVED_ENGINE_ARGS = {
    "model": "use model.path",
    "dtype": "use model.dtype",
    "seed": "use run.seed",
    "max-model-len": "use rollout.max_model_len",
    "tensor-parallel-size": "use rollout.tensor_parallel_size",
    "data-parallel-size": "use rollout.engines",
    "gpu-memory-utilization": "use rollout.gpu_memory_utilization",
    "enable-sleep-mode": "use rollout.sleep",
    "weight-transfer-config": "use rollout.transport",
    "enable-return-routed-experts": "use rollout.router_replay",
    "return-sampling-mask": "use rollout.top_p and rollout.top_k",
    "quantization": "use rollout.quantization",
} | dict.fromkeys(
    (
        "api-key", "generation-config", "hf-overrides", "host", "load-format", "logprobs-mode",
        "middleware", "port", "served-model-name", "skip-tokenizer-init", "uds",
        "worker-extension-cls",
    ),
    "leave it out",
)  # fmt: skip


class Rollout(Section):
    """Sampling with vLLM."""

    prompts_per_step: Count = 128
    """Prompts in one rollout batch (paper: 128)."""
    group_size: int = Field(8, ge=2)
    """Responses per prompt (paper: 8). Advantages compare the responses of this group."""
    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE)
    """Sampling temperature; training uses the same. Lower explores less."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling. With top_p < 1 or top_k > 0 the engine returns the token ids that they
    kept, and training renormalizes over these ids, so importance ratios stay unbiased."""
    top_k: int = Field(0, ge=-1)
    """Sample only from the k most likely tokens. 0 or -1 turns it off. With top_p it limits the
    memory of the kept ids: 4 bytes per id, at most k ids per token."""
    router_replay: bool = True
    """Train each token of a mixture of experts in the experts that the engine chose for it. false
    needs algorithm.rollout_correction, because the trainer then chooses others for some tokens."""
    max_response_tokens: Count = 2048
    """Longest response, in tokens (paper: 16384). Longer ones are truncated and counted."""
    max_resampling_rounds: NonNegativeInt = 0
    """DAPO's dynamic sampling: most rounds a step that replace prompts of equal rewards. 0: off."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest prompt + response, in tokens. null uses the model's context. Less saves memory."""
    engines: Count = 1
    """Number of engines. Every (world size / engines)-th rank owns one, as its child process or
    on one of hosts. On GPUs: one or more per node."""
    tensor_parallel_size: Count = 1
    """TP of one engine, independent of Megatron's TP."""
    hosts: Items[str] = ()
    """Machines that run the engines, as host:port of their servers (megatron-espo serve). Hosts
    beyond engines are spares. Empty: engines are child processes of the trainer's ranks."""
    host_timeout_s: float = Field(60.0, ge=5)
    """With hosts: seconds without contact after which the trainer gives up a machine and its
    server exits. Another machine must answer within the same time."""
    transport: Literal["auto", "files", "ipc", "nccl", "nccl_m2n", "sharded_rdt"] = "auto"
    """How weights reach the engine: files (in memory; with hosts in run.dir), ipc (same GPU), or on
    other GPUs nccl, nccl_m2n (from all ranks) and sharded_rdt (over Ray)."""
    visible_devices: Text | None = None
    """GPUs of the engine, such as 6,7. null shares the trainer's. Not with hosts."""
    verify_every: NonNegativeInt = 20
    """Weight updates between two checks that every tensor in the engine equals the trainer's. 0
    checks only the first."""
    canary_prompts: NonNegativeInt = 4
    """Prompts whose log-probs engine and trainer compare after every weight update. 0: none."""
    max_restarts: NonNegativeInt = 2
    """Restarts of a failed engine before the run ends."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of each GPU's memory for the engine. The rest is for the trainer."""
    sleep: bool = False
    """Free the engine's GPU memory during training, and send all weights again afterwards. For
    engines that share the trainer's GPUs. Allows a high gpu_memory_utilization."""
    quantization: Text | None = None
    """Weights and matrix products of the engine in fewer bits; the trainer keeps bfloat16. fp8 is
    vLLM's fp8_per_channel; other online quantizations of vLLM pass through. Needs
    algorithm.rollout_correction token, sequence or geometric. Every weight update compares the
    engine's weights with those that were sent. null: off."""
    engine_args: dict[str, Any] = {}
    """More arguments of vLLM's server, such as {max_num_seqs: 64}; none of other settings."""
    max_staleness: NonNegativeInt = 0
    """Most weight updates between the sampling of a token and the step that trains it. 0: each
    step waits for its own prompts. Above 0: the engines sample while the trainer trains, and
    algorithm.rollout_correction must be token, sequence or geometric."""
    over_sampling_prompts: Count | None = None
    """With max_staleness: prompts in flight beyond prompts_per_step. null: max_staleness x
    prompts_per_step."""
    timeout_s: PositiveFloat = 900.0
    """Seconds without progress (start, a finished response) after which an engine has failed."""
    log_prob_gap_stop: PositiveFloat | None = None
    """End the run, before its step is saved, when the mean |engine - trainer| log-prob
    difference exceeds this, in nats per token. null never ends it."""

    @property
    def truncates(self) -> bool:
        """Whether top-p or top-k removes tokens."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def ahead(self) -> int:
        """Prompts in flight beyond those that a step trains."""
        if not self.max_staleness:
            return 0
        return self.over_sampling_prompts or self.max_staleness * self.prompts_per_step

    def problems(self) -> Problems:
        if self.engines > 1 and self.transport in ("nccl_m2n", "sharded_rdt"):
            yield self.expect("engines", f"1 with transport {self.transport}")
        most = self.max_staleness * self.prompts_per_step
        if (self.over_sampling_prompts or 0) > most:
            expected = f"at most max_staleness x prompts_per_step = {most}"
            yield self.expect("over_sampling_prompts", expected)
        for name in self.engine_args:
            if instead := RESERVED_ENGINE_ARGS.get(name.replace("_", "-")):
                expected = "no argument that this project sets"
                yield self.expect("engine_args", expected, name, instead)
        has_own_gpus = {
            "hosts": self.hosts,
            "transport": self.transport in ("nccl", "nccl_m2n", "sharded_rdt"),
            "visible_devices": self.transport == "auto" and self.visible_devices,
        }
        if self.sleep and (keys := [key for key, has_own in has_own_gpus.items() if has_own]):
            which = f"rollout.{keys[0]} {show(getattr(self, keys[0]))}"
            yield self.expect("sleep", f"false with {which} (the engine has GPUs of its own)")
        if self.hosts:
            yield from self._host_problems()

    def _host_problems(self) -> Problems:
        for text in self.hosts:
            try:
                parse_address(text)
            except ValueError as error:
                yield "hosts", str(error)
            if self.hosts.count(text) > 1:
                yield self.expect("hosts", "each address once (one engine per host)", text)
        if len(self.hosts) < self.engines:
            expected = f"at least rollout.engines = {self.engines} addresses"
            yield self.expect("hosts", expected, len(self.hosts))
        if self.visible_devices is not None:
            advice = "set CUDA_VISIBLE_DEVICES where megatron-espo serve starts"
            yield self.expect("visible_devices", "null with rollout.hosts", advice=advice)
        if self.transport == "ipc":
            expected = "auto, files, nccl, nccl_m2n or sharded_rdt with rollout.hosts"
            yield self.expect("transport", expected, advice="ipc works on one machine only")
