"""What the routers are said to have dealt out, against transformers' routers; runs on every rank."""

import torch

from megatron_espo.config import Config, Data, Megatron, Model, Optimizer, Rollout
from megatron_espo.config.experts import read_experts
from megatron_espo.mcore import runtime
from tests.ranks.resume import make_groups


def check_load(folder: str, **sizes: int) -> dict:
    """``moe/*`` of two updates (the learning rate moves no weight), and of the same tokens in transformers' model."""
    config = Config(
        model=Model(path=folder, dtype="float32"),
        megatron=Megatron(**sizes),
        optimizer=Optimizer(lr=1e-30),
        rollout=Rollout(prompts_per_step=4, group_size=2, max_response_tokens=10),
        data=Data(prompts="reasoning_gym:none"),
    )
    place = runtime.initialize(**runtime.parallel_sizes(config.megatron))
    from transformers import AutoModelForCausalLM

    from megatron_espo.mcore.learner import Learner
    from megatron_espo.mcore.model import read_hf_config

    hf_config = read_hf_config(folder)
    learner = Learner(config, hf_config, place)
    groups = [group[:1] for group in make_groups(1, hf_config["vocab_size"])]  # no prompt is shared
    found = []
    for _ in range(2):
        learner.score([(sequence.prompt_ids, sequence.response_ids) for (sequence,) in groups[:1]])  # a canary does not count
        found.append(learner.update(groups, lambda done, total: None))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    counts = 0
    for (sequence,) in groups:
        tokens = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        chosen = torch.stack(model(tokens, output_router_logits=True).router_logits).topk(read_experts(hf_config).per_token).indices
        counts = counts + torch.nn.functional.one_hot(chosen, read_experts(hf_config).count).sum((1, 2))
    share = counts / counts.double().mean(1, keepdim=True)
    expected = {"moe/load_max": share.amax(1).mean(), "moe/load_min": share.amin(1).mean(), "moe/idle_experts": (counts == 0).double().mean()}
    moe = [{name: value for name, value in metrics.items() if name.startswith("moe/")} for metrics in found]
    return {"found": moe, "expected": {name: float(value) for name, value in expected.items()}}
