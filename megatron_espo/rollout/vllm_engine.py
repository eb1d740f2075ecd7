"""The rollout engine: vLLM's server over HTTP, controlled by the rank that owns it."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_espo.distributed.addresses import address_towards, parse_address
from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import (
    EngineError,
    Generation,
    Phase,
    Sampling,
    State,
    check_transition,
)
from megatron_espo.rollout.http_client import NO_ANSWER, HttpClient, LoopThread
from megatron_espo.rollout.lease import HostOrder, LeasedServer
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
        policy_version: the version that is served; ``None``: none.
        next_version: the policy version of the next update.
    """

    def __init__(self, config: EngineConfig, loop: LoopThread) -> None:
        self.config, self.state = config, State.DEAD
        self.policy_version: int | None = None
        self.next_version: int | None = None
        self._arrived_version: int | None = None
        self._loop, self._hosts = loop, HostOrder(list(config.hosts))
        self._server: ServerProcess | LeasedServer | None = None
        self._client: HttpClient | None = None

    @property
    def address(self) -> str:
        """``unix:<path>`` or ``host:port`` of the server; empty without a server."""
        return (self._server.address or "") if self._server is not None else ""

    @property
    def own_address(self) -> str:
        """This machine's address as the server reaches it."""
        if not self.config.hosts:
            return "127.0.0.1"
        return address_towards(parse_address(self.address)[0])

    @property
    def pid(self) -> int | None:
        """Process id of the API server, which leads a process group; ``None`` on other machines."""
        return self._server.pid if self._server is not None else None

    # -- lifetime --------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a server and return at once. Call it from the main thread."""
        check_transition(self.state, State.STARTING, "start")
        model = self.config.model
        if not (Path(model) / "config.json").is_file():
            raise InputError(
                f"model.path: expected a Hugging Face folder with config.json, got {model!r}."
            )
        self.close()
        if self.config.hosts:
            self._server = LeasedServer(self.config, self._hosts)
        else:
            self._server = ServerProcess(self.config, not torch.cuda.is_available())
        self.state = State.STARTING

    def wait_ready(self) -> None:
        """Wait until the model is built (state ``stale``; ``ready`` with ``load_weights``)."""
        config, server = self.config, self._server
        if server is None:
            raise EngineError(
                "wait_ready: the rollout engine is not running; call start().", Phase.START
            )
        if self.state != State.STARTING:
            return
        deadline = None
        while True:
            if not server.is_alive:
                raise self._failed(server.lost, Phase.START)
            if server.address is not None:  # the search for a host has its own limit
                deadline = deadline or time.monotonic() + config.start_timeout_s
                if time.monotonic() > deadline:
                    limit = f"{config.start_timeout_s:g} s (rollout.timeout_s)"
                    raise self._failed(f"did not start within {limit}", Phase.START)
                key = run_key(config.folder)
                self._client = self._client or HttpClient(
                    server.address, key, config.host_timeout_s
                )
                try:
                    self._loop.run(self._client.call(f"{PREFIX}/info"), config.timeout_s)
                    break
                except NO_ANSWER:
                    pass
                except EngineError as error:
                    raise self._failed(str(error), Phase.START) from None
            time.sleep(_POLL_SECONDS)
        self._move(State.STALE, "wait_ready")
        if config.load_weights:
            self._move(State.READY, "wait_ready")
            self.policy_version = 0

    def close(self) -> None:
        """End the server and its workers. Safe to call twice."""
        if self._client is not None:
            self._loop.run(self._client.close(), 5.0)
        if self._server is not None:
            self._server.kill()
        self._server = self._client = None
        self._move(State.DEAD, "close")

    def check_health(self) -> None:
        """Raise EngineError unless every worker answers."""
        self._worker("ping", phase=Phase.ROLLOUT)

    def resume(self) -> None:
        """Continue the requests in flight; vLLM recomputes keys and values of older weights."""
        self._call(f"{PREFIX}/reset_cache", Phase.FINISH)
        self._call("/resume", Phase.FINISH)

    def sleep(self) -> None:
        """Abort the requests in flight and release the GPU memory of weights and caches."""
        check_transition(self.state, State.ASLEEP, "sleep")
        self._call("/sleep?level=2&mode=abort", Phase.SLEEP)
        self._move(State.ASLEEP, "sleep")

    def wake(self, shapes: Shapes) -> None:
        """Allocate the weights and fill them with NaN. :meth:`wake_caches` allocates the caches."""
        self._require(State.ASLEEP, "wake")
        self._call("/wake_up?tags=weights", Phase.WAKE)
        self._move(State.STALE, "wake")
        self.fill_nan(shapes)

    def wake_caches(self) -> None:
        """Allocate the caches of keys and values."""
        self._call("/wake_up?tags=kv_cache", Phase.WAKE)

    # -- weights ---------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.wait_ready()
        self._call("/init_weight_transfer_engine", Phase.CONNECT, {"init_info": init_info})

    def fill_nan(self, shapes: Shapes) -> None:
        """Load NaN into every named weight, so a check detects weights that an update omits."""
        self.wait_ready()
        self._require(State.STALE, "fill_nan")
        weights = [[name, list(shape)] for name, shape in shapes]
        self._worker("fill_nan", weights, phase=Phase.CONNECT)

    def start_weight_update(self) -> None:
        """Start an update. Requests in flight freeze until :meth:`resume`."""
        self._move(State.UPDATING, "start_weight_update")
        self._call("/pause?mode=keep", Phase.TRANSFER)
        self._call("/start_weight_update", Phase.TRANSFER)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._require(State.UPDATING, "update_weights")
        self._call("/update_weights", Phase.LOAD, {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish the update as version ``weight_version`` (default: ``next_version``).

        Raises:
            EngineError: weights did not arrive, or the version is unknown.
        """
        self._require(State.UPDATING, "finish_weight_update")
        version = self.next_version if weight_version is None else int(weight_version)
        if version is None:
            raise EngineError("finish_weight_update: next_version is not set.", Phase.FINISH)
        for rank, missing in enumerate(self._worker("missing_weights", phase=Phase.TRANSFER)):
            if missing:
                what = f"{len(missing)} weights did not reach worker {rank}"
                raise self._failed(f"failed: {what}: {'; '.join(missing[:5])}", Phase.TRANSFER)
        self._call("/finish_weight_update", Phase.FINISH, {"weight_version": str(version)})
        self._arrived_version = version

    def read_back_checksums(self, dtype: str) -> dict[str, int]:
        """Checksums of the Hugging Face tensors, read back from vLLM's kernels and un-fused.

        Args:
            dtype: of the tensors that were sent.

        Returns:
            ``checksum.tensor_checksum`` of each tensor, summed over workers. Tensors that cannot be
            read back are absent.
        """
        self._require_arrived("read_back_checksums")
        total: dict[str, int] = {}
        for part in self._worker("read_back_checksums", dtype, phase=Phase.VERIFY):
            for name, value in part.items():
                total[name] = (total.get(name, 0) + value) % 2**64
        return total

    def canary(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Generation]:
        """Sample ``num_tokens`` after each prompt, with fixed seeds, from weights that arrived."""
        self._require_arrived("canary")
        client, config = self._client, self.config
        assert client is not None  # in this state

        async def sample() -> list[Generation]:
            requests = (
                client.generate(
                    f"canary-{number}-{time.monotonic_ns()}",
                    prompt,
                    Sampling(num_tokens, seed=number, temperature=config.temperature),
                    routed_experts=config.routed_experts,
                    canary=True,
                )
                for number, prompt in enumerate(prompts)
            )
            return await asyncio.gather(*requests)

        return self._run(sample(), Phase.CANARY)

    def transfer_seconds(self) -> dict[str, float]:
        """Seconds of each part of the last update in the first worker, if they are measured."""
        return self._worker("transfer_seconds", phase=Phase.FINISH)[0]

    def serve(self) -> None:
        """Serve the weights that arrived."""
        self._require_arrived("serve")
        self._call(f"{PREFIX}/serve", Phase.FINISH, {"version": self._arrived_version})
        self._move(State.READY, "serve")
        self.policy_version, self.next_version = self._arrived_version, None

    def reject(self) -> None:
        """Give up an update. Kills the server: its layers would not accept another update."""
        if self.state == State.UPDATING:
            self.close()

    # -- calls -----------------------------------------------------------------------------------

    def _worker(self, method: str, *args: Any, phase: Phase) -> list[Any]:
        """The results of ``worker.WorkerExtension``'s method on every worker."""
        return self._call(f"{PREFIX}/worker/{method}", phase, {"args": args})["results"]

    def _call(self, path: str, phase: Phase, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if self._client is None or self._server is None:
            raise EngineError(
                f"{path}: the rollout engine is not running; restart it and update its weights.",
                phase,
            )
        if not self._server.is_alive:
            raise self._failed(self._server.lost, phase)
        return self._run(self._client.call(path, body), phase)

    def _run(self, coroutine: Coroutine[Any, Any, Any], phase: Phase) -> Any:
        """The result of a request. Kills the server after any error."""
        try:
            return self._loop.run(coroutine, self.config.timeout_s)
        except TimeoutError:
            limit = f"{self.config.timeout_s:g} s (rollout.timeout_s)"
            raise self._failed(f"gave no answer for {limit}", phase) from None
        except EngineError as error:
            raise self._failed(f"failed: {error}", phase) from None
        except NO_ANSWER as error:
            server = self._server
            assert server is not None  # _call checked it
            server.wait(2.0)
            what = f"is out of reach ({error})" if server.is_alive else server.lost
            raise self._failed(what, phase) from None
        except BaseException:
            self.close()
            raise

    def _failed(self, what: str, phase: Phase) -> EngineError:
        """Kill the server and return the error to raise."""
        server = self._server
        assert server is not None
        if server.error is not None:
            self.close()
            return server.error
        code = server.returncode
        end = "" if code in (None, 0, -9) else f" (exit code {code})"
        where = f" on {server.address}" if self.config.hosts else ""
        tail = f"Last lines of {server.log_path}:\n{log_tail(server.log_path)}"
        self.close()
        return EngineError(f"{phase}: the rollout engine{where} {what}{end}.\n{tail}", phase)

    def _require(self, state: State, action: str) -> None:
        if self.state != state:
            raise EngineError(f"{action}: the rollout engine is {self.state}; expected {state}.")

    def _require_arrived(self, action: str) -> None:
        self._require(State.UPDATING, action)
        if self._arrived_version is None:
            raise EngineError(f"{action}: the weight update is not finished.")

    def _move(self, state: State, action: str) -> None:
        check_transition(self.state, state, action)
        self.state = state
        if state != State.READY:
            self.policy_version = self._arrived_version = None
