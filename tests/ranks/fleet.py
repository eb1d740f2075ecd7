"""Conversations between rank 0 and the engines of two other ranks."""

import time

import pytest
import torch.distributed as dist

from megatron_espo.rollout import EngineError, Fleet
from megatron_espo.rollout.requests import request_seeds
from megatron_espo.types import Prompt


def prompts(*ids: str) -> list[Prompt]:
    return [Prompt(name, "", "", ()) for name in ids]


class MadeUp:
    """Answers with what it was asked for; fails or takes long where the prompt says so."""

    def generate(self, prompts, group_size, *, seed=None, on_progress=None, sampling=None, on_finished=None, begun=None, enough=None):
        for place, prompt in enumerate(prompts):
            if prompt.id == "fail":
                raise EngineError("it broke")
            for _ in range(600 if prompt.id == "long" else 1):
                on_progress(place * group_size, len(prompts) * group_size)
                time.sleep(0.01)
            for position in range(group_size):
                if on_finished:
                    on_finished(place * group_size + position, f"{prompt.id}{position}")
        return [[(dist.get_rank(), prompt.id, each, sampling) for each in of_prompt] for prompt, of_prompt in zip(prompts, seed, strict=True)]


def conversations() -> None:
    fleet = Fleet(MadeUp(), [0, 1, 2])
    if dist.get_rank() == 0:
        told, finished = [], {}
        asked = prompts("a", "b", "c", "d", "a", "e", "f")  # one of them twice
        found = fleet.generate(
            asked, 2, seed=5, on_progress=lambda *news: told.append(news), sampling={"top_p": 1}, on_finished=finished.__setitem__
        )
        seeds = request_seeds(asked, 2, 5)
        assert found == [[(i % 3, asked[i].id, each, {"top_p": 1}) for each in seeds[i]] for i in range(7)], found
        assert all(total == 14 for _, total in told) and told[-1][0] == 14, told
        assert finished == {2 * i + j: f"{asked[i].id}{j}" for i in range(7) for j in range(2)}, finished
        with pytest.raises(EngineError, match="the engine of rank 2: it broke"):
            fleet.generate(prompts("a", "long", "fail"), 1)
        assert [row[0][1] for row in fleet.generate(prompts("x"), 1)] == ["x"]

        def stop(finished: int, total: int) -> None:
            raise KeyError("stop")

        with pytest.raises(KeyError):
            fleet.generate(prompts("a", "long", "long"), 1, on_progress=stop)
        began = time.monotonic()
        assert [row[0][0] for row in fleet.generate(prompts("x", "y", "z"), 1)] == [0, 1, 2], "interrupted engines answer anew"
        assert time.monotonic() - began < 3
        fleet.close()
    dist.barrier()
