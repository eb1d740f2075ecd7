"""The shared-memory transport on a plain module, both sides in this process, against the source's own tensors."""

import gc
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from megatron_espo.rollout.shared_memory import (
    SharedBlock,
    SharedMemoryTrainerInitInfo,
    SharedMemoryWeightTransferEngine,
    num_bytes,
)


class Net(torch.nn.Module):
    """An embedding, three blocks and a norm; loads weights by name like a vLLM model."""

    def __init__(self, seed: int, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(50, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.norm = torch.nn.LayerNorm(8)
        self.to(dtype)

    def load_weights(self, weights):
        for name, tensor in weights:
            parameter = self.get_parameter(name)
            getattr(parameter, "weight_loader", torch.Tensor.copy_)(parameter, tensor)


class DirectClient:
    """vLLM's four-method protocol, straight into a worker engine."""

    def __init__(self, worker):
        self.worker = worker
        self.calls = []

    def init_weight_transfer_engine(self, init_info):
        self.capacity = init_info["capacity"]
        self.worker.init_transfer_engine(self.worker.parse_init_info(init_info))

    def start_weight_update(self):
        self.calls.append("start")
        self.worker.start_weight_update()

    def update_weights(self, update_info):
        self.calls.append("update")
        self.worker.update_weights(update_info)

    def finish_weight_update(self, weight_version=None):
        self.calls.append("finish")
        self.worker.finish_weight_update()


class ListSource(WeightSource):
    """Announces one thing and yields another."""

    def __init__(self, announced, yielded):
        self.announced, self.yielded, self.taken = announced, yielded, 0

    def metadata(self):
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.announced]

    def __iter__(self):
        for item in self.yielded:
            self.taken += 1
            yield item


def connect(source, model, rank=0):
    record_metadata_for_reloading(model)
    model_config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=False))
    vllm_config = SimpleNamespace(parallel_config=None, model_config=model_config)
    worker = SharedMemoryWeightTransferEngine(None, vllm_config, torch.device("cpu"), model)
    client = DirectClient(worker) if rank == 0 else None
    init_info = SharedMemoryTrainerInitInfo(rank=rank)
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source), client


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_every_parameter_arrives_in_every_sync(wire):
    trainer, served = Net(seed=1, dtype=wire), Net(seed=2)
    transport, client = connect(ModuleSource(trainer), served)
    for _ in range(2):
        transport.send_weights()
        for name, parameter in served.named_parameters():
            assert torch.equal(parameter, trainer.get_parameter(name).float()), name
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.mul_(-1.5)
    assert client.calls == ["start", *["update"] * 5, "finish"] * 2  # embedding, three layers, norm


def test_block_holds_the_two_largest_neighbours():
    trainer = Net(seed=1)
    _, client = connect(ModuleSource(trainer), Net(seed=2))
    layer = 8 * 8 * 4 + 64  # the bias takes a cache line
    assert client.capacity == num_bytes(ParamMeta("embed", torch.float32, (50, 8))) + layer


def test_non_contiguous_tensors_arrive():
    trainer, served = Net(seed=1), Net(seed=2)
    weights = [
        (name, p.detach().mT.contiguous().mT if p.dim() == 2 else p.detach()) for name, p in trainer.named_parameters()
    ]
    assert not weights[0][1].is_contiguous()
    transport, _ = connect(ListSource(weights, weights), served)
    transport.send_weights()
    assert all(torch.equal(served.get_parameter(name), tensor) for name, tensor in weights)


def test_damaged_bytes_are_named(monkeypatch):
    transport, client = connect(ModuleSource(Net(seed=1)), Net(seed=2))
    deliver = client.worker.update_weights

    def flip_a_bit(update_info):
        transport._block.bytes[update_info["offsets"][-1] + 3] ^= 1
        deliver(update_info)

    monkeypatch.setattr(client.worker, "update_weights", flip_a_bit)
    with pytest.raises(ValueError, match=r"'embed.weight' arrived damaged"):
        transport.send_weights()


def test_missing_and_repeated_tensors_are_named(monkeypatch):
    transport, client = connect(ModuleSource(Net(seed=1)), Net(seed=2))
    deliver = client.worker.update_weights
    drop_last_layer = lambda info: deliver(info) if 5 not in info["positions"] else None  # noqa: E731
    monkeypatch.setattr(client.worker, "update_weights", drop_last_layer)
    with pytest.raises(ValueError, match=r"2 announced weights did not arrive: layers.2.weight, layers.2.bias\."):
        transport.send_weights()

    transport, client = connect(ModuleSource(Net(seed=1)), Net(seed=2))
    deliver_again = client.worker.update_weights
    monkeypatch.setattr(client.worker, "update_weights", lambda info: (deliver_again(info), deliver_again(info)))
    with pytest.raises(ValueError, match=r"'embed.weight' arrived twice"):
        transport.send_weights()


@pytest.mark.parametrize(
    "replacement, message",
    [
        (torch.zeros(8, 7), r"'layers.1.weight' was announced as torch.float32 \(8, 8\), got torch.float32 \(8, 7\)"),
        (torch.zeros(8, 8).half(), r"'layers.1.weight' was announced as torch.float32 .*got torch.float16"),
        (None, r"'layers.1.weight' is not held by the sending rank"),
    ],
)
def test_source_that_breaks_its_announcement_is_an_error_after_all_ranks_are_through(replacement, message):
    announced = [(name, parameter.detach()) for name, parameter in Net(seed=1).named_parameters()]
    yielded = [(name, replacement if name == "layers.1.weight" else tensor) for name, tensor in announced]
    source = ListSource(announced, yielded)
    transport, client = connect(source, Net(seed=2))
    with pytest.raises(ValueError, match=message):
        transport.send_weights()
    assert source.taken == len(announced)  # the other ranks are inside this iteration's collectives
    assert "finish" not in client.calls


def test_other_ranks_iterate_and_send_nothing():
    weights = [(name, parameter.detach()) for name, parameter in Net(seed=1).named_parameters()]
    source = ListSource(weights, weights)
    transport, client = connect(source, Net(seed=2), rank=1)
    transport.send_weights()
    transport.shutdown()
    assert client is None and source.taken == len(weights)


def test_only_the_very_block_is_attached():
    """A rank on another machine finds nothing, or something else, under the sender's path."""
    block = SharedBlock.create(4096)
    block.bytes[:4] = torch.tensor([1, 2, 3, 4])
    ours = SharedBlock.attach_if_here(block.path, 4096, bytes([1, 2, 3, 4]))
    ours.bytes[9] = 7
    assert block.bytes[9] == 7
    assert SharedBlock.attach_if_here(block.path, 4096, bytes([1, 2, 3, 5])) is None
    assert SharedBlock.attach_if_here(block.path, 8192, bytes([1, 2, 3, 4])) is None
    assert SharedBlock.attach_if_here("/proc/1/fd/999999", 4096, b"") is None
    ours.close()
    block.close()


def test_shutdown_frees_the_block():
    gc.collect()
    transport, client = connect(ModuleSource(Net(seed=1)), Net(seed=2))
    transport.send_weights()
    assert "megatron_espo_weights" in open("/proc/self/maps").read()
    transport.shutdown()
    client.worker.shutdown()
    assert "megatron_espo_weights" not in open("/proc/self/maps").read()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    assert not any("megatron_espo_weights" in os.readlink(link) for link in links if os.path.islink(link))
