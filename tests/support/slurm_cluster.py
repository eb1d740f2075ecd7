"""A real Slurm cluster on this machine: one slurmctld, and a slurmd for each node, on loopback."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{last_port}] CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can start here, or None."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons start as root only"


class Cluster:
    """A context manager that starts and ends the cluster.

    Args:
        folder: state, logs and sockets.
        nodes: n1, n2, ...
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self._nodes = [f"n{i + 1}" for i in range(nodes)]
        self.folder, self.env = folder, os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.env["PATH"] = f"{self.env['PATH']}{os.pathsep}/usr/sbin"
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        for name in ("state", *(f"spool-{node}" for node in self._nodes)):
            (self.folder / name).mkdir()
        ports = free_ports(1 + len(self._nodes))
        values = {"host": socket.gethostname(), "folder": self.folder, "nodes": len(self._nodes)}
        text = CONF.format(ports=ports, last_port=ports[-1], **values)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        options = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{option}={self.folder}/munge.{name}" for option, name in options.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *paths)
        self.until((self.folder / "munge.socket").exists)
        self._start("slurmctld", "-D")
        for node in self._nodes:
            self._start("slurmd", "-D", "-N", node)
        self.until(lambda: self.run("sinfo", "-h", "-o", "%T", check=False).split() == ["idle"])
        return self

    def __exit__(self, *_) -> None:
        self.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.3)  # jobs survive their daemons
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, check: bool = True, **env: str) -> str:
        """Run a Slurm command; return its output."""
        options = {"capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(command, env=self.env | env, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Slurm's fields of a job."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, condition, timeout_s: float = 60) -> None:
        """Wait until ``condition()``; AssertionError with the daemons' logs after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self._logs()
            time.sleep(0.3)

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        daemon = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        self._daemons.append(daemon)

    def _logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        texts = [f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files]
        return "\n".join(texts)


def free_ports(count: int) -> list[int]:
    """``count`` consecutive free ports."""
    for first in range(17000, 27000, 10):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
            return list(range(first, first + count))
    raise AssertionError("no free ports")
