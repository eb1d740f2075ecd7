"""Save, load and continue an actor. Runs on every rank."""

import random

import torch
from safetensors.torch import load_file, save_file

from megatron_espo.config import Algorithm, Config, Data, Megatron, Model, Optimizer, Rollout, Run
from megatron_espo.data.packing import TrainSequence
from megatron_espo.distributed import runtime
from megatron_espo.errors import InputError
from tests.support.weights_models import load_spec


def make_groups(step: int, vocab_size: int) -> list[list[TrainSequence]]:
    """Return four prompts with two responses each, determined by the step."""
    draw = random.Random(step)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    prompts = [ids(4) for _ in range(4)]
    return [
        [
            TrainSequence(prompt, ids(n), [-1.0] * n, draw.uniform(-1, 1))
            for n in (draw.randint(1, 9), draw.randint(1, 9))
        ]
        for prompt in prompts
    ]


def make_actor(
    folder: str,
    dtype: str,
    sizes: dict,
    optimizer: dict | None = None,
    algorithm: dict | None = None,
):
    """Build an actor with two updates a step and a decaying learning rate.

    ``sizes`` are settings of the section ``megatron``.
    """
    config = Config(
        run=Run(steps=9),
        model=Model(path=folder, dtype=dtype),
        megatron=Megatron(**sizes),
        optimizer=Optimizer(
            **{"lr": 1e-2, "lr_decay_style": "linear", "lr_warmup_iters": 2} | (optimizer or {})
        ),
        algorithm=Algorithm(num_mini_batches=2, **algorithm or {}),
        # No engine has chosen experts for the groups of ``make_groups``.
        rollout=Rollout(
            prompts_per_step=4, group_size=2, max_response_tokens=10, router_replay=False
        ),
        data=Data(prompts="reasoning_gym:none"),
    )
    place = runtime.initialize(**runtime.parallel_sizes(config.megatron))
    from megatron_espo.megatron.actor import Actor

    spec = load_spec(folder)
    return Actor(config, spec, place), spec, place


def weights(actor, spec, place) -> dict[str, torch.Tensor]:
    from megatron_espo.weights.source import WeightGatherer

    source = WeightGatherer(
        actor.chunks, spec, place.groups, dtype=torch.float32, all_replicas=True
    )
    return {name: tensor.clone() for name, tensor in source}


def train(folder: str, first: int, last: int, dtype: str, sizes: dict, load=None, save=None):
    """Train steps ``first`` to ``last``, from a checkpoint or from ``folder``.

    Returns the final weights and each step's metrics.
    """
    actor, spec, place = make_actor(folder, dtype, sizes)
    if load:
        assert actor.load(load) == {"step": first - 1, "note": "ü"}
    metrics = []
    for step in range(first, last + 1):
        metrics.append(actor.update(make_groups(step, spec.vocab_size), lambda done, total: None))
        for number in range(2 if save and step == first else 0):
            # The third save takes the plan of the second.
            actor.save(f"{save}.{number}", {}).finish()
    if save:
        actor.save(save, {"step": last, "note": "ü"}).finish()
    return weights(actor, spec, place), metrics


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def check_continues(folder: str, out: str, cases: list[dict]) -> list[dict[str, float]]:
    """Compare three steps with two steps, a checkpoint and a third step."""
    answers = []
    for number, case in enumerate(cases):
        dtype, sizes = case.get("dtype", "float32"), case.get("sizes", {})
        whole, all_metrics = train(folder, 1, 3, dtype, sizes)
        train(folder, 1, 2, dtype, sizes, save=f"{out}/{number}")
        parts, metrics = train(folder, 3, 3, dtype, sizes, load=f"{out}/{number}")
        start, _ = train(folder, 1, 0, dtype, sizes)
        answers.append(
            {
                "weights": largest_difference(whole, parts),
                "metrics": max(
                    abs(metrics[0][name] - value)
                    for name, value in all_metrics[2].items()
                    if not name.startswith("time/")
                ),
                "trained": largest_difference(whole, start),
                "learning rates": len({step["optimizer/lr"] for step in all_metrics}),
            }
        )
    return answers


def save_and_continue(folder: str, checkpoint: str, out: str) -> None:
    """Write a checkpoint after two steps, and the weights after a third."""
    train(folder, 1, 2, "float32", {}, save=checkpoint)
    final, _ = train(folder, 1, 3, "float32", {})
    if torch.distributed.get_rank() == 0:
        save_file(final, out)


def continue_in_layouts(
    folder: str, checkpoint: str, expected: str, layouts: list[dict]
) -> list[float | str]:
    """Train the third step in each layout; return the worst mean difference, or the error.

    The mean, because Adam takes a full step for a gradient that is only rounding.
    """
    answers: list[float | str] = []
    for sizes in layouts:
        try:
            final, _ = train(folder, 3, 3, "float32", sizes, load=checkpoint)
            differences = [
                (tensor - final[name]).abs().mean() for name, tensor in load_file(expected).items()
            ]
            answers.append(float(max(differences)))
        except InputError as error:
            answers.append(str(error))
    return answers


def check_param_gather(folder: str, expert_folder: str) -> list[float]:
    """Largest difference of weights after three steps with and without ``overlap_param_gather``.

    Last, the largest difference from the weights after two steps.
    """
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    found = []
    for model in (folder, expert_folder):
        plain, _ = train(model, 1, 3, "bfloat16", {})
        overlapped, _ = train(model, 1, 3, "bfloat16", {"overrides": overlap})
        found.append(largest_difference(plain, overlapped))
    return [*found, largest_difference(plain, train(expert_folder, 1, 2, "bfloat16", {})[0])]


def check_first_update(folder: str, sizes: dict, epochs: int) -> dict[str, float]:
    """Compare a step with one that scores the responses of every update.

    ``score passes``: of the step itself, which has two mini-batches.
    """
    found, passes = [], 0
    for scores_all in (False, True):
        settings = {"algorithm": {"num_epochs": epochs}}
        actor, spec, place = make_actor(folder, "float32", sizes, **settings)
        score, step, unscored = actor._score, actor._step, [epochs == 1]

        def count(batches, tick, *names, score=score, scores_all=scores_all):
            nonlocal passes
            passes += not scores_all
            return score(batches, tick, *names)

        def scored_step(batches, part, tick, score=score, step=step, unscored=unscored):
            if unscored and unscored.pop():
                batches = score(batches, tick, "old_logprob", "old_entropy")
            return step(batches, part, tick)

        actor._score, actor._step = count, scored_step if scores_all else step
        start = weights(actor, spec, place)
        actor.update(make_groups(1, spec.vocab_size), lambda done, total: None)
        found.append(weights(actor, spec, place))
    return {
        "difference": largest_difference(*found),
        "trained": largest_difference(found[0], start),
        "score passes": passes,
    }


def check_other_settings(folder: str, out: str, cases: list[dict]) -> list[float]:
    """Continue from a checkpoint with other settings of Adam.

    Returns each case's largest difference of the weights from those of a run whose optimizer got
    the settings between the steps.
    """
    answers = []
    for number, (sizes, first) in enumerate(cases):
        path = f"{out}/settings-{number}"
        actor, spec, place = make_actor(folder, "float32", sizes, first)
        actor.update(make_groups(1, spec.vocab_size), lambda done, total: None)
        actor.save(path, {}).finish()
        changed = {"lr": 3e-3, "min_lr": 1e-4, "adam_beta1": 0.8, "adam_beta2": 0.9}
        for group in actor.train_engine.optimizer.param_groups:
            group.update(max_lr=3e-3, min_lr=1e-4, betas=(0.8, 0.9), eps=1e-6)
        actor.train_engine.scheduler.step(0)
        actor.update(make_groups(2, spec.vocab_size), lambda done, total: None)
        expected = weights(actor, spec, place)
        others = first | changed | {"adam_eps": 1e-6}
        resumed, spec, place = make_actor(folder, "float32", sizes, others)
        resumed.load(path)
        resumed.update(make_groups(2, spec.vocab_size), lambda done, total: None)
        answers.append(largest_difference(weights(resumed, spec, place), expected))
    return answers
