"""The rollout engine: vLLM's own server over HTTP, controlled by the rank that owns it."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch

from megatron_espo.addresses import address_towards, parse_address
from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import EngineError, Generation, Phase, Sampling, State, check_transition
from megatron_espo.rollout.http_client import HttpClient, LoopThread
from megatron_espo.rollout.remote import RemoteServers
from megatron_espo.rollout.server import PREFIX, EngineConfig, ServerProcess, log_tail, read_key, run_key_file

_POLL_SECONDS = 0.1


class VLLMEngine:
    """One vLLM server: a child of this process, or one of ``config.hosts``. Implements ``engine.RolloutEngine``.

    A finished update is not served before :meth:`serve`; in between it can be checked. Any failed call kills the server:
    vLLM may return the error of one call as the result of the next.

    Args:
        config: see ``EngineConfig``.
        loop: event loop for HTTP.
    """

    def __init__(self, config: EngineConfig, loop: LoopThread) -> None:
        self.config, self.state = config, State.DEAD
        self.policy_version: int | None = None
        self.max_model_len: int | None = config.max_model_len
        self._loop = loop
        self._remote = RemoteServers(config) if config.hosts else None
        self._server: Any = None
        self._client: HttpClient | None = None
        self._next_version: int | None = None
        self._arrived_version: int | None = None

    @property
    def address(self) -> str:
        return self._server.address

    @property
    def own_address(self) -> str:
        """This machine's address as the server reaches it."""
        if not self._remote:
            return "127.0.0.1"
        return address_towards(parse_address(self.address)[0])

    @property
    def pid(self) -> int | None:
        """Process id of the API server, which leads a process group of its own; ``None`` on another machine."""
        return self._server.pid if self._server is not None else None

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        check_transition(self.state, State.STARTING, "start")
        if not (Path(self.config.model) / "config.json").is_file():
            raise InputError(f"model.path: expected a Hugging Face folder with config.json, got {self.config.model!r}.")
        self.close()
        self._server = self._remote.start() if self._remote else ServerProcess(self.config, not torch.cuda.is_available())
        self.state = State.STARTING

    def wait_ready(self) -> None:
        """Wait until the model is built (state ``stale``; ``ready`` with ``load_weights``)."""
        if self.state == State.DEAD:
            raise EngineError("wait_ready: the rollout engine is not running; call start().", Phase.START)
        if self.state != State.STARTING:
            return
        key = read_key(run_key_file(self.config.folder))
        deadline = time.monotonic() + self.config.start_timeout_s
        while True:
            if not self._server.is_alive:
                raise self._failed("has died", Phase.START)
            if self._server.address is None:  # the search for a host has its own limit
                deadline = time.monotonic() + self.config.start_timeout_s
            if time.monotonic() > deadline:
                raise self._failed(f"gave no sign of life for {self.config.start_timeout_s:g} s (rollout.timeout_s)", Phase.START)
            if self._server.address is not None:
                self._client = self._client or HttpClient(self._server.address, key, self.config.host_timeout_s)
                try:
                    found = self._loop.run(self._client.call(f"{PREFIX}/info", method="GET"), self.config.timeout_s)
                    break
                except (OSError, aiohttp.ClientError):
                    pass
                except EngineError as error:
                    raise self._failed(str(error), Phase.START) from None
            time.sleep(_POLL_SECONDS)
        self.max_model_len = found["max_model_len"]
        self._move(State.STALE, "wait_ready")
        if self.config.load_weights:
            self._move(State.READY, "wait_ready")
            self.policy_version = 0

    def close(self) -> None:
        if self._client is not None:
            self._loop.run(self._client.close(), 5.0)
        if self._server is not None:
            self._server.kill()
        self._server = self._client = None
        self._move(State.DEAD, "close")

    def check_health(self) -> None:
        self._worker("ping", phase=Phase.ROLLOUT)

    def pause(self) -> None:
        self._call("/pause?mode=keep", Phase.TRANSFER)

    def resume(self) -> None:
        self._call(f"{PREFIX}/reset_cache", Phase.FINISH)
        self._call("/resume", Phase.FINISH)

    def sleep(self) -> None:
        check_transition(self.state, State.ASLEEP, "sleep")
        self._call("/sleep?level=2&mode=abort", Phase.SLEEP)
        self._move(State.ASLEEP, "sleep")

    def wake(self, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Take memory for the weights again and fill it with NaN. The memory of the caches comes back in :meth:`resume`'s place,
        :meth:`wake_caches`, when weights arrived and the trainer needs less of its own."""
        self._require(State.ASLEEP, "wake")
        self._call("/wake_up?tags=weights", Phase.WAKE)
        self._move(State.STALE, "wake")
        self.fill_nan(shapes)

    def wake_caches(self) -> None:
        """Take memory for keys and values again."""
        self._call("/wake_up?tags=kv_cache", Phase.WAKE)

    # -- weights: vLLM's VLLMWeightSyncClient, and what happens before and after it ---------------------------------------

    def announce_version(self, version: int) -> None:
        """The policy version that the next finished update brings."""
        self._next_version = version

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.wait_ready()
        self._call("/init_weight_transfer_engine", Phase.CONNECT, {"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        """Nothing: the transfer ends with the server."""

    def fill_nan(self, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        self.wait_ready()
        self._require(State.STALE, "fill_nan")
        self._worker("fill_nan", [[name, list(shape)] for name, shape in shapes], phase=Phase.CONNECT)

    def start_weight_update(self) -> None:
        """Open an update; requests in flight freeze, and no request starts from here to :meth:`serve`."""
        self._move(State.UPDATING, "start_weight_update")
        self.pause()
        self._call("/start_weight_update", Phase.TRANSFER)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._require(State.UPDATING, "update_weights")
        self._call("/update_weights", Phase.LOAD, {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update. ``weight_version`` defaults to the announced one.

        Raises:
            EngineError: weights did not arrive, or no version was announced.
        """
        self._require(State.UPDATING, "finish_weight_update")
        version = self._next_version if weight_version is None else int(weight_version)
        if version is None:
            raise EngineError("finish_weight_update: announce_version was not called for this update.", Phase.FINISH)
        for rank, missing in enumerate(self._worker("missing_weights", phase=Phase.TRANSFER)):
            if missing:
                shown = "; ".join(missing[:5])
                raise self._failed(f"failed: {len(missing)} weights did not reach worker {rank}: {shown}", Phase.TRANSFER)
        self._call("/finish_weight_update", Phase.FINISH, {"weight_version": str(version)})
        self._arrived_version = version

    def read_back_checksums(self, dtype: str) -> dict[str, int]:
        """Checksum of each Hugging Face tensor as vLLM's kernels hold it, read back and un-fused; see ``checksum.tensor_checksum``.

        Args:
            dtype: of the tensors that were sent.

        Returns:
            The sums of all workers. Tensors that vLLM holds in a form that cannot be read back are absent.
        """
        self._require_arrived("read_back_checksums")
        total: dict[str, int] = {}
        for part in self._worker("read_back_checksums", dtype, phase=Phase.VERIFY):
            for name, value in part.items():
                total[name] = (total.get(name, 0) + value) % 2**64
        return total

    def canary(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Generation]:
        """Sample ``num_tokens`` tokens after each prompt from the weights that just arrived, never truncated, with fixed seeds."""
        self._require_arrived("canary")
        return self._run(self._generate_canary(prompts, num_tokens), Phase.CANARY)

    async def _generate_canary(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Generation]:
        requests = (
            self._client.generate(
                f"canary-{number}-{time.monotonic_ns()}",
                prompt,
                Sampling(num_tokens, seed=number, temperature=self.config.temperature),
                routed_experts=self.config.routed_experts,
                canary=True,
            )
            for number, prompt in enumerate(prompts)
        )
        return await asyncio.gather(*requests)

    def transfer_seconds(self) -> dict[str, float]:
        """Seconds that the first worker spent in each part of the last update; empty for transports of vLLM's own."""
        return self._worker("transfer_seconds", phase=Phase.FINISH)[0]

    def serve(self) -> None:
        self._require_arrived("serve")
        self._call(f"{PREFIX}/serve", Phase.FINISH, {"version": self._arrived_version})
        self._move(State.READY, "serve")
        self.policy_version, self._next_version = self._arrived_version, None

    def reject(self) -> None:
        """Give up an update: the server is killed, because layers of half an update refuse another one."""
        if self.state == State.UPDATING:
            self.close()

    # -- calls -----------------------------------------------------------------------------------------------------------

    def _worker(self, method: str, *args: Any, phase: Phase) -> list[Any]:
        return self._call(f"{PREFIX}/worker", phase, {"method": method, "args": args})["results"]

    def _call(self, path: str, phase: Phase, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if self._client is None:
            raise EngineError(f"{path}: the rollout engine is not running; restart it and update its weights.", phase)
        if self._remote and not self._server.is_alive:
            raise self._failed("is out of reach (it has lost its lease; rollout.host_timeout_s)", phase)
        return self._run(self._client.call(path, body), phase)

    def _run(self, coroutine: Any, phase: Phase) -> Any:
        """Wait for a request. Whatever it raises, the server is killed."""
        try:
            return self._loop.run(coroutine, self.config.timeout_s)
        except TimeoutError:
            raise self._failed(f"gave no answer for {self.config.timeout_s:g} s (rollout.timeout_s)", phase) from None
        except EngineError as error:
            raise self._failed(f"failed: {error}", phase) from None
        except (OSError, aiohttp.ClientError) as error:
            dead = self._server.wait(2.0) is not None if hasattr(self._server, "wait") else False
            how = "has died" if dead else f"is out of reach ({error})"
            raise self._failed(how, phase) from None
        except BaseException:
            self.close()
            raise

    def _failed(self, what: str, phase: Phase) -> EngineError:
        if (error := self._server.error) is not None:
            self.close()
            return error
        code = self._server.returncode
        end = "" if code in (None, 0, -9) else f" (exit code {code})"
        where = f" on {self._server.address}" if self._remote else ""
        log_path, tail = self._server.log_path, log_tail(self._server.log_path)
        self.close()
        return EngineError(f"{phase}: the rollout engine{where} {what}{end}.\nLast lines of {log_path}:\n{tail}", phase)

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
