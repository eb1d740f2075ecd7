"""A learner saved and loaded again; runs on every rank."""

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_espo.config import Algorithm, Config, Data, Megatron, Model, Optimizer, Rollout, Run
from megatron_espo.data.packing import TrainSequence
from megatron_espo.mcore import runtime


def make_groups(step: int, vocab_size: int) -> list[list[TrainSequence]]:
    """Four prompts with two responses each, the same for the same step."""
    draw = random.Random(step)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    prompts = [ids(4) for _ in range(4)]
    return [
        [TrainSequence(prompt, ids(n), [-1.0] * n, draw.uniform(-1, 1)) for n in (draw.randint(1, 9), draw.randint(1, 9))]
        for prompt in prompts
    ]


def make_learner(folder: str, dtype: str, sizes: dict):
    """A learner of two updates a step, with a decaying learning rate."""
    config = Config(
        run=Run(steps=9),
        model=Model(path=folder, dtype=dtype),
        megatron=Megatron(**sizes),
        optimizer=Optimizer(lr=1e-2, lr_decay_style="linear", lr_warmup_iters=2),
        algorithm=Algorithm(num_mini_batches=2),
        rollout=Rollout(prompts_per_step=4, group_size=2, max_response_tokens=10),
        data=Data(prompts="reasoning_gym:none"),
    )
    place = runtime.initialize(**runtime.parallel_sizes(config.megatron))
    from megatron_espo.mcore.learner import Learner
    from megatron_espo.mcore.model import read_hf_config

    hf_config = read_hf_config(folder)
    return Learner(config, hf_config, place), hf_config, place


def weights(learner, hf_config, place) -> dict[str, torch.Tensor]:
    from megatron_espo.weights.source import MegatronWeightSource

    source = MegatronWeightSource(learner.chunks, hf_config, place.groups, dtype=torch.float32, all_replicas=True)
    return {name: tensor.clone() for name, tensor in source}


def train(
    folder: str, first: int, last: int, load: str | None = None, save: str | None = None, out: str | None = None,
    dtype: str = "float32", **sizes,
) -> list[dict[str, float]]:  # fmt: skip
    """Steps ``first`` to ``last``, from a checkpoint or from ``folder``; writes a checkpoint and the final weights; returns metrics."""
    learner, hf_config, place = make_learner(folder, dtype, sizes)
    if load:
        assert learner.load(load) == {"step": first - 1, "note": "ü"}
    metrics = [
        learner.update(make_groups(step, hf_config["vocab_size"]), lambda done, total: None)
        for step in range(first, last + 1)
    ]
    if save:
        learner.save(save, {"step": last, "note": "ü"})
    if out:
        final = weights(learner, hf_config, place)
        if place.is_main:
            save_file(final, out)
    return metrics


def check_weights_equal(one: str, other: str) -> float:
    """Largest difference between two files of weights."""
    a, b = load_file(Path(one)), load_file(Path(other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)
