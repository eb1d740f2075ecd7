"""Conversations between rank 0 and the engines of two other ranks."""

import time

import pytest
import torch.distributed as dist

from megatron_espo.rollout import EngineError, Fleet

PROMPTS = list(range(7))


class MadeUp:
    """Answers with what it was asked for; fails or takes long where the prompt says so."""

    def generate(self, prompts, group_size, *, seed=None, on_progress=None, sampling=None):
        for finished, prompt in enumerate(prompts):
            if prompt == "fail":
                raise EngineError("it broke")
            for _ in range(600 if prompt == "long" else 1):
                on_progress(finished, len(prompts))
                time.sleep(0.01)
        return [[(dist.get_rank(), prompt, seed, sampling)] * group_size for prompt in prompts]


def conversations() -> None:
    fleet = Fleet(MadeUp(), [0, 1, 2])
    if dist.get_rank() == 0:
        told = []
        found = fleet.generate(PROMPTS, 2, seed=5, on_progress=lambda *news: told.append(news), sampling={"top_p": 1})
        assert found == [[(i % 3, prompt, 5, {"top_p": 1})] * 2 for i, prompt in enumerate(PROMPTS)], found
        assert all(total == 14 for _, total in told) and told[-1][0] == 14, told
        with pytest.raises(EngineError, match="the engine of rank 2: it broke"):
            fleet.generate(["a", "long", "fail"], 1)
        assert [row[0][1] for row in fleet.generate(["x"], 1)] == ["x"]

        def stop(finished: int, total: int) -> None:
            raise KeyError("stop")

        with pytest.raises(KeyError):
            fleet.generate(["a", "long", "long"], 1, on_progress=stop)
        began = time.monotonic()
        assert [row[0][0] for row in fleet.generate(["x", "y", "z"], 1)] == [0, 1, 2], "interrupted engines answer anew"
        assert time.monotonic() - began < 3
        fleet.close()
    dist.barrier()
