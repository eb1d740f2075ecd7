"""The process of a rollout engine: owns one ``vllm.LLM`` and answers its owner over an inherited socket.

Started by ``megatron_espo.rollout.process`` as ``python -m megatron_espo.rollout.server <fd> <owner's pid>``.
"""

import ctypes
import functools
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_espo.config.experts import read_experts
from megatron_espo.faults import inject
from megatron_espo.rollout.config import EngineConfig
from megatron_espo.rollout.requests import Countdown, Enough, Request

_PR_SET_PDEATHSIG = 1
# Share of ``timeout_s`` without a finished request after which the rest are lost: before the owner gives the engine up.
_LOST_AFTER = 0.8
# vLLM's word for what was given up, and ours for what may be gone on with.
_REASONS = {"abort": "unfinished"}
_NO_REPLAY = (
    "rollout.router_replay: expected an engine that returns the experts which it chooses, got one that cannot; set it to false and "
    "rollout.allow_router_mismatch to true to train without"
)


def die_with_owner(owner_pid: int) -> None:
    """Have the kernel kill this process when its owner ends, however it ends; ignore Ctrl-C, which is the owner's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != owner_pid:
        sys.exit("The owner of this rollout engine ended before it began.")


def build_llm(config: EngineConfig):
    """The vLLM engine for ``config``, with random weights until the first sync, unless it loads the model's own."""
    import torch
    from vllm import LLM
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    options = {}
    if current_platform.is_cpu():
        # vLLM compiles one small sampling kernel even so: seconds in the first call, and a C++ compiler, for nothing.
        torch._dynamo.config.disable = True
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # for tensor-parallel workers
        # An explicit cache size skips vLLM's warm-up. Blocks of 32 tokens: with the default of 128, the prompts of a
        # group share nothing unless they are longer than that.
        options = {
            "enforce_eager": True,
            # Of a prompt in pieces vLLM puts the random numbers of a seeded request back, which a CPU's generator cannot.
            "enable_chunked_prefill": False,
            "block_size": 32,
            "kv_cache_memory_bytes": int(config.cpu_kv_cache_gib * 2**30),
        }
    else:
        options = {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": config.sleep}
    if config.routed_experts and HAS_TRITON:
        options["enable_return_routed_experts"] = True
    llm = LLM(
        model=config.model,
        dtype=config.dtype,
        seed=config.seed,
        max_model_len=config.max_model_len,
        tensor_parallel_size=config.tensor_parallel_size,
        trust_remote_code=False,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        load_format="auto" if config.load_weights else "dummy",
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        hf_overrides={"head_dtype": "float32"},  # as the trainer's: a bfloat16 logit of 20 is off by up to 0.06 nats
        weight_transfer_config=None if config.load_weights else {"backend": config.transport},
        worker_extension_cls="megatron_espo.rollout.worker.WorkerExtension",
        disable_log_stats=True,
        **options,
    )
    if config.routed_experts and not HAS_TRITON:
        llm.collective_rpc("record_routed_experts")
    return llm


class Server:
    """The calls that an owner may make. Any exception is fatal for the engine: the owner kills it."""

    def __init__(self, config: EngineConfig, report: Callable[[str, object], None]):
        self.config = config
        try:
            self.llm = build_llm(config)
        except Exception as error:
            if config.routed_experts and re.search(r"aux ?output|routed.experts", str(error), re.IGNORECASE):
                raise RuntimeError(f"{error}\n{_NO_REPLAY}") from error
            raise
        self.report = report
        experts = read_experts(json.loads(Path(config.model, "config.json").read_text()))
        self._layers = [i for i, sparse in enumerate(experts.layers) if sparse] if experts else []

    def generate(self, requests: list[Request], sampling: dict, tell: bool = False, enough: Enough | None = None) -> list[tuple | None]:
        """For each request (sampled token ids, their processed log-probs, finish reason, routed experts); None: vLLM lost it.

        Args:
            sampling: in place of the configuration's; with it no experts are returned: the responses are judged, not trained.
            tell: report (seed, sampled token ids) of each as soon as it is finished.
            enough: when to leave the others ``"unfinished"``; None: all are waited for.
        """
        return self._sample(requests, functools.partial(self._sampling_params, **sampling), tell, enough, experts=not sampling)

    def canary(self, prompts: list[tuple[int, ...]], num_tokens: int) -> list[tuple]:
        """As ``generate``, but ``num_tokens`` tokens each from the whole distribution, always the same ones."""
        make_params = functools.partial(self._sampling_params, top_p=1.0, top_k=0, stop_token_ids=[])
        return _all_there(self._sample([Request(prompt, seed, num_tokens) for seed, prompt in enumerate(prompts)], make_params))

    def _sample(
        self, requests: list[Request], make_params: Callable, tell: bool = False, enough: Enough | None = None, experts: bool = True
    ) -> list[tuple | None]:
        experts = experts and self.config.routed_experts

        def sample(o) -> tuple:
            chosen = o.routed_experts[:, self._layers] if experts and o.routed_experts is not None else None
            return tuple(o.token_ids), tuple(o.logprobs.logprobs), _REASONS.get(o.finish_reason, o.finish_reason), chosen

        return [output and sample(output.outputs[0]) for output in self._run(requests, make_params, tell, enough, experts)]

    def logprobs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        from vllm import SamplingParams

        def params(request: Request) -> SamplingParams:
            return SamplingParams(max_tokens=request.max_tokens, prompt_logprobs=0, detokenize=False)

        outputs = _all_there(self._run([Request(sequence, None, 1) for sequence in sequences], params))
        return [
            [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], sequence[1:], strict=True)]
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def _sampling_params(self, request: Request, **changes):
        from vllm import SamplingParams

        options = {
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "top_k": self.config.top_k,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            "stop_token_ids": sorted(self.config.eos_ids),
            "ignore_eos": True,  # the trainer's tokenizer, not the model's folder, says what ends a response
            "logprobs": 0,
            "flat_logprobs": True,
            "detokenize": False,
        }
        return SamplingParams(**options | changes)

    def _run(
        self, requests: list[Request], make_params: Callable, tell: bool = False, enough: Enough | None = None, experts: bool = False
    ) -> list:
        """Run requests until all, or ``enough``, are finished, reporting those that are. Outputs are in the order of the requests; None for
        one that vLLM lost: neither finished nor, for most of ``timeout_s``, followed by another that did. With ``experts`` they have those of all
        tokens but the last; unfinished ones may have none."""
        self._wake_caches()
        keys = self.llm.enqueue(
            [{"prompt_token_ids": list(request.token_ids)} for request in requests], [make_params(request) for request in requests], use_tqdm=False
        )
        outputs, engine = {}, self.llm.llm_engine
        countdown = Countdown(enough or Enough(len(requests) + 1), requests)
        if inject("reply") == "lose":
            engine.engine_core.abort_requests(keys[:1])  # the engine core forgets it; its front waits for ever
        names = [key.partition("-")[0] for key in keys]  # vLLM appends a random part, which outputs lack
        by_name, by_key = dict(zip(names, requests, strict=True)), dict(zip(names, keys, strict=True))
        news = time.monotonic()
        while engine.has_unfinished_requests() and not countdown.is_over and time.monotonic() < news + _LOST_AFTER * self.config.timeout_s:
            finished = {output.request_id: output for output in engine.step() if output.finished}
            if finished:
                if experts:
                    self._add_routed_experts({by_key[name]: output for name, output in finished.items()})
                outputs |= finished
                for name in finished:
                    countdown.finish(by_name[name])
                self.report("progress", (len(outputs), len(requests)))
                if tell:
                    self.report("finished", [(by_name[name].seed, tuple(output.outputs[0].token_ids)) for name, output in finished.items()])
                news = time.monotonic()
        given_up = {name: key for name, key in by_key.items() if name not in outputs}
        if countdown.is_over:
            so_far = {name: self._so_far(key) for name, key in given_up.items()}
            if experts:
                self._add_routed_experts({given_up[name]: output for name, output in so_far.items()})
            outputs |= so_far
        engine.abort_request(list(given_up))
        return [outputs.get(name) for name in names]

    def _so_far(self, key: str):
        """The output of a request that is about to be given up."""
        from vllm.v1.engine import FinishReason

        # What vLLM itself does for a request that is aborted, where somebody waits for its output.
        return self.llm.llm_engine.output_processor.request_states[key].make_request_output([], None, FinishReason.ABORT, None)

    def sleep(self) -> None:
        self.llm.sleep(level=2)

    def wake(self) -> None:
        inject("wake")
        self.llm.wake_up(["weights"])

    def _wake_caches(self) -> None:
        if self.llm.llm_engine.is_sleeping() and not self.llm.wake_up(["kv_cache"]):
            raise RuntimeError("vLLM's weights are asleep")

    def _add_routed_experts(self, outputs: Mapping[str, Any]) -> None:
        """See to it that ``outputs``, by vLLM's inner names, have their ``[tokens - 1, layers, top_k]`` experts. Before the engine's next step."""
        counts = {key: len(o.prompt_token_ids) + len(o.outputs[0].token_ids) - 1 for key, o in outputs.items() if o.outputs[0].token_ids}
        if not self.llm.llm_engine.vllm_config.aux_output_config.enable_return_routed_experts:
            for key, rows in zip(counts, self.llm.collective_rpc("routed_experts", args=(list(counts.items()),))[0], strict=True):
                outputs[key].outputs[0].routed_experts = rows
        for key, count in counts.items():
            output = outputs[key].outputs[0]
            found = None if output.routed_experts is None else len(output.routed_experts)
            if found != count and not (found is None and output.finish_reason == "abort"):
                raise RuntimeError(f"expected the experts of {count} tokens from vLLM, got those of {found or 'none'}")

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def poison(self, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
        self.llm.collective_rpc("poison_weights", args=(shapes,))

    def served_checksums(self, dtype: str) -> dict[str, int]:
        """The workers' partial sums, added up."""
        total: dict[str, int] = {}
        for part in self.llm.collective_rpc("served_checksums", args=(dtype,)):
            for name, value in part.items():
                total[name] = (total.get(name, 0) + value) % 2**64
        return total

    def transfer_seconds(self) -> dict[str, float]:
        return self.llm.collective_rpc("transfer_seconds")[0]

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict | list[dict]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, version: int) -> None:
        for rank, missing in enumerate(self.llm.collective_rpc("missing_weights")):
            if missing:
                raise RuntimeError(
                    f"transfer: {len(missing)} weights did not reach worker {rank}: {'; '.join(missing[:5])}"
                )
        self.llm.finish_weight_update(str(version))
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache still holds blocks of the old weights")


def _all_there(outputs: list) -> list:
    if None in outputs:
        raise RuntimeError(f"vLLM lost {outputs.count(None)} of {len(outputs)} requests")
    return outputs


def serve(connection: Connection) -> None:
    """Answer calls until the owner says ``close`` or is gone. Each gets ("result", value) or ("error", text)."""
    server = None
    while True:
        try:
            method, args = connection.recv()
        except (EOFError, OSError):
            return
        if method == "close":
            return
        try:
            if method == "start":
                server = Server(*args, lambda kind, news: connection.send((kind, news)))
                result = server.llm.model_config.max_model_len
            else:
                result = getattr(server, method)(*args)
        except Exception as error:
            traceback.print_exc()
            connection.send(("error", f"{type(error).__name__}: {error}"))
        else:
            connection.send(("result", result))


if __name__ == "__main__":
    die_with_owner(int(sys.argv[2]))
    serve(Connection(int(sys.argv[1])))
    # vLLM's orderly shutdown takes seconds and saves nothing: weights and cache are copies.
    sys.stdout.flush()
    os._exit(0)
