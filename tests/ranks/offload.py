"""Training with the state on the host between the steps, against training without; runs on every rank."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.mcore.offload import PARTS
from tests.ranks.resume import make_groups, make_learner

STEPS = 3


def check_all(folders: dict[str, str], cases: list[dict]) -> list[dict]:
    """For each case what differs between the two, rank by rank, and how much memory was freed on rank 0."""
    return [check(folders[case.pop("model")], **case) for case in cases]


def check(folder: str, dtype: str = "float32", sizes: dict | None = None, **options) -> dict:
    sizes = sizes or {}
    plain, hf_config, place = make_learner(folder, dtype, sizes, **options)
    expected = [train(plain, step, hf_config) for step in range(1, STEPS + 1)]
    wanted = state(plain)
    learner, _, _ = make_learner(folder, dtype, sizes | {"offload": PARTS}, **options)
    start = {name: tensor.clone() for name, tensor in state(learner).items()}
    found, freed = [], {}
    for step in range(1, STEPS + 1):
        freed = leave_and_come_back(learner)
        found.append(train(learner, step, hf_config))
    other = {name for name, tensor in state(learner).items() if not bits(tensor).equal(bits(wanted[name]))}
    moved = {name for name, tensor in start.items() if not bits(tensor).equal(bits(wanted[name]))}
    answers: list = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (sorted(other), found == expected, state(learner).keys() == wanted.keys(), len(moved) > 2))
    return {"ranks": answers, "freed": freed, "held": held_bytes(learner), "host": learner.offloader.host_bytes}


def train(learner, step: int, hf_config: dict) -> tuple:
    """A step's metrics, and afterwards the log-probs of some tokens, for which an offloader has the weights alone on the device."""
    metrics = learner.update(make_groups(step, hf_config["vocab_size"]), lambda done, total: None)
    learner.offloader.to_host("optimizer", "gradients")
    scores = learner.score([((1, 2, 3), (4, 5), None), ((7, 8), (9, 10, 11, 12), None)])
    learner.offloader.to_device("optimizer", "gradients")
    return metrics, scores


def leave_and_come_back(learner) -> dict[str, int]:
    """Every part leaves and comes back, each tensor the object that it was and the view that it was; bytes that each freed."""
    offloader, before, freed = learner.offloader, list(everything(learner)), {}
    places = {key: tensor.data_ptr() - _base(tensor) for key, tensor in before}
    held = held_bytes(learner)
    for part in PARTS:
        offloader.to_host(part)
        freed[part] = held - sum(freed.values()) - held_bytes(learner)
    assert held_bytes(learner) == 0, "something is left"
    assert offloader.away == {part for part in PARTS if freed[part]}
    offloader.to_device(*PARTS)
    assert not offloader.away and held_bytes(learner) == held
    for (key, tensor), (key_now, now) in zip(before, everything(learner), strict=True):
        assert key == key_now and tensor is now, key
        assert places[key] == tensor.data_ptr() - _base(tensor), f"{key} is another part of its storage"
    for chunk in learner.policy.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            buffer.grad_data.fill_(torch.nan)  # what they held is dead, says the offloader
            for parameter in buffer.params:
                assert _base(parameter.main_grad) == _base(buffer.grad_data)
                assert buffer.param_data is None or _base(parameter) == _base(buffer.param_data)
    return freed


def everything(learner) -> Iterator[tuple[str, Tensor]]:
    """Parameters, gradient buffers, and what the optimizer updates and remembers, by name."""
    yield from ((name, parameter) for name, parameter in state(learner).items())
    for i, chunk in enumerate(learner.policy.chunks):
        for j, buffer in enumerate(chunk.buffers + chunk.expert_parallel_buffers):
            yield f"{i} gradients {j}", buffer.grad_data


def state(learner) -> dict[str, Tensor]:
    """What has to be the same."""
    found = {f"{i} {name}": p for i, chunk in enumerate(learner.chunks) for name, p in chunk.named_parameters()}
    optimizer = learner.policy.optimizer
    for i, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        shards = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        for j, shard in enumerate(shards):
            found[f"main {i} {j}"] = shard
            moments = part.optimizer.state[shard] if shard in part.optimizer.state else {}
            found |= {f"{name} {i} {j}": moments[name] for name in ("exp_avg", "exp_avg_sq") if name in moments}
    return found


def held_bytes(learner) -> int:
    """Memory behind all of it; shared memory counts once."""
    storages = (tensor.untyped_storage() for _, tensor in everything(learner))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _base(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_gpu_memory(folder: str) -> None:
    """In a process of its own, on a GPU: both torch and the driver say that the memory is free, and the next step is what it would have been."""
    def free() -> int:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    plain, hf_config, _ = make_learner(folder, "bfloat16", {})
    expected = [train(plain, step, hf_config) for step in (1, 2)]
    del plain
    learner, _, _ = make_learner(folder, "bfloat16", {"offload": PARTS})
    found = [train(learner, 1, hf_config)]
    torch.cuda.empty_cache()
    allocated, free_before, held = torch.cuda.memory_allocated(), free(), held_bytes(learner)
    learner.offloader.to_host(*PARTS)
    assert allocated - torch.cuda.memory_allocated() >= 0.99 * held, (allocated, torch.cuda.memory_allocated(), held)
    assert free() - free_before >= 0.9 * held, (free(), free_before, held)
    assert learner.offloader._parts["optimizer"]._host.is_pinned()
    learner.offloader.to_device(*PARTS)
    found.append(train(learner, 2, hf_config))
    assert found == expected
