"""Profiles of the chosen steps."""

import gzip
import json

import torch

from megatron_espo.config import Run
from megatron_espo.monitoring.profiler import profiled


def test_only_the_chosen_steps_are_profiled(tmp_path):
    run = Run(dir=str(tmp_path), profile_steps=[2])
    for step in (1, 2, 3):
        with profiled(run, "rank0", step):
            torch.ones(8, 8) @ torch.ones(8, 8)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "step_000002_rank0.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
