"""The guard of a server: checks the run's key on every path and the state of the weights."""

import asyncio
import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Literal

from starlette.responses import PlainTextResponse, Response

from megatron_espo.rollout.server import FOLDER_VARIABLE, PREFIX, run_key

# Routes that change weights in place; the weights are unusable until an update is finished.
_WEIGHT_CHANGES = frozenset({
    "/collective_rpc", "/sleep", "/start_draft_weight_update", "/start_weight_update",
    "/update_weights", f"{PREFIX}/worker/fill_nan",
})  # fmt: skip
# Routes that need the weights of a finished update.
_WEIGHT_USES = frozenset({"/resume", f"{PREFIX}/canary", f"{PREFIX}/serve"})
# The POST routes that owners and keepers call. All other POST routes wait for served weights.
CONTROL_ROUTES = _WEIGHT_CHANGES | _WEIGHT_USES | {
    "/finish_weight_update", "/init_weight_transfer_engine", "/pause", "/reset_prefix_cache",
    "/wake_up", f"{PREFIX}/info", f"{PREFIX}/lease",
}  # fmt: skip


class WeightState:
    """State and policy version of a server's weights.

    Attributes:
        weights: ``unusable`` (random, NaN, asleep, or partly updated), ``arrived`` (updated and not
            yet checked) or ``serving``, the only state that answers requests for tokens.
        version: of the weights that were served last; -1: none were served yet.
        serving: set while the weights are served.
    """

    def __init__(self) -> None:
        self.weights, self.version = "unusable", -1
        self.serving = asyncio.Event()

    def set(self, weights: Literal["unusable", "arrived"]) -> None:
        self.weights = weights
        self.serving.clear()

    def serve(self, version: int) -> None:
        self.weights, self.version = "serving", version
        self.serving.set()


STATE = WeightState()


class Guard:
    """ASGI middleware around the whole server, including vLLM's own routes.

    * Every request needs the header ``Authorization: Bearer <key>``; the answer is 401 otherwise.
      Websockets are rejected.
    * A request for tokens waits until weights are served. It never reaches weights that are
      random, NaN or partly updated. A server that never served weights answers 503, because it
      replaces another server whose clients must notice.
    * ``/resume``, the canary and ``serve`` answer 409 while the weights are unusable.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self._expected = f"Bearer {run_key(os.environ[FOLDER_VARIABLE])}".encode()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if (refusal := await self._refusal(scope)) is not None:
            return await refusal(scope, receive, send)

        async def send_and_observe(message: dict) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                STATE.set("arrived")
            await send(message)

        is_finish = scope["path"] == "/finish_weight_update"
        await self.app(scope, receive, send_and_observe if is_finish else send)

    async def _refusal(self, scope: dict) -> Response | None:
        """The answer to a request that the server must not get. Waits for served weights."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, self._expected):
            return PlainTextResponse("expected the run's key", 401)
        path = scope["path"]
        is_control = path in CONTROL_ROUTES or path.startswith(f"{PREFIX}/worker/")
        if path in _WEIGHT_USES and STATE.weights == "unusable":
            return PlainTextResponse("the weights are unusable; finish an update first", 409)
        if path in _WEIGHT_CHANGES:
            STATE.set("unusable")
        elif scope["method"] == "POST" and not is_control:
            if STATE.version < 0:
                return PlainTextResponse("this server has served no weights yet", 503)
            # It waits itself after it read the body. Data that nobody reads would end a connection
            # that has TCP_USER_TIMEOUT.
            if path != f"{PREFIX}/generate":
                await STATE.serving.wait()
        return None
