"""What this project adds to vLLM's server: a key on every path, a guard of the weights' state, and a few routes.

vLLM finds it by entry points (``setup.py``) when ``VLLM_PLUGINS`` names ``megatron_espo``, and by
``--middleware megatron_espo.rollout.vllm_plugin.Guard``. The environment variables below configure it.
"""

import asyncio
import ctypes
import hmac
import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from safetensors.numpy import save
from starlette.background import BackgroundTask
from vllm import SamplingParams
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.sampling_params import RequestOutputKind

from megatron_espo.config.experts import read_experts
from megatron_espo.rollout.server import (
    KEY_FILE_VARIABLE,
    OWNER_VARIABLE,
    PREFIX,
    ROUTED_EXPERTS_VARIABLE,
    SETTINGS_VARIABLE,
    package_versions,
    read_key,
)
from megatron_espo.rollout.transport import register_transports

# Worker methods that the route ``/megatron_espo/worker`` may call.
WORKER_METHODS = (
    "ping", "fill_nan", "read_back_checksums", "missing_weights", "transfer_seconds",
)  # fmt: skip
# POST routes of vLLM's that return nothing computed from weights. Any other POST route waits for weights that are served.
CONTROL_ROUTES = frozenset({
    "/abort_requests", "/collective_rpc", "/detokenize", "/finish_weight_update", "/inference/v1/abort_requests",
    "/init_weight_transfer_engine", "/is_scaling_elastic_ep", "/pause", "/ping", "/release_kv_cache_memory",
    "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache", "/resume", "/scale_elastic_ep",
    "/shutdown_weight_transfer_engine", "/sleep", "/start_draft_weight_update", "/start_weight_update", "/tokenize",
    "/update_weight_version", "/update_weights", "/wake_up", "/weight_checker",
})  # fmt: skip
_NEW_WEIGHTS = ("/start_weight_update", "/start_draft_weight_update", "/update_weights", "/sleep", "/collective_rpc")
_WAIT_SECONDS = 600.0
_PR_SET_PDEATHSIG = 1


class Weights(StrEnum):
    """State of the weights that a server holds. Only ``serving`` answers requests for tokens."""

    UNUSABLE = "unusable"  # random, NaN, asleep, or an update was started and not finished
    ARRIVED = "arrived"  # an update is finished and not yet checked
    SERVING = "serving"


def register() -> None:
    """vLLM's hook in each of its processes (``vllm.general_plugins``): die with the parent, know our weight transports."""
    if os.environ.get(KEY_FILE_VARIABLE):  # else a trainer that imports vLLM
        _die_with_parent()
    register_transports()


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends.

    This holds for the processes that the API server starts. The API server itself dies with its parent, and ignores
    Ctrl-C, which is the trainer's, only where ``MEGATRON_ESPO_OWNER_PID`` names its parent.
    """
    owner, first = os.environ.get(OWNER_VARIABLE), os.environ.get("MEGATRON_ESPO_SERVER_PID") in (None, str(os.getpid()))
    os.environ.setdefault("MEGATRON_ESPO_SERVER_PID", str(os.getpid()))  # its children inherit it
    if first and owner is None:
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if first:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.getppid() != int(owner):
            sys.exit("The owner of this rollout server ended before the server started.")


class ServerState:
    """State of the weights, and who holds the lease."""

    def __init__(self) -> None:
        self.weights, self.version = Weights.UNUSABLE, -1
        self.serving = asyncio.Event()
        self.owner, self.lease_end = "", float("inf")

    def set_weights(self, weights: Weights) -> None:
        self.weights = weights
        if weights == Weights.SERVING:
            self.serving.set()
        else:
            self.serving.clear()


_state: ServerState | None = None


def state() -> ServerState:
    """The state of this process's server; made on first use inside its event loop."""
    global _state
    if _state is None:
        _state = ServerState()
    return _state


class Guard:
    """ASGI middleware around the whole server, vLLM's own routes included.

    * Every request carries the run's key as ``Authorization: Bearer <key>``; otherwise the answer is 401. Websockets are refused.
    * A request for tokens waits until weights are served; it never reaches weights that are random, NaN or half updated.
      A server that never served weights refuses it (503): its clients knew another server, which this one replaces.
    * ``/resume`` is refused (409) while the weights are unusable.

    Raises:
        RuntimeError: at start, ``MEGATRON_ESPO_KEY_FILE`` is not set.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        if not os.environ.get(KEY_FILE_VARIABLE):
            raise RuntimeError(f"{KEY_FILE_VARIABLE}: expected the path of the run's key, got nothing")
        self._expected = f"Bearer {read_key(os.environ[KEY_FILE_VARIABLE])}".encode()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, self._expected):
            await _answer(send, 401, "expected the run's key")
            return
        path, current = scope["path"], state()
        if scope["method"] == "POST" and path not in CONTROL_ROUTES and not path.startswith(f"{PREFIX}/"):
            if current.version < 0:
                await _answer(send, 503, "this server has served no weights yet")
                return
            try:
                await asyncio.wait_for(current.serving.wait(), _WAIT_SECONDS)
            except TimeoutError:
                await _answer(send, 503, f"no weights are served; they are {current.weights}")
                return
        elif path == "/resume" and current.weights == Weights.UNUSABLE:
            await _answer(send, 409, "the weights are unusable; finish an update first")
            return
        elif path in _NEW_WEIGHTS:
            current.set_weights(Weights.UNUSABLE)
        await self.app(scope, receive, send if path != "/finish_weight_update" else _on_success(send, current))


def _on_success(send: Callable, current: ServerState) -> Callable:
    async def observed(message: dict) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            current.set_weights(Weights.ARRIVED)
        await send(message)

    return observed


async def _answer(send: Callable, status: int, text: str) -> None:
    body = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Routes:
    """vLLM's endpoint plugin (``vllm.endpoint_plugins``) with the routes under ``/megatron_espo``."""

    name = "megatron_espo"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        for path, handler in (
            ("/generate", generate), ("/abort", abort), ("/worker", call_worker), ("/serve", serve), ("/lease", lease),
            ("/release", release), ("/reset_cache", reset_cache),
        ):  # fmt: skip
            app.add_api_route(PREFIX + path, handler, methods=["POST"], response_model=None)
        app.add_api_route(PREFIX + "/info", info, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: Any, app_state: Any, args: Namespace) -> None:
        app_state.espo_engine = engine_client
        experts = read_experts(json.loads(Path(engine_client.vllm_config.model_config.model, "config.json").read_text()))
        app_state.espo_expert_layers = [i for i, sparse in enumerate(experts.layers) if sparse] if experts else []
        if args.load_format != "dummy":
            state().version = 0
            state().set_weights(Weights.SERVING)
        if os.environ.get(ROUTED_EXPERTS_VARIABLE):
            await engine_client.collective_rpc("record_routed_experts")
        app_state.espo_lease = asyncio.create_task(_end_without_owner())


@with_cancellation
async def generate(body: dict[str, Any], raw_request: Request) -> Response:
    """Sample one response from token ids.

    The body is JSON: ``request_id``, ``token_ids``, ``sampling`` (fields of vLLM's ``SamplingParams``) and ``canary``. A
    canary may read weights that arrived and are not served yet; any other request waits for served weights, before it
    starts and again before it answers, so that no token of unchecked weights leaves the server.

    The answer is safetensors bytes: ``token_ids`` int32, ``logprobs`` float32 (nats), ``versions`` int32, and
    ``routed_experts`` where the server records them. The header ``x-finish-reason`` says why it ended.
    """
    engine, current = raw_request.app.state.espo_engine, state()
    if body.get("canary"):
        if current.weights == Weights.UNUSABLE:
            return _json({"error": f"canary: the weights are {current.weights}"}, 409)
    elif current.version < 0:
        return _json({"error": "this server has served no weights yet"}, 503)
    else:
        await current.serving.wait()
    params = SamplingParams(
        **body["sampling"], logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    final = None
    async for final in engine.generate({"prompt_token_ids": body["token_ids"]}, params, body["request_id"]):  # noqa: B007
        pass
    output = final.outputs[0]
    if output.finish_reason == "error":
        return _json({"error": "vLLM failed at this request"}, 500)
    if not body.get("canary"):
        await current.serving.wait()
    versions = np.full(len(output.token_ids), -1, np.int32)
    for span in output.weight_versions or ():
        versions[span.start : span.end] = int(span.version) if span.version.isdigit() else 0
    arrays = {
        "token_ids": np.array(output.token_ids, np.int32),
        "logprobs": np.array(output.logprobs.logprobs if output.logprobs else [], np.float32),
        "versions": versions,
    }
    if body.get("routed_experts"):
        experts = await _routed_experts(engine, final, body["request_id"])
        count = len(final.prompt_token_ids) + len(output.token_ids) - 1
        if experts is not None and len(experts) >= count:
            arrays["routed_experts"] = experts[:count, raw_request.app.state.espo_expert_layers]
        elif output.finish_reason != "abort":
            found = "none" if experts is None else len(experts)
            return _json({"error": f"expected the experts of {count} tokens from vLLM, got those of {found}"}, 500)
    return Response(
        save({name: np.ascontiguousarray(array) for name, array in arrays.items()}),
        media_type="application/octet-stream",
        headers={"x-finish-reason": output.finish_reason or "stop"},
    )


async def _routed_experts(engine: Any, final: Any, request_id: str) -> Any:
    """``[tokens - 1, layers, top_k]`` experts of a finished request: from vLLM, or from the record of our worker (CPU)."""
    output = final.outputs[0]
    if output.routed_experts is not None:
        return output.routed_experts
    count = len(final.prompt_token_ids) + len(output.token_ids) - 1
    found = (await engine.collective_rpc("take_routed_experts", args=(request_id, count)))[0]
    if found is None:
        return None
    return np.frombuffer(found["data"], found["dtype"]).reshape(found["shape"])


async def abort(request: Request) -> Response:
    """Abort requests by id (``{"request_ids": [...]}``), or all of them without ids; each then answers with what it has."""
    engine = request.app.state.espo_engine
    ids = (await request.json()).get("request_ids")
    if ids:
        await engine.abort(ids)
    else:
        await engine.abort(list(engine.output_processor.request_states), internal=True)
    return _json({})


async def call_worker(request: Request) -> Response:
    """Call a method of ``worker.WorkerExtension`` on all workers: ``{"method": ..., "args": [...], "timeout": seconds}``."""
    body = await request.json()
    if body["method"] not in WORKER_METHODS:
        return _json({"error": f"expected one of {', '.join(WORKER_METHODS)}, got {body['method']!r}"}, 400)
    if body["method"] == "fill_nan":
        state().set_weights(Weights.UNUSABLE)
    try:
        results = await request.app.state.espo_engine.collective_rpc(
            body["method"], timeout=body.get("timeout"), args=tuple(body.get("args", ()))
        )
    except Exception as error:
        return _json({"error": f"{type(error).__name__}: {error}"}, 500)
    return _json({"results": results})


async def reset_cache(request: Request) -> Response:
    """Forget keys and values of older weights. Requests in flight are preempted; vLLM computes theirs again when they go on."""
    engine = request.app.state.espo_engine
    if not await engine.reset_prefix_cache(reset_running_requests=True):
        return _json({"error": "the prefix cache still holds blocks of the old weights"}, 500)
    return _json({})


async def serve(request: Request) -> Response:
    """Serve the weights that arrived, as policy ``version``."""
    current = state()
    if current.weights == Weights.UNUSABLE:
        return _json({"error": "serve: no finished weight update"}, 409)
    current.version = (await request.json())["version"]
    current.set_weights(Weights.SERVING)
    return _json({})


async def lease(request: Request) -> Response:
    """Take or renew the lease: ``{"owner": name, "seconds": s, "renew": bool}``.

    The answer is 409 while another owner has it, and for the renewal of a lease that nobody has.
    """
    body, current = await request.json(), state()
    if current.owner != body["owner"] and (current.owner or body.get("renew")):
        return _json({"error": f"owned by {current.owner or 'nobody'}"}, 409)
    current.owner, current.lease_end = body["owner"], time.monotonic() + body["seconds"]
    return _json({})


async def release(request: Request) -> Response:
    """Give the lease up (``{"owner": name}``), at which this server ends. 409 unless the owner has it."""
    owner, current = (await request.json())["owner"], state()
    if not owner or current.owner != owner:
        return _json({"error": f"owned by {current.owner or 'nobody'}"}, 409)
    current.owner = "nobody; it ends"  # an answer for the owner that asks now
    return JSONResponse({}, background=BackgroundTask(_end, f"{owner} gave its lease up"))


async def _end_without_owner() -> None:
    """End this process when the lease runs out. Without a lease it never does."""
    late = 0
    while late < 2:  # twice: an event loop that stood still first reads the renewals that wait for it
        await asyncio.sleep(1.0)
        late = late + 1 if time.monotonic() > state().lease_end else 0
    _end(f"the lease of {state().owner} ran out")


def _end(why: str) -> None:
    """End this process, whose weights belong to nobody; its workers follow. A keeper starts a fresh server."""
    print(f"megatron_espo: {why}; this server ends", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


async def info(request: Request) -> Response:
    """What a client compares before it uses a server: versions of packages, model, context length, sampling mode."""
    config = request.app.state.espo_engine.vllm_config
    model = config.model_config
    return _json(
        {
            "packages": package_versions(),
            "model": os.path.realpath(model.model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(model.logprobs_mode),
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "transport": config.weight_transfer_config.backend if config.weight_transfer_config else None,
            "weights": state().weights,
            "version": state().version,
            "owner": state().owner,
            "settings": os.environ.get(SETTINGS_VARIABLE),
        }
    )


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return JSONResponse(content, status_code=status)
