"""The rollout engine: vLLM's server over HTTP, controlled by the rank that owns it."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from megatron_espo.rollout.engine import EngineError, Generation, Sampling, State
from megatron_espo.rollout.http_client import NO_ANSWER, HttpClient, LoopThread
from megatron_espo.rollout.lease import LeasedServer
from megatron_espo.rollout.server import PREFIX, EngineConfig, ServerProcess, log_tail, run_key

_POLL_SECONDS = 0.1

Shapes = Sequence[tuple[str, tuple[int, ...]]]  # names and shapes of weights


class VLLMEngine:
    """One vLLM server: a child of this process, or a server on one of ``config.hosts``.

    Implements vLLM's ``VLLMWeightSyncClient``, so vLLM's weight transports drive it. Weights that
    arrived are not served before :meth:`serve`; they can be checked first. Calls block. A failed
    call kills the server, because vLLM may return its error as the result of the next call.

    Args:
        config: see ``EngineConfig``.
        loop: event loop for HTTP.

    Attributes:
        state: see ``engine.State``.
        next_version: the policy version of the next update.
    """

    def __init__(self, config: EngineConfig, loop: LoopThread) -> None:
        self.config = config
        self.state: State = "dead"
        self.next_version: int | None = None
        self._loop, self._hosts = loop, list(config.hosts)
        self._server: ServerProcess | LeasedServer | None = None
        self._client: HttpClient | None = None

    @property
    def address(self) -> str:
        """``unix:<path>`` or ``host:port`` of the server; empty without a server."""
        return self._server.address if self._server is not None else ""

    # -- lifetime --------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a server and return at once. Call it from the main thread."""
        if self.config.hosts:
            self._server = LeasedServer(self.config, self._hosts)
        else:
            self._server = ServerProcess(self.config)
        self.state = "starting"

    def wait_ready(self) -> None:
        """Wait until the model is built. Starts a server if there is none.

        With ``load_weights`` the engine then serves these weights.
        """
        if self._server is None:
            self.start()
        config, server = self.config, self._server
        assert server is not None
        if self.state != "starting":
            return
        if isinstance(server, LeasedServer):
            server.find()
        key, deadline = run_key(config.folder), time.monotonic() + config.timeout_s
        self._client = client = HttpClient(server.address, key, config.host_timeout_s)
        while True:
            if not server.is_alive:
                raise self._failed(server.lost)
            if time.monotonic() > deadline:
                limit = f"{config.timeout_s:g} s (rollout.timeout_s)"
                raise self._failed(f"did not start within {limit}")
            try:
                self._loop.run(client.call(f"{PREFIX}/info"), config.timeout_s)
                break
            except NO_ANSWER:
                time.sleep(_POLL_SECONDS)
            except EngineError as error:
                raise self._failed(str(error)) from None
        self.state = "running"

    def close(self) -> None:
        """End the server and its workers. Safe to call twice."""
        if self._server is not None:
            self._server.kill()
        if self._client is not None:
            with suppress(TimeoutError):  # a busy event loop must not hide an earlier error
                self._loop.run(self._client.close(), 5.0)
        self._server = self._client = None
        self.state = "dead"

    def resume(self) -> None:
        """Continue the requests in flight; vLLM recomputes keys and values of older weights."""
        reset = "/reset_prefix_cache?reset_running_requests=true"
        if not self._call(reset)["success"]:
            raise self._failed("still caches keys and values of older weights")
        self._call("/resume")

    def sleep(self) -> None:
        """Abort the requests in flight and release the GPU memory of weights and caches."""
        self._call("/sleep?level=2&mode=abort")
        self.state = "asleep"

    def wake(self, shapes: Shapes) -> None:
        """Allocate the weights and fill them with NaN. :meth:`wake_caches` allocates the caches."""
        self._call("/wake_up?tags=weights")
        self.state = "running"
        self.fill_nan(shapes)

    def wake_caches(self) -> None:
        """Allocate the caches of keys and values."""
        self._call("/wake_up?tags=kv_cache")

    # -- weights ---------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("/init_weight_transfer_engine", {"init_info": init_info})

    def fill_nan(self, shapes: Shapes) -> None:
        """Load NaN into every named weight, so a check detects weights that an update omits."""
        self._worker("fill_nan", shapes)

    def start_weight_update(self) -> None:
        """Start an update. Requests in flight freeze until :meth:`resume`."""
        self._call("/pause?mode=keep")
        self._call("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._call("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish the update as version ``next_version``. vLLM's trainers name no version.

        Raises:
            EngineError: weights did not arrive.
        """
        for rank, missing in enumerate(self._worker("missing_weights")):
            if missing:
                what = f"{len(missing)} weights did not reach worker {rank}"
                raise self._failed(f"failed: {what}: {'; '.join(missing[:5])}")
        version = {"weight_version": str(self.next_version)}
        self._call("/finish_weight_update", version)

    def read_back_checksums(self, dtype: str) -> dict[str, int]:
        """Checksums of the Hugging Face tensors, read back from vLLM's kernels and un-fused.

        Args:
            dtype: of the tensors that were sent.

        Returns:
            ``checksum.tensor_checksum`` of each tensor, summed over workers. Tensors that cannot be
            read back are absent.
        """
        total: dict[str, int] = {}
        for part in self._worker("read_back_checksums", dtype):
            for name, value in part.items():
                total[name] = (total.get(name, 0) + value) % 2**64
        return total

    def read_back_sketches(self) -> list[tuple[str, str, bool, list[float]]]:
        """``read_back.read_back_sketches`` of all workers."""
        parts = self._worker("read_back_sketches")
        return [row for part in parts for row in part]

    def canary(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Generation]:
        """Sample ``num_tokens`` after each prompt, with fixed seeds, from weights that arrived."""
        client, config = self._connected(), self.config
        name = f"canary-{time.monotonic_ns()}"
        first = Sampling(
            num_tokens, temperature=config.temperature, routed_experts=config.routed_experts
        )

        async def sample() -> list[Generation]:
            requests = (
                client.generate(f"{name}-{i}", ids, replace(first, seed=i), True)
                for i, ids in enumerate(prompts)
            )
            return await asyncio.gather(*requests)

        return self._run(sample())

    def serve(self) -> None:
        """Serve the weights that arrived."""
        self._call(f"{PREFIX}/serve", {"version": self.next_version})

    # -- calls -----------------------------------------------------------------------------------

    def _worker(self, method: str, *args: Any) -> list[Any]:
        """The results of ``worker.WorkerExtension``'s method on every worker."""
        return self._call(f"{PREFIX}/worker/{method}", {"args": args})["results"]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._run(self._connected().call(path, body))

    def _connected(self) -> HttpClient:
        if self._client is None or self._server is None:
            raise EngineError("the rollout engine is not running")
        if not self._server.is_alive:
            raise self._failed(self._server.lost)
        return self._client

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The result of a request. Kills the server after any error."""
        try:
            return self._loop.run(coroutine, self.config.timeout_s)
        except TimeoutError:
            limit = f"{self.config.timeout_s:g} s (rollout.timeout_s)"
            raise self._failed(f"gave no answer for {limit}") from None
        except EngineError as error:
            raise self._failed(f"failed: {error}") from None
        except NO_ANSWER as error:
            server = self._server
            assert server is not None  # _call checked it
            server.wait(2.0)
            what = f"is out of reach ({error})" if server.is_alive else server.lost
            raise self._failed(what) from None
        except BaseException:
            self.close()
            raise

    def _failed(self, what: str) -> EngineError:
        """Kill the server and return the error to raise."""
        server = self._server
        assert server is not None
        code = server.returncode
        end = "" if code in (None, 0, -9) else f" (exit code {code})"
        where = f" on {server.address}" if self.config.hosts else ""
        tail = f"Last lines of {server.log_path}:\n{log_tail(server.log_path, server.log_start)}"
        self.close()
        return EngineError(f"the rollout engine{where} {what}{end}.\n{tail}")
