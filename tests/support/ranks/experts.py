"""``moe/*`` metrics and those of transformers' routers. Runs on every rank."""

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_espo.config import Algorithm, Config, Data, Megatron, Model, Optimizer, Rollout
from megatron_espo.distributed import runtime
from tests.support.ranks.resume import make_groups
from tests.support.reference import routed
from tests.support.weights_models import load_spec


def check_load(folder: str, replays: bool, **sizes: int) -> dict:
    """Return ``moe/*`` of two updates that change no weight, and of transformers' model.

    With ``replays`` rank 0 has experts: in the first layer, those of every other token differ from
    the router's choice.
    """
    config = Config(
        model=Model(path=folder, dtype="float32"),
        megatron=Megatron(**sizes),
        optimizer=Optimizer(lr=1e-30),
        algorithm=Algorithm(num_mini_batches=1),
        rollout=Rollout(
            prompts_per_step=4, group_size=2, max_response_tokens=10, router_replay=replays
        ),
        data=Data(prompts="reasoning_gym:none"),
    )
    place = runtime.initialize(**runtime.parallel_sizes(config.megatron))
    from transformers import AutoModelForCausalLM

    from megatron_espo.megatron.actor import Actor

    spec = load_spec(folder)
    model, experts = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        spec.experts,
    )

    def own_choices(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, output_router_logits=True).router_logits
        return torch.stack(logits, 1).topk(experts.per_token).indices.sort(-1).values

    groups, counts, differ, given = [], 0, 0, 0
    for sequence, _ in make_groups(1, spec.vocab_size):  # no prompt is shared
        tokens = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        chosen = own_choices(tokens)
        if replays:
            chosen[::2, 0] = (chosen[::2, 0] + 1) % experts.count
            with routed(model, chosen[:-1]):
                own = own_choices(tokens)
            chosen[-1] = own[-1]
            differ += int((own != chosen.sort(-1).values).any(-1).sum())
            given += chosen[:-1, :, 0].numel()
            if dist.get_rank() == 0:
                sequence = replace(sequence, routed_experts=chosen[:-1].numpy())
        counts = counts + torch.nn.functional.one_hot(chosen, experts.count).sum((0, 2))
        groups.append([sequence])
    actor, found = Actor(config, spec, place), []
    for _ in range(2):
        actor.score(
            [(groups[0][0].prompt_ids, groups[0][0].response_ids, None)]
        )  # a canary does not count
        found.append(actor.update(groups, lambda done, total: None))
    share = counts / counts.double().mean(1, keepdim=True)
    expected = {
        "moe/load_max": share.amax(1).mean(),
        "moe/load_min": share.amin(1).mean(),
        "moe/idle_experts": (counts == 0).double().mean(),
    }
    expected |= {"moe/router_mismatch": differ / given} if replays else {}
    moe = [
        {name: value for name, value in metrics.items() if name.startswith("moe/")}
        for metrics in found
    ]
    return {"found": moe, "expected": {name: float(value) for name, value in expected.items()}}


def check_loads(folder: str, **sizes: int) -> list[dict]:
    """Return the results without and with replay."""
    return [check_load(folder, replays, **sizes) for replays in (False, True)]
