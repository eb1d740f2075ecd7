"""Every route requires the run's key. No route returns tokens of weights that are not served."""

import asyncio
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

pytest.importorskip("vllm")
from safetensors import safe_open

from megatron_espo.rollout import guard, vllm_plugin
from megatron_espo.rollout.guard import CONTROL_ROUTES, Guard
from megatron_espo.rollout.server import PREFIX, ServerProcess, log_tail, run_key
from tests.support.real_engine import engine_config, wait_until
from tests.support.tiny import save_tiny_model

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")
BODY: dict[str, Any] = {
    "model": "policy",
    "prompt": [1, 4, 5],
    "token_ids": [1, 4, 5],
    "max_tokens": 4,
    "stream": False,
    "request_id": "a",
    "sampling": {"max_tokens": 4, "seed": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "sampling_params": {"max_tokens": 4},
}


class Server:
    """A running server, and requests to it."""

    def __init__(self, folder: Path) -> None:
        save_tiny_model(folder / "model")
        (folder / "run").mkdir()
        self.config = engine_config(
            folder / "model", folder / "run", max_model_len=64, load_weights=True
        )
        self.key = run_key(folder / "run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # the log lists every route
            self.process = ServerProcess(self.config)
        self.socket = self.process.address.removeprefix("unix:")
        wait_until(lambda: self._answers() or not self.process.is_alive, "the server starts", 200)
        assert self.process.is_alive, log_tail(self.config.log_path)

    def _answers(self) -> bool:
        try:
            return self.request(f"{PREFIX}/info")[0] == 200
        except aiohttp.ClientError:
            return False

    def session(self, key: str | None) -> aiohttp.ClientSession:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        connector = aiohttp.UnixConnector(self.socket)
        return aiohttp.ClientSession("http://engine", connector=connector, headers=headers)

    def request(self, path: str, body: dict | None = None, method: str = "POST") -> tuple[int, str]:
        """Status and text of one request with the key."""

        async def request() -> tuple[int, str]:
            async with self.session(self.key) as session:
                async with session.request(method, path, json=body) as response:
                    return response.status, await response.text(errors="replace")

        return asyncio.run(asyncio.wait_for(request(), 60))

    def routes(self) -> set[tuple[str, str]]:
        """``(method, path)`` of every route in OpenAPI or the log; ``WS``: websocket."""
        described = json.loads(self.request("/openapi.json", method="GET")[1])["paths"]
        found = {(method.upper(), path) for path, calls in described.items() for method in calls}
        for line in self.config.log_path.read_text().splitlines():
            if match := re.search(r"Route: (\S+), Methods: (.*)", line):
                found |= {(method, match[1]) for method in re.findall("[A-Z]+", match[2])}
            elif match := re.search(r"Route: (\S+), Endpoint: ", line):
                found.add(("WS", match[1]))
        return {(method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in found}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("server"))
    yield found
    found.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "0" * 64, ""])
def test_every_route_wants_the_key(server, key):
    routes = server.routes()
    paths = {path for _, path in routes}
    paths |= {"/metrics", "/metrics/", "/docs", "/", "//metrics", "/nowhere"}
    expected = {"/pause", "/update_weights", "/collective_rpc", "/v1/completions"}
    assert expected | {f"{PREFIX}/generate", f"{PREFIX}/canary"} <= paths
    assert len(paths) > 40, sorted(paths)
    asked = [(method, path) for path in sorted(paths) for method in METHODS]

    async def statuses() -> list[int]:
        async with server.session(key) as session:

            async def status(method: str, path: str) -> int:
                async with session.request(method, path, json=BODY) as response:
                    return response.status

            return await asyncio.gather(*(status(*pair) for pair in asked))

    found = dict(zip(asked, asyncio.run(statuses()), strict=True))
    assert {pair: status for pair, status in found.items() if status != 401} == {}

    async def open_websockets() -> None:
        sockets = {path for method, path in routes if method == "WS"} | {"/v1/realtime"}
        async with server.session(key) as session:
            for path in sorted(sockets):
                with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                    await session.ws_connect(path)
                assert error.value.status in (401, 403), path

    asyncio.run(open_websockets())
    assert server.request("/health", method="GET")[0] == 200


@pytest.mark.slow
def test_no_route_returns_tokens_of_nan(server):
    """Requests wait after ``fill_nan``, until an update is finished and served."""
    for path in ("/v1/completions", "/inference/v1/generate", f"{PREFIX}/generate"):
        assert server.request(path, BODY)[0] == 200, (path, server.request(path, BODY))
    assert server.request(f"{PREFIX}/worker/update_weights", {"args": []})[0] == 404
    with safe_open(Path(server.config.model, "model.safetensors"), "np") as file:
        shapes = [[name, file.get_slice(name).get_shape()] for name in file.keys()]  # noqa: SIM118
    status, text = server.request(f"{PREFIX}/worker/fill_nan", {"args": [shapes]})
    assert status == 200, text
    posts = {path for method, path in server.routes() if method == "POST"}
    posts -= CONTROL_ROUTES | {f"{PREFIX}/worker/x"}  # x: a path parameter
    sampling = {"/v1/completions", "/v1/chat/completions", "/inference/v1/generate"}
    assert sampling | {f"{PREFIX}/generate"} <= posts, posts

    async def answers() -> dict[str, Any]:
        async with server.session(server.key) as session:

            async def answer(path: str) -> Any:
                limit = aiohttp.ClientTimeout(total=3)
                try:
                    async with session.post(path, json=BODY, timeout=limit) as response:
                        return response.status, await response.text(errors="replace")
                except TimeoutError:
                    return None

            found = await asyncio.gather(*map(answer, posts))
            return dict(zip(posts, found, strict=True))

    assert {path: found for path, found in asyncio.run(answers()).items() if found} == {}
    status, text = server.request(f"{PREFIX}/canary", BODY)
    assert status == 409 and "unusable" in text
    assert server.request("/resume")[0] == 409
    assert server.request(f"{PREFIX}/serve", {"version": 1})[0] == 409
    # An update that was not started cannot be finished.
    assert server.request("/finish_weight_update", {"weight_version": "1"})[0] != 200
    assert server.request(f"{PREFIX}/serve", {"version": 1})[0] == 409
    assert json.loads(server.request(f"{PREFIX}/info")[1])["weights"] == "unusable"


@pytest.mark.slow
def test_the_socket_is_its_users_alone(server):
    assert stat.S_IMODE(os.stat(Path(server.socket).parent).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(Path(server.config.folder, "engine.key")).st_mode) == 0o600


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A function that sends a path to a guard with new state; returns the status and the state."""
    monkeypatch.setenv("MEGATRON_ESPO_RUN_FOLDER", str(tmp_path))
    monkeypatch.setattr(guard, "STATE", guard.WeightState())
    headers = [(b"authorization", f"Bearer {run_key(tmp_path)}".encode())]

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    def request(path: str) -> int:
        sent: list[dict] = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        asyncio.run(Guard(app)(scope, None, send))
        return sent[0]["status"]

    return request


def test_a_server_that_served_no_weights_refuses(guarded):
    """Requests for tokens must not wait forever for a server that replaces an older one."""
    for path in ("/v1/completions", "/inference/v1/generate", "/generative_scoring", "/new_route"):
        assert guarded(path) == 503, path


def test_routes_that_change_weights_make_them_unusable(guarded):
    changes = ("/start_weight_update", "/update_weights", "/sleep", "/collective_rpc")
    for path in (*changes, f"{PREFIX}/worker/fill_nan"):
        guard.STATE.serve(1)
        assert guarded(path) == 200 and guard.STATE.weights == "unusable", path
        assert {guarded(path) for path in ("/resume", f"{PREFIX}/serve")} == {409}
    assert guarded("/finish_weight_update") == 200
    assert guard.STATE.weights == "arrived" and guarded("/resume") == 200


def test_a_ping_does_not_wait_for_a_weight_update(monkeypatch):
    """Workers answer after the call that they are in. A pool would take the server for failed."""
    state, calls = guard.WeightState(), []
    monkeypatch.setattr(vllm_plugin, "STATE", state)

    async def collective_rpc(method, **_):
        calls.append(state.weights)
        return [None]

    async def read():
        return {"timeout": 60.0}

    app = SimpleNamespace(
        state=SimpleNamespace(espo_engine=SimpleNamespace(collective_rpc=collective_rpc))
    )
    for change in (lambda: None, lambda: state.set("arrived"), lambda: state.serve(0)):
        change()
        request = SimpleNamespace(app=app, json=read)
        assert asyncio.run(vllm_plugin.call_worker("ping", request)).status_code == 200
    assert calls == ["serving"]


def test_a_guard_needs_a_key(monkeypatch):
    monkeypatch.delenv("MEGATRON_ESPO_RUN_FOLDER", raising=False)
    with pytest.raises(KeyError, match="MEGATRON_ESPO_RUN_FOLDER"):
        Guard(None)
