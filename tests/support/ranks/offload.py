"""Compare training with and without offloading between the steps. Runs on every rank."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.megatron.offload import PARTS
from megatron_espo.models.spec import ModelSpec
from tests.support.ranks.resume import make_actor, make_groups

STEPS = 2  # Adam makes its moments in the first


def check_all(folders: dict[str, str], cases: list[dict]) -> list[dict]:
    """Return for each case the differences on each rank, and the memory freed on rank 0."""
    return [check(folders[case.pop("model")], **case) for case in cases]


def check(folder: str, dtype: str = "float32", sizes: dict | None = None, **options) -> dict:
    sizes = sizes or {}
    plain, spec, place = make_actor(folder, dtype, sizes, **options)
    expected = [train(plain, step, spec) for step in range(1, STEPS + 1)]
    wanted = state(plain)
    actor, _, _ = make_actor(folder, dtype, sizes | {"offload": PARTS}, **options)
    start = {name: tensor.clone() for name, tensor in state(actor).items()}
    found, freed = [], {}
    for step in range(1, STEPS + 1):
        freed = offload_and_restore(actor)
        found.append(train(actor, step, spec))
    other = {
        name for name, tensor in state(actor).items() if not bits(tensor).equal(bits(wanted[name]))
    }
    moved = {name for name, tensor in start.items() if not bits(tensor).equal(bits(wanted[name]))}
    answers: list = [None] * dist.get_world_size()
    dist.all_gather_object(
        answers,
        (sorted(other), found == expected, state(actor).keys() == wanted.keys(), len(moved) > 2),
    )
    return {
        "ranks": answers,
        "freed": freed,
        "held": held_bytes(actor),
        "host": actor.offloader.host_bytes,
    }


def train(actor, step: int, spec: ModelSpec) -> tuple:
    """Return a step's metrics, and log-probs computed with only the weights on the device."""
    metrics = actor.update(make_groups(step, spec.vocab_size), lambda done, total: None)
    metrics = {name: value for name, value in metrics.items() if not name.startswith("time/")}
    actor.offloader.to_host("optimizer", "gradients")
    scores = actor.score([((1, 2, 3), (4, 5), None), ((7, 8), (9, 10, 11, 12), None)])
    actor.offloader.to_device("optimizer", "gradients")
    return metrics, scores


def offload_and_restore(actor) -> dict[str, int]:
    """Offload and restore every part; check that tensors keep identity and views.

    Returns the bytes that each part freed.
    """
    offloader, before, freed = actor.offloader, list(everything(actor)), {}
    places = {key: tensor.data_ptr() - _base(tensor) for key, tensor in before}
    held = held_bytes(actor)
    for part in PARTS:
        offloader.to_host(part)
        freed[part] = held - sum(freed.values()) - held_bytes(actor)
    assert held_bytes(actor) == 0, "not all memory was freed"
    assert offloader.offloaded == {part for part in PARTS if freed[part]}
    offloader.to_device(*PARTS)
    assert not offloader.offloaded and held_bytes(actor) == held
    for (key, tensor), (key_now, now) in zip(before, everything(actor), strict=True):
        assert key == key_now and tensor is now, key
        assert places[key] == tensor.data_ptr() - _base(tensor), (
            f"{key} is another part of its storage"
        )
    for chunk in actor.train_engine.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            buffer.grad_data.fill_(torch.nan)  # their content is not restored
            for parameter in buffer.params:
                assert _base(parameter.main_grad) == _base(buffer.grad_data)
                assert buffer.param_data is None or _base(parameter) == _base(buffer.param_data)
    return freed


def everything(actor) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, gradient buffers and the optimizer's tensors by name."""
    yield from ((name, parameter) for name, parameter in state(actor).items())
    for i, chunk in enumerate(actor.train_engine.chunks):
        for j, buffer in enumerate(chunk.buffers + chunk.expert_parallel_buffers):
            yield f"{i} gradients {j}", buffer.grad_data


def state(actor) -> dict[str, Tensor]:
    """Return the tensors that must be equal."""
    found = {
        f"{i} {name}": p
        for i, chunk in enumerate(actor.chunks)
        for name, p in chunk.named_parameters()
    }
    optimizer = actor.train_engine.optimizer
    for i, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        shards = [
            parameter for group in part.optimizer.param_groups for parameter in group["params"]
        ]
        for j, shard in enumerate(shards):
            found[f"main {i} {j}"] = shard
            moments = part.optimizer.state[shard] if shard in part.optimizer.state else {}
            found |= {
                f"{name} {i} {j}": moments[name]
                for name in ("exp_avg", "exp_avg_sq")
                if name in moments
            }
    return found


def held_bytes(actor) -> int:
    """Return the bytes of all storages, each once."""
    storages = (tensor.untyped_storage() for _, tensor in everything(actor))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _base(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_gpu_memory(folder: str) -> None:
    """On a GPU: torch and the driver report the memory as free, and the next step is equal."""

    def free() -> int:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    plain, spec, _ = make_actor(folder, "bfloat16", {})
    expected = [train(plain, step, spec) for step in (1, 2)]
    del plain
    actor, _, _ = make_actor(folder, "bfloat16", {"offload": PARTS})
    found = [train(actor, 1, spec)]
    torch.cuda.empty_cache()
    allocated, free_before, held = torch.cuda.memory_allocated(), free(), held_bytes(actor)
    actor.offloader.to_host(*PARTS)
    assert allocated - torch.cuda.memory_allocated() >= 0.99 * held, (
        allocated,
        torch.cuda.memory_allocated(),
        held,
    )
    assert free() - free_before >= 0.9 * held, (free(), free_before, held)
    assert actor.offloader._parts["optimizer"].host.is_pinned()
    actor.offloader.to_device(*PARTS)
    found.append(train(actor, 2, spec))
    assert found == expected
