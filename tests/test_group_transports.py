"""Our transports on a plain module, both sides in this process, against the source's own tensors."""

import gc
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from megatron_espo.rollout import wire
from megatron_espo.rollout.block import SharedBlock
from megatron_espo.rollout.group_transfer import num_bytes
from megatron_espo.rollout.lifecycle import EngineError
from megatron_espo.rollout.shared_memory import SharedMemoryTrainerInitInfo, SharedMemoryWeightTransferEngine
from megatron_espo.rollout.tcp import TcpTrainerInitInfo, TcpWeightTransferEngine

BOTH = pytest.mark.parametrize("transport_name", ["shared_memory", "tcp"])


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
    """vLLM's four-method protocol, straight into worker engines, each in a thread of its own."""

    def __init__(self, workers):
        self.workers, self.worker = workers, workers[0]
        self.calls = []
        self.pool = ThreadPoolExecutor(len(workers))

    def on_all(self, call):
        for done in [self.pool.submit(call, worker) for worker in self.workers]:
            done.result()

    def init_weight_transfer_engine(self, init_info):
        self.init_info, self.capacity = init_info, init_info["capacity"]
        self.on_all(lambda worker: worker.init_transfer_engine(worker.parse_init_info(init_info)))

    def start_weight_update(self):
        self.calls.append("start")
        self.on_all(lambda worker: worker.start_weight_update())

    def update_weights(self, update_info):
        self.calls.append("update")
        self.on_all(lambda worker: worker.update_weights(update_info))

    def finish_weight_update(self, weight_version=None):
        self.calls.append("finish")
        self.on_all(lambda worker: worker.finish_weight_update())


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


def connect(name, source, *models, rank=0):
    model_config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=False))
    vllm_config = SimpleNamespace(parallel_config=None, model_config=model_config)
    worker_class = {"shared_memory": SharedMemoryWeightTransferEngine, "tcp": TcpWeightTransferEngine}[name]
    workers = []
    for model in models:
        record_metadata_for_reloading(model)
        workers.append(worker_class(None, vllm_config, torch.device("cpu"), model))
    client = DirectClient(workers) if rank == 0 else None
    init_info = SharedMemoryTrainerInitInfo(rank=rank)
    if name == "tcp":
        init_info = TcpTrainerInitInfo(rank=rank, address="127.0.0.1", workers=len(workers), timeout_s=10)
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source), client


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_arrives_in_every_sync(transport_name, dtype):
    trainer, served = Net(seed=1, dtype=dtype), Net(seed=2)
    transport, client = connect(transport_name, ModuleSource(trainer), served)
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
    layer = 8 * 8 * 4 + 64  # the bias takes a cache line
    embedding = num_bytes(ParamMeta("embed", torch.float32, (50, 8)))
    for name, of_worker in {"shared_memory": embedding + layer, "tcp": embedding}.items():
        transport, client = connect(name, ModuleSource(trainer), Net(seed=2))
        assert transport._block.bytes.numel() == embedding + layer and client.capacity == of_worker


@BOTH
def test_non_contiguous_tensors_arrive(transport_name):
    trainer, served = Net(seed=1), Net(seed=2)
    weights = [
        (name, p.detach().mT.contiguous().mT if p.dim() == 2 else p.detach()) for name, p in trainer.named_parameters()
    ]
    assert not weights[0][1].is_contiguous()
    transport, _ = connect(transport_name, ListSource(weights, weights), served)
    transport.send_weights()
    assert all(torch.equal(served.get_parameter(name), tensor) for name, tensor in weights)


@BOTH
def test_damaged_bytes_are_named(transport_name, monkeypatch):
    transport, client = connect(transport_name, ModuleSource(Net(seed=1)), Net(seed=2))
    write = transport._write

    def flip_a_bit(names, tensors):
        info = write(names, tensors)
        transport._block.bytes[info.offsets[-1] + 3] ^= 1
        return info

    monkeypatch.setattr(transport, "_write", flip_a_bit)
    with pytest.raises(ValueError, match=r"'embed.weight' arrived damaged"):
        transport.send_weights()


@BOTH
def test_missing_and_repeated_tensors_are_named(transport_name, monkeypatch):
    transport, client = connect(transport_name, ModuleSource(Net(seed=1)), Net(seed=2))
    deliver = client.worker.update_weights
    drop_last_layer = lambda info: deliver(info) if 5 not in info["positions"] else None  # noqa: E731
    monkeypatch.setattr(client.worker, "update_weights", drop_last_layer)
    # What was not read comes in the place of what follows.
    missing = r"2 announced weights did not arrive: layers.2.weight, layers.2.bias\."
    with pytest.raises(ValueError, match=missing if transport_name == "shared_memory" else "'norm.weight' arrived damaged"):
        transport.send_weights()

    transport, client = connect(transport_name, ModuleSource(Net(seed=1)), Net(seed=2))
    deliver_again = client.worker.update_weights
    monkeypatch.setattr(client.worker, "update_weights", lambda info: (deliver_again(info), deliver_again(info)))
    with pytest.raises(ValueError, match=r"'embed.weight' arrived twice"):
        transport.send_weights()


@BOTH
@pytest.mark.parametrize(
    "replacement, message",
    [
        (torch.zeros(8, 7), r"'layers.1.weight' was announced as torch.float32 \(8, 8\), got torch.float32 \(8, 7\)"),
        (torch.zeros(8, 8).half(), r"'layers.1.weight' was announced as torch.float32 .*got torch.float16"),
        (None, r"'layers.1.weight' is not held by the sending rank"),
    ],
)
def test_source_that_breaks_its_announcement_is_an_error_after_all_ranks_are_through(transport_name, replacement, message):
    announced = [(name, parameter.detach()) for name, parameter in Net(seed=1).named_parameters()]
    yielded = [(name, replacement if name == "layers.1.weight" else tensor) for name, tensor in announced]
    source = ListSource(announced, yielded)
    transport, client = connect(transport_name, source, Net(seed=2))
    with pytest.raises(ValueError, match=message):
        transport.send_weights()
    assert source.taken == len(announced)  # the other ranks are inside this iteration's collectives
    assert "finish" not in client.calls


@BOTH
def test_other_ranks_iterate_and_send_nothing(transport_name):
    weights = [(name, parameter.detach()) for name, parameter in Net(seed=1).named_parameters()]
    source = ListSource(weights, weights)
    transport, client = connect(transport_name, source, Net(seed=2), rank=1)
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


def sockets() -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))


@BOTH
def test_shutdown_frees_block_and_sockets(transport_name):
    gc.collect()
    before = sockets()
    transport, client = connect(transport_name, ModuleSource(Net(seed=1)), Net(seed=2))
    transport.send_weights()
    assert "megatron_espo_weights" in open("/proc/self/maps").read()
    transport.shutdown()
    client.worker.shutdown()
    assert "megatron_espo_weights" not in open("/proc/self/maps").read()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    assert not any("megatron_espo_weights" in os.readlink(link) for link in links if os.path.islink(link))
    assert sockets() == before


# -- over TCP alone -------------------------------------------------------------------------------------------------------


def test_two_workers_get_the_same_bytes():
    trainer, served = Net(seed=1), [Net(seed=2), Net(seed=3)]
    transport, _ = connect("tcp", ModuleSource(trainer), *served)
    transport.send_weights()
    for model in served:
        assert all(torch.equal(parameter, trainer.get_parameter(name)) for name, parameter in model.named_parameters())


def test_a_stranger_gets_no_weights(monkeypatch):
    """It knows the address, and not the key."""
    trainer, served, turned_away = Net(seed=1), Net(seed=2), []
    introduce = DirectClient.init_weight_transfer_engine

    def come_first(client, init_info):
        address = init_info["address"], init_info["port"]
        socket.create_connection(address).close()
        with pytest.raises(wire.AuthenticationError):
            wire.connect(*address, b"another key")
        turned_away.append(address)
        introduce(client, init_info)

    monkeypatch.setattr(DirectClient, "init_weight_transfer_engine", come_first)
    transport, _ = connect("tcp", ModuleSource(trainer), served)
    transport.send_weights()
    assert turned_away and torch.equal(served.norm.weight, trainer.norm.weight)
    with pytest.raises(OSError):  # nobody listens any more
        socket.create_connection(turned_away[0])


@pytest.mark.parametrize("side", ["trainer", "worker"])
def test_a_broken_connection_is_an_error_of_the_transfer_at_once(side, monkeypatch):
    transport, client = connect("tcp", ModuleSource(Net(seed=1)), Net(seed=2))
    connection = transport._connections[0] if side == "worker" else client.worker._connection
    deliver = client.worker.update_weights

    def hang_up_first(update_info):
        with suppress(OSError), wire.as_socket(connection) as sock:
            sock.shutdown(socket.SHUT_RDWR)
        deliver(update_info)

    monkeypatch.setattr(client.worker, "update_weights", hang_up_first)
    began = time.monotonic()
    with pytest.raises((ConnectionError, EngineError), match="transfer: the connection to (the trainer|worker 0) broke"):
        transport.send_weights()
    assert time.monotonic() - began < 5
    transport.shutdown()


def test_the_next_group_is_gathered_while_one_is_loaded(monkeypatch):
    """The loader waits for the source to go on: it would wait for ever if they took turns."""
    trainer, gathered = Net(seed=1), threading.Semaphore(0)

    class Telling(ModuleSource):
        def iter_groups(self):
            for group in super().iter_groups():
                gathered.release()
                yield group
            gathered.release()

    for name in ("shared_memory", "tcp"):
        transport, client = connect(name, Telling(trainer), Net(seed=2))
        deliver = client.worker.update_weights

        def deliver_when_the_next_is_there(update_info, deliver=deliver):
            assert gathered.acquire(timeout=20)
            deliver(update_info)

        monkeypatch.setattr(client.worker, "update_weights", deliver_when_the_next_is_there)
        transport.send_weights()
        assert gathered.acquire(timeout=0)  # of six events five were waited for
