"""The process of a rollout engine, started on this machine."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_espo.rollout.config import EngineConfig

CLOSE_SECONDS = 5.0


def start_process(config: EngineConfig, descriptor: int, log: BinaryIO) -> subprocess.Popen:
    """``rollout.server`` at the other end of the socket ``descriptor``, leading a process group of its own.

    It dies with the thread that calls this: Linux kills a child when the thread that started it ends.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_espo.rollout.server", str(descriptor), str(os.getpid())],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=child_environment(config),
        start_new_session=True,
    )


def signal_group(process: subprocess.Popen, signal_number: int) -> None:
    """Signal the process and what it started; tensor-parallel workers of a dead engine are in its group too."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)


class LocalProcess:
    """An engine that is a child of this process and dies with it. Create it in the main thread.

    Attributes:
        connection: to its server, which has been told to start.
        pid: leads a process group of its own.
        own_address: of this machine, as the engine reaches it.
        name: of where it runs, for messages.
    """

    own_address, name = "127.0.0.1", ""

    def __init__(self, config: EngineConfig) -> None:
        ours, theirs = socket.socketpair()
        with theirs, open(config.log_path, "ab") as log:
            self._process = start_process(config, theirs.fileno(), log)
        self.pid = self._process.pid
        self.connection = Connection(ours.detach())
        with suppress(OSError):  # it is dead already, and will be found so
            self.connection.send(("start", (config,)))

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def close(self) -> None:
        """End it: politely, then SIGTERM, then SIGKILL to its process group."""
        if self.is_alive:
            try:
                self.connection.send(("close", ()))
                self._process.wait(CLOSE_SECONDS)
            except (OSError, subprocess.TimeoutExpired):
                pass
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if self.is_alive:
                signal_group(self._process, signal_number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(CLOSE_SECONDS)
        signal_group(self._process, signal.SIGKILL)
        self.connection.close()

    def kill(self) -> None:
        """Kill it and its workers at once."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # an exit code of its own tells more than our signal
        signal_group(self._process, signal.SIGKILL)
        self._process.wait()


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
_TORCHRUN_PREFIXES = ("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PET_")


def child_environment(config: EngineConfig) -> dict[str, str]:
    """This process's environment without what torchrun added, and with what vLLM needs before it is imported."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _TORCHRUN and not key.startswith(_TORCHRUN_PREFIXES)
    }
    environment.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine core lives in the child, which is process enough
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="0",  # nobody sends it pickled functions
        VLLM_HOST_IP="127.0.0.1",  # an engine spans one node
        PYTHONUNBUFFERED="1",
    )
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = str(max(1, cores // config.tensor_parallel_size))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM binds one worker to one NUMA node, or refuses
        # The trainer's processes share these cores: waiting threads that spin made generation 10 times slower.
        environment["OMP_WAIT_POLICY"] = "passive"
        # Every sync allocates the model anew, layer by layer: with memory kept by the allocator instead of returned and
        # mapped again page by page, loading took two thirds of the time.
        environment["MALLOC_MMAP_MAX_"] = "0"
        environment["MALLOC_TRIM_THRESHOLD_"] = str(2**32)
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    if config.visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    return environment
