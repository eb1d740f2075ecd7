"""What a rollout engine is started with. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: Hugging Face folder; its weights are not read, the first sync brings them, unless ``load_weights``.
        log_path: file that receives the output of vLLM.
        dtype: ``float32`` or ``bfloat16``.
        transport: vLLM's weight transfer backend: one of ``transport.TRANSPORTS``; not used with ``load_weights``.
        max_model_len: tokens of prompt and response together; None: the model's context.
        max_response_tokens: a response is cut off there.
        eos_ids: token ids that end a response (the token is part of the response).
        temperature, top_p, top_k: of sampling; the returned log-probs are those after these three.
        seed: of the engine; ``generate`` takes seeds of its own.
        tensor_parallel_size: GPUs (or CPU processes) of this engine.
        gpu_memory_utilization: fraction of each GPU's memory that vLLM may take.
        cpu_kv_cache_gib: size of the key/value cache on CPU (GiB).
        timeout_s: a call fails after so many seconds without news (in ``generate``: without a finished response).
        start_timeout_s: the same for loading vLLM and building the model.
        visible_devices: CUDA_VISIBLE_DEVICES of the child; None: inherited.
        sleep: able to ``Engine.sleep`` and give its GPU memory back; vLLM on a CPU always is, and gives nothing back.
        routed_experts: return with each response the experts that its tokens went to; for models that have experts.
        hosts: ``host:port`` of the agents that may run the engine, in the order in which they are asked; none: it is a child of its owner.
        host_timeout_s: a connection to another machine is given up after so many seconds without a sign of life.
        load_weights: read the folder's weights, and serve them as version 0 without a sync: for evaluations.
    """

    model: str
    log_path: str
    dtype: str
    transport: str
    max_response_tokens: int
    eos_ids: frozenset[int]
    max_model_len: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.5
    cpu_kv_cache_gib: float = 1.0
    timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    visible_devices: str | None = None
    sleep: bool = False
    routed_experts: bool = False
    hosts: tuple[str, ...] = ()
    host_timeout_s: float = 60.0
    load_weights: bool = False


def engine_owners(engines: int, world_size: int) -> list[int]:
    """The trainer's ranks that have an engine: every ``world_size / engines``-th, from rank 0 on; ``engines`` divides ``world_size``."""
    return list(range(0, world_size, world_size // engines))
