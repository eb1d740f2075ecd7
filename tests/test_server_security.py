"""The real server: nothing answers without the run's key, and no route returns tokens of weights that are not served."""

import asyncio
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

pytest.importorskip("vllm")
from safetensors import safe_open

from megatron_espo.rollout.server import PREFIX, EngineConfig, ServerProcess, log_tail, read_key, run_key_file
from megatron_espo.rollout.vllm_plugin import CONTROL_ROUTES, Guard
from tests.tiny import save_tiny_model

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")
BODY = {"model": "policy", "prompt": [1, 4, 5], "token_ids": [1, 4, 5], "max_tokens": 4, "stream": False}
BODY |= {"request_id": "a", "sampling": {"max_tokens": 4, "seed": 1}, "sampling_params": {"max_tokens": 4}}


class Server:
    """The running server, and requests to it."""

    def __init__(self, folder: Path) -> None:
        save_tiny_model(folder / "model")
        run_folder = folder / "run"
        run_folder.mkdir()
        self.config = EngineConfig(
            model=str(folder / "model"),
            folder=str(run_folder),
            dtype="float32",
            transport="",
            max_model_len=64,
            load_weights=True,
            engine_args={"kv_cache_memory_bytes": 1 << 26},
        )
        self.key = read_key(run_key_file(run_folder))
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO"  # the log lists every route
        try:
            self.process = ServerProcess(self.config, is_cpu=True)
        finally:
            del os.environ["VLLM_LOGGING_LEVEL"]
        self.socket = self.process.address.removeprefix("unix:")
        deadline = time.monotonic() + 200
        while not self._answers():
            assert self.process.is_alive and time.monotonic() < deadline, log_tail(self.config.log_path)
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return self.request(f"{PREFIX}/info", method="GET")[0] == 200
        except aiohttp.ClientError:
            return False

    def session(self, key: str | None) -> aiohttp.ClientSession:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return aiohttp.ClientSession("http://engine", connector=aiohttp.UnixConnector(self.socket), headers=headers)

    def request(self, path: str, body: dict | None = None, method: str = "POST") -> tuple[int, str]:
        """Status and text of one request with the key."""

        async def ask() -> tuple[int, str]:
            async with self.session(self.key) as session, session.request(method, path, json=body) as response:
                return response.status, await response.text(errors="replace")

        return asyncio.run(asyncio.wait_for(ask(), 60))

    def routes(self) -> set[tuple[str, str]]:
        """``(method, path)`` of every HTTP route, from the OpenAPI description and from the log; ``WS``: a websocket."""
        described = json.loads(self.request("/openapi.json", method="GET")[1])["paths"]
        found = {(method.upper(), path) for path, methods in described.items() for method in methods}
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
    paths = {path for _, path in routes} | {"/metrics", "/metrics/", "/docs", "/", "//metrics", "/nowhere"}
    expected = {"/pause", "/update_weights", "/collective_rpc", "/v1/completions", f"{PREFIX}/generate", f"{PREFIX}/release"}
    assert expected <= paths and len(paths) > 40, sorted(paths)

    async def statuses() -> dict[tuple[str, str], int]:
        async with server.session(key) as session:

            async def status(method: str, path: str) -> int:
                async with session.request(method, path, json=BODY) as response:
                    return response.status

            asked = [(method, path) for path in sorted(paths) for method in METHODS]
            return dict(zip(asked, await asyncio.gather(*(status(*pair) for pair in asked)), strict=True))

    assert {pair: status for pair, status in asyncio.run(statuses()).items() if status != 401} == {}

    async def open_websockets() -> None:
        async with server.session(key) as session:
            for path in sorted({path for method, path in routes if method == "WS"} | {"/v1/realtime"}):
                with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                    await session.ws_connect(path)
                assert error.value.status in (401, 403), path

    asyncio.run(open_websockets())
    assert server.request("/health", method="GET")[0] == 200


# Routes of this project that return nothing computed from weights.
OWN_CONTROL_ROUTES = {PREFIX + path for path in ("/abort", "/worker", "/serve", "/lease", "/release", "/reset_cache")}


@pytest.mark.slow
def test_no_route_returns_tokens_of_nan(server):
    """Served weights answer; after ``fill_nan`` requests wait, until nothing but an update can make them go on."""
    for path in ("/v1/completions", "/inference/v1/generate", f"{PREFIX}/generate"):
        assert server.request(path, BODY)[0] == 200, (path, server.request(path, BODY))
    assert server.request(f"{PREFIX}/worker", {"method": "update_weights", "args": []})[0] == 400
    with safe_open(Path(server.config.model, "model.safetensors"), "np") as file:
        shapes = [[name, file.get_slice(name).get_shape()] for name in file.keys()]  # noqa: SIM118
    status, text = server.request(f"{PREFIX}/worker", {"method": "fill_nan", "args": [shapes]})
    assert status == 200, text
    posts = sorted({path for method, path in server.routes() if method == "POST"} - CONTROL_ROUTES - OWN_CONTROL_ROUTES)
    assert {"/v1/completions", "/v1/chat/completions", "/inference/v1/generate", f"{PREFIX}/generate"} <= set(posts), posts

    async def outcomes() -> dict[str, object]:
        async with server.session(server.key) as session:

            async def outcome(path: str) -> object:
                try:
                    async with session.post(path, json=BODY, timeout=aiohttp.ClientTimeout(total=5)) as response:
                        return response.status, await response.text(errors="replace")
                except TimeoutError:
                    return "waits"

            return dict(zip(posts, await asyncio.gather(*map(outcome, posts)), strict=True))

    assert {path: found for path, found in asyncio.run(outcomes()).items() if found != "waits"} == {}
    status, text = server.request(f"{PREFIX}/generate", BODY | {"canary": True})
    assert status == 409 and "unusable" in text
    assert server.request("/resume")[0] == 409
    assert server.request(f"{PREFIX}/serve", {"version": 1})[0] == 409
    # An update that was not started brings nothing.
    assert server.request("/finish_weight_update", {"weight_version": "1"})[0] != 200
    assert server.request(f"{PREFIX}/serve", {"version": 1})[0] == 409
    assert json.loads(server.request(f"{PREFIX}/info", method="GET")[1])["weights"] == "unusable"


@pytest.mark.slow
def test_the_socket_is_its_users_alone(server):
    assert stat.S_IMODE(os.stat(Path(server.socket).parent).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(run_key_file(server.config.folder)).st_mode) == 0o600


def test_a_server_that_served_no_weights_refuses(tmp_path, monkeypatch):
    """A fresh server in the place of an older one: requests for tokens must not wait for ever. And a guard wants a key file."""
    monkeypatch.delenv("MEGATRON_ESPO_KEY_FILE", raising=False)
    with pytest.raises(RuntimeError, match="MEGATRON_ESPO_KEY_FILE: expected the path of the run's key"):
        Guard(None)
    monkeypatch.setenv("MEGATRON_ESPO_KEY_FILE", str(run_key_file(tmp_path)))
    monkeypatch.setattr("megatron_espo.rollout.vllm_plugin._state", None)

    async def app(scope, receive, send):
        raise AssertionError("it reached vLLM")

    async def ask(path: str) -> int:
        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {read_key(run_key_file(tmp_path))}".encode())]
        await Guard(app)({"type": "http", "method": "POST", "path": path, "headers": headers}, None, send)
        return sent[0]["status"]

    for path in ("/v1/completions", "/inference/v1/generate", "/generative_scoring", "/a_route_of_the_next_version"):
        assert asyncio.run(ask(path)) == 503, path
