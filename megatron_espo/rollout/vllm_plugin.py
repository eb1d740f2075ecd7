"""This project's part of vLLM's server: process lifetime and routes under ``/megatron_espo``.

vLLM loads it by entry points (``setup.py``) when ``VLLM_PLUGINS`` names ``megatron_espo``. The
middleware ``guard.Guard`` completes it. Environment variables of ``server.py`` configure both.
"""

import asyncio
import json
import os
from argparse import Namespace
from itertools import chain
from typing import Any, cast

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from safetensors.numpy import load, save
from vllm import SamplingParams
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

import megatron_espo.rollout.file_transport
import megatron_espo.rollout.ipc_transport  # noqa: F401  both register on import
from megatron_espo.rollout import lease, server, vllm_patches
from megatron_espo.rollout.guard import STATE
from megatron_espo.rollout.server import PREFIX

# Methods of ``worker.WorkerExtension`` with a route ``/megatron_espo/worker/<method>``.
WORKER_METHODS = (
    "ping", "fill_nan", "missing_weights", "read_back_checksums", "read_back_sketches"
)  # fmt: skip


def register() -> None:
    """vLLM's hook in each of its processes (``vllm.general_plugins``)."""
    if os.environ.get(server.FOLDER_VARIABLE):  # unset in a trainer that imports vLLM
        server.die_with_parent()
        if current_platform.is_cpu():
            vllm_patches.allow_sampling_masks()
            vllm_patches.fork_engine()


class Routes:
    """vLLM's endpoint plugin (``vllm.endpoint_plugins``)."""

    name = "megatron_espo"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        own = {"/generate": generate, "/canary": generate, "/serve": serve}
        for path, handler in (own | lease.ROUTES | {"/worker/{method}": call_worker}).items():
            app.add_api_route(PREFIX + path, handler, methods=["POST"], response_model=None)

    async def init_state(self, engine_client: Any, app_state: Any, args: Namespace) -> None:
        app_state.espo_engine = engine_client
        app_state.espo_settings = settings = json.loads(os.environ[server.SETTINGS_VARIABLE])
        if args.load_format != "dummy":
            STATE.serve(version=0)
        if current_platform.is_cpu():  # on a GPU vLLM records them itself
            wanted = settings["routed_experts"], settings["sampling_masks"]
            await engine_client.collective_rpc("start_records", args=wanted)
        app_state.espo_lease = asyncio.create_task(lease.LEASE.watch())


@with_cancellation
async def generate(body: dict[str, Any], raw_request: Request) -> Response:
    """Sample one response from token ids.

    The JSON body has ``request_id``, ``token_ids`` and ``sampling`` (fields of ``SamplingParams``).
    A request waits for served weights before it starts and again before it answers, so no token of
    unchecked weights leaves the server. The path ``canary`` uses weights that are not served yet.

    The answer is in safetensors format: ``token_ids`` int32, ``logprobs`` float32 (nats),
    ``versions`` int32, ``routed_experts`` if requested, and with top-k or top-p ``mask_ids`` and
    ``mask_counts`` (of ``types.SamplingMask``) if the engine records them. The header
    ``x-finish-reason`` is vLLM's finish reason.
    """
    engine, settings = raw_request.app.state.espo_engine, raw_request.app.state.espo_settings
    has_masks = settings["sampling_masks"]
    is_canary = raw_request.scope["path"] == f"{PREFIX}/canary"
    if not is_canary:
        await STATE.serving.wait()
    sampling = body["sampling"]
    truncates = sampling["top_p"] < 1 or sampling["top_k"] > 0
    if has_masks and sampling["temperature"] == 0:
        sampling |= {"temperature": 1.0, "top_k": 1}  # vLLM refuses temperature 0 beside masks
    elif has_masks and sampling["top_k"] <= 0:
        sampling["top_k"] = engine.model_config.get_vocab_size()  # vLLM refuses 0 beside masks
    sampling |= {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
    params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
    prompt, final = {"prompt_token_ids": body["token_ids"]}, cast(Any, None)
    async for final in engine.generate(prompt, params, body["request_id"]):  # noqa: B007
        pass
    output = final.outputs[0]
    if output.finish_reason == "error":
        return PlainTextResponse("vLLM failed at this request", 500)
    if not is_canary:
        await STATE.serving.wait()
    versions = np.full(len(output.token_ids), -1, np.int32)
    for span in output.weight_versions or ():
        versions[span.start : span.end] = int(span.version) if span.version.isdigit() else 0
    arrays = {
        "token_ids": np.array(output.token_ids, np.int32),
        "logprobs": np.array(output.logprobs.logprobs if output.logprobs else [], np.float32),
        "versions": versions,
    }
    if body.get("routed_experts"):
        count = len(final.prompt_token_ids) + len(output.token_ids) - 1
        experts = output.routed_experts
        if experts is None:  # on a CPU they are in the worker's ``RoutedExpertsRecord``
            answers = await engine.collective_rpc("take_routed_experts", args=(body["request_id"],))
            experts = load(answers[0])["experts"]
        if len(experts) >= count:
            layers = settings["expert_layers"] or slice(None)
            arrays["routed_experts"] = np.ascontiguousarray(experts[:count, layers])
        elif output.finish_reason != "abort":
            text = f"expected the experts of {count} tokens, got {len(experts)}"
            return PlainTextResponse(text, 500)
    if has_masks and truncates:
        kept = output.sampling_mask.token_ids if output.sampling_mask is not None else []
        if len(kept) != len(output.token_ids):
            count = len(output.token_ids)
            text = f"expected the sampling masks of {count} tokens, got {len(kept)}"
            return PlainTextResponse(text, 500)
        arrays["mask_ids"] = np.fromiter(chain.from_iterable(kept), np.int32)
        arrays["mask_counts"] = np.array([len(ids) for ids in kept], np.int32)
    return Response(save(arrays), headers={"x-finish-reason": output.finish_reason})


async def call_worker(method: str, request: Request) -> Response:
    """Call a worker method on all workers: ``{"args": [...], "timeout": seconds}``."""
    if method not in WORKER_METHODS:
        return PlainTextResponse(
            f"expected one of {', '.join(WORKER_METHODS)}, got {method!r}", 404
        )
    if method == "ping" and STATE.weights != "serving":
        return JSONResponse({"results": []})  # workers answer after their part of a weight update
    body = await request.json()
    try:
        results = await request.app.state.espo_engine.collective_rpc(
            method, timeout=body.get("timeout"), args=tuple(body.get("args", ()))
        )
    except Exception as error:
        return PlainTextResponse(f"{type(error).__name__}: {error}", 500)
    return JSONResponse({"results": results})


async def serve(request: Request) -> Response:
    """Serve the weights that arrived as policy version ``{"version": n}``."""
    STATE.serve((await request.json())["version"])
    return JSONResponse({})
