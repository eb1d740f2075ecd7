"""vLLM weight transport ``tcp``: trainer to engine over any network, without a GPU.

The groups of ``group_transfer``; their bytes go from the sender's block over one connection to each worker, into a block of its own that holds the
largest group. A group is sent while its ``update_weights`` runs, so that a worker always reads, and while the next one is gathered. Importing
this module registers both sides with vLLM's factories.
"""

import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import ClassVar

from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from megatron_espo.rollout import wire
from megatron_espo.rollout.block import SharedBlock
from megatron_espo.rollout.group_transfer import GroupInitInfo, GroupReceiver, GroupSender, GroupUpdateInfo
from megatron_espo.rollout.lifecycle import EngineError

BACKEND = "tcp"
_TICK_SECONDS = 0.2


@dataclass
class TcpTrainerInitInfo(TrainerInitInfo):
    """Trainer side.

    Attributes:
        address: of this machine, as the workers reach it.
        workers: of the engine.
        timeout_s: a connection is given up after so long without a sign of life.
    """

    backend: ClassVar[str] = BACKEND

    address: str
    workers: int
    timeout_s: float


@dataclass
class TcpInitInfo(GroupInitInfo):
    """Worker side: where the sender listens, the key (hexadecimal) of this one meeting, and the limit of ``TcpTrainerInitInfo``."""

    address: str
    port: int
    key: str
    timeout_s: float


class TcpWeightTransferEngine(GroupReceiver):
    """Worker side: each announced group is read from the connection."""

    init_info_cls = TcpInitInfo

    _connection: Connection | None = None

    def _attach(self, init_info: TcpInitInfo) -> SharedBlock:
        self._connection = wire.connect(init_info.address, init_info.port, bytes.fromhex(init_info.key))
        wire.notice_loss(self._connection, init_info.timeout_s)
        return SharedBlock.create(init_info.capacity)

    def _fetch(self, size: int) -> None:
        began, done = time.perf_counter(), 0
        try:
            with wire.as_socket(self._connection) as sock, memoryview(self._block.mapping) as memory:
                while done < size:
                    read = sock.recv_into(memory[done:size])
                    if not read:
                        raise ConnectionResetError("it hung up")
                    done += read
        except OSError as error:
            raise ConnectionError(f"transfer: the connection to the trainer broke after {done} of {size} bytes of a group: {error}") from None
        self.seconds["receive"] += time.perf_counter() - began

    def shutdown(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        super().shutdown()


class TcpTrainerWeightTransferEngine(GroupSender):
    """Trainer side. What breaks a connection is told by the engine's own error, or as an ``EngineError``."""

    init_info_cls = TcpTrainerInitInfo

    def _introduce(self, init_info: TcpTrainerInitInfo, largest: int, manifest: dict[str, list]) -> None:
        self._connections: list[Connection] = []
        self._sending = ThreadPoolExecutor(1, "weight-bytes")
        key = secrets.token_bytes(32)
        with wire.listen(init_info.address, 0) as server:
            server.settimeout(_TICK_SECONDS)
            told = TcpInitInfo(largest, address=init_info.address, port=server.getsockname()[1], key=key.hex(), timeout_s=init_info.timeout_s, **manifest)
            joining = self._executor.submit(self.client.init_weight_transfer_engine, asdict(told))
            while len(self._connections) < init_info.workers and not joining.done():
                with suppress(OSError, AuthenticationError):  # nobody yet, or a stranger
                    self._connections.append(wire.admit(server.accept()[0], key))
                    wire.notice_loss(self._connections[-1], init_info.timeout_s)
        joining.result()

    def _deliver(self, info: GroupUpdateInfo) -> None:
        start, stop = min(info.offsets), info.stop(self._manifest)
        sending = self._sending.submit(self._send, start, stop)
        with self._hanging_up():
            super()._deliver(replace(info, offsets=[offset - start for offset in info.offsets]))
            sending.result()

    def _send(self, start: int, stop: int) -> None:
        with self._hanging_up(), memoryview(self._block.mapping) as memory:
            for worker, connection in enumerate(self._connections):
                try:
                    with wire.as_socket(connection) as sock:
                        sock.sendall(memory[start:stop])
                except OSError as error:
                    raise EngineError(f"transfer: the connection to worker {worker} broke: {error}", "transfer") from None

    @contextmanager
    def _hanging_up(self) -> Iterator[None]:
        """After an error nobody on either side waits for the rest."""
        try:
            yield
        except BaseException:
            for connection in self._connections:
                with suppress(OSError), wire.as_socket(connection) as sock:
                    sock.shutdown(socket.SHUT_RDWR)
            raise

    def shutdown(self) -> None:
        super().shutdown()
        if self.is_sender:
            self._sending.shutdown()
            for connection in self._connections:
                connection.close()


WeightTransferEngineFactory.register_engine(BACKEND, TcpWeightTransferEngine)
WeightTransferTrainerFactory.register_engine(BACKEND, TcpTrainerWeightTransferEngine)
