"""Tiny runs on recorded rollouts (``run.replay``, without engine) for fault injection, and checks
of their results.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.types import Prompt
from tests.faults.inject import VARIABLE
from tests.support.distributed import ROOT, run_command
from tests.support.tiny import WORDS, save_tiny_model, write_tiny_run
from tests.support.trajectories import single_turn


def record_rollouts(folder: Path, steps: int) -> None:
    """Write random rollouts: four prompts a step, two responses each."""
    log, draw = RolloutLog(folder, {}), random.Random(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, len(WORDS)) for _ in range(count))

    for step in range(1, steps + 1):
        prompts = [Prompt(f"{step}-{i}", "", "", ids(5)) for i in range(4)]
        groups = []
        for prompt in prompts:
            lengths = [draw.randint(1, 6) for _ in range(2)]
            groups.append(
                [single_turn(prompt, ids(n), (-2.0,) * n, step - 1, "stop", "") for n in lengths]
            )
        rewards = torch.tensor([[draw.random(), draw.random()] for _ in prompts])
        log.write(step, ScoredGroups(groups, rewards, 4), before={}, after={})
    log.wait()


@dataclass(frozen=True)
class Runs:
    """Runs of one configuration in one folder.

    Attributes:
        folder: contains ``run.yaml``, model, rollouts and the runs.
        steps: of a run.
    """

    folder: Path
    steps: int

    @staticmethod
    def prepare(folder: Path, *, steps: int, every: int) -> "Runs":
        """Write model, rollouts (for ``steps + 2`` steps) and configuration, with a checkpoint
        every ``every`` steps.
        """
        save_tiny_model(folder / "model")
        record_rollouts(folder / "rollouts", steps + 2)
        run = {
            "steps": steps,
            "checkpoint_every": every,
            "replay": str(folder / "rollouts"),
            "watchdog_s": 10.0,
        }
        write_tiny_run(folder, run=run, model={"dtype": "bfloat16"})
        return Runs(folder, steps)

    def command(
        self, run: str, *overrides: str, ranks: int = 2, module: str = "megatron_espo"
    ) -> list[str]:
        file, folder = self.folder / "run.yaml", self.folder / run
        return [*torchrun(ranks), "-m", module, "train", str(file), f"run.dir={folder}", *overrides]

    def train(
        self,
        run: str,
        *overrides: str,
        ranks: int = 2,
        fault: str | None = None,
        by_torchrun: bool = False,
    ) -> subprocess.CompletedProcess:
        """Run one launch to its end, by ``run_command``; ``by_torchrun``: as a user starts it."""
        if not by_torchrun:
            options = ["train", str(self.folder / "run.yaml"), f"run.dir={self.folder / run}"]
            return run_command(ranks, *options, *overrides, environment=environment(fault))
        command = self.command(run, *overrides, ranks=ranks, module="tests.faults.inject")
        done = subprocess.run(
            command, cwd=ROOT, env=environment(fault), capture_output=True, text=True, timeout=900
        )
        self.assert_no_orphans(run)
        return done

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return {
            name: t
            for file in (self.folder / run / "hf").glob("*.safetensors")
            for name, t in load_file(file).items()
        }

    def status(self, run: str) -> dict:
        return json.loads((self.folder / run / "status.json").read_text())

    def wait_for_step(self, process: subprocess.Popen, run: str, step: int) -> None:
        metrics = self.folder / run / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
            assert process.poll() is None and time.monotonic() < deadline, "the run ended too early"
            time.sleep(0.02)

    def assert_no_orphans(self, run: str) -> None:
        """No process of the run is left. Their command lines contain its folder."""
        needle, deadline = f"run.dir={self.folder / run}".encode() + b"\0", time.monotonic() + 10
        while left := [
            path for path in Path("/proc").glob("[0-9]*/cmdline") if needle in _read(path)
        ]:
            assert time.monotonic() < deadline, f"processes left: {left}"
            time.sleep(0.1)

    def assert_same_end(self, run: str, undisturbed: dict[str, torch.Tensor]) -> None:
        """The weights are equal, and ``metrics.jsonl`` and TensorBoard contain every step once."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        final = self.weights(run)
        assert final.keys() == undisturbed.keys()
        assert all(torch.equal(final[name], undisturbed[name]) for name in final)
        lines = [
            json.loads(line)
            for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["step"] for line in lines] == list(range(1, self.steps + 1))
        assert lines[-1]["ledger/dispatched"] == lines[-1]["ledger/trained"] == 4 * self.steps
        path = str(self.folder / run / "tensorboard")
        board = EventAccumulator(path, size_guidance={"scalars": 0}).Reload()
        steps = [event.step for event in board.Scalars("reward/mean")]
        assert steps == list(range(1, self.steps + 1))


def environment(fault: str | None = None) -> dict[str, str]:
    """Environment of a launch, with a fault for :mod:`tests.faults.inject`."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | variables | ({VARIABLE: fault} if fault else {})


def torchrun(ranks: int) -> list[str]:
    """Command that starts a module with ``-m`` on several ranks."""
    options = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}"
    return [sys.executable, *options.split()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() + b"\0"
    except OSError:
        return b""
