"""The ``files`` transport on a plain module, with both sides in this process."""

import gc
import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from megatron_espo.rollout.file_transport import FileTrainerInitInfo, FileWeightTransferEngine
from megatron_espo.weights.vllm_source import ObservedSource

BOTH = pytest.mark.parametrize("shared", [False, True], ids=["memory", "folder"])


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


class JsonClient:
    """vLLM's four-method protocol; all infos reach the workers through JSON, as over HTTP."""

    def __init__(self, workers):
        self.workers, self.worker = workers, workers[0]
        self.calls = []

    def init_weight_transfer_engine(self, init_info):
        self.init_info = json.loads(json.dumps(init_info))
        for worker in self.workers:
            worker.init_transfer_engine(worker.parse_init_info(self.init_info))

    def start_weight_update(self):
        self.calls.append("start")
        for worker in self.workers:
            worker.start_weight_update()

    def update_weights(self, update_info):
        self.calls.append("update")
        for worker in self.workers:
            worker.update_weights(json.loads(json.dumps(update_info)))

    def finish_weight_update(self, weight_version=None):
        self.calls.append("finish")
        for worker in self.workers:
            worker.finish_weight_update()


class ListSource(WeightSource):
    """Announces one list of tensors and yields another."""

    def __init__(self, announced, yielded):
        self.announced, self.yielded, self.taken = announced, yielded, 0

    def metadata(self):
        return [
            ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.announced
        ]

    def __iter__(self):
        for item in self.yielded:
            self.taken += 1
            yield item


def connect(folder, source, *models, rank=0):
    """Trainer side and client; ``folder`` is a path, or empty for memory files."""
    model_config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=False))
    vllm_config = SimpleNamespace(parallel_config=None, model_config=model_config)
    workers = []
    for model in models:
        record_metadata_for_reloading(model)
        workers.append(FileWeightTransferEngine(None, vllm_config, torch.device("cpu"), model))
    client = JsonClient(workers) if rank == 0 else None
    init_info = FileTrainerInitInfo(rank=rank, prefix=folder and f"{folder}/engine-rank2")
    return WeightTransferTrainerFactory.trainer_init(
        init_info, client=client, source=source
    ), client


def flip_bit(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_reaches_all_workers_in_every_update(shared, dtype, tmp_path):
    trainer, served = Net(seed=1, dtype=dtype), [Net(seed=2), Net(seed=3)]
    transport, client = connect(tmp_path if shared else "", ModuleSource(trainer), *served)
    for _ in range(2):
        transport.send_weights()
        for model in served:
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, trainer.get_parameter(name).float()), name
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.mul_(-1.5)
    # An embedding, three layers, a norm.
    assert client.calls == ["start", *["update"] * 5, "finish"] * 2


@BOTH
def test_non_contiguous_tensors_arrive(shared, tmp_path):
    trainer, served = Net(seed=1), Net(seed=2)
    weights = [
        (name, p.detach().mT.contiguous().mT if p.dim() == 2 else p.detach())
        for name, p in trainer.named_parameters()
    ]
    assert not weights[0][1].is_contiguous()
    transport, _ = connect(tmp_path if shared else "", ListSource(weights, weights), served)
    transport.send_weights()
    assert all(torch.equal(served.get_parameter(name), tensor) for name, tensor in weights)


@BOTH
def test_damaged_bytes_are_named(shared, tmp_path, monkeypatch):
    transport, client = connect(tmp_path if shared else "", ModuleSource(Net(seed=1)), Net(seed=2))
    deliver = client.worker.update_weights

    def damage_layer_1(info):
        if info["positions"] == [3, 4]:
            flip_bit(client.init_info["paths"][info["file"]], info["offsets"][1] + 3)
        deliver(info)

    monkeypatch.setattr(client.worker, "update_weights", damage_layer_1)
    with pytest.raises(ValueError, match="'layers.1.bias' arrived damaged: checksum"):
        transport.send_weights()


def test_a_file_that_is_cut_off_is_named(tmp_path, monkeypatch):
    transport, client = connect(tmp_path, ModuleSource(Net(seed=1)), Net(seed=2))
    deliver = client.worker.update_weights

    def cut(info):
        os.truncate(client.init_info["paths"][info["file"]], 1000)
        deliver(info)

    monkeypatch.setattr(client.worker, "update_weights", cut)
    with pytest.raises(
        ValueError, match="'embed.weight' arrived damaged: the file has 1000 of 1600"
    ):
        transport.send_weights()


@BOTH
def test_missing_and_repeated_tensors_are_named(shared, tmp_path, monkeypatch):
    folder = tmp_path if shared else ""
    transport, client = connect(folder, ModuleSource(Net(seed=1)), Net(seed=2))
    deliver = client.worker.update_weights
    drop_last_layer = lambda info: deliver(info) if 5 not in info["positions"] else None  # noqa: E731
    monkeypatch.setattr(client.worker, "update_weights", drop_last_layer)
    transport.send_weights()
    assert client.worker.missing_weights() == ["layers.2.weight", "layers.2.bias"]

    transport, client = connect(folder, ModuleSource(Net(seed=1)), Net(seed=2))
    again = client.worker.update_weights
    monkeypatch.setattr(client.worker, "update_weights", lambda info: (again(info), again(info)))
    with pytest.raises(ValueError, match="'embed.weight' arrived twice"):
        transport.send_weights()


@BOTH
def test_tensors_that_the_loader_keeps_survive_later_groups(shared, tmp_path):
    """The groups split each layer: vLLM keeps its weight until the bias is there."""
    trainer, served = Net(seed=1), Net(seed=2)
    names = [name for name, _ in trainer.named_parameters()]
    order = [n for n in names if n.endswith("weight")] + [n for n in names if n.endswith("bias")]
    weights = [(name, trainer.get_parameter(name).detach()) for name in order]
    source = ListSource(weights, weights)
    source.groups = lambda: [[name] for name in order]
    transport, client = connect(tmp_path if shared else "", source, served)
    transport.send_weights()
    assert client.calls.count("update") == len(order)
    assert all(torch.equal(served.get_parameter(name), tensor) for name, tensor in weights)


@BOTH
@pytest.mark.parametrize(
    "replacement, message",
    [
        (torch.zeros(8, 7), r"was announced as .*float32, \(8, 8\)\), got .*float32, \(8, 7\)"),
        (torch.zeros(8, 8).half(), r"was announced as .*float32.*got .*float16"),
        (None, r"was announced as .*got None"),
    ],
)
def test_a_wrong_source_is_an_error_after_all_ranks_are_through(
    shared, tmp_path, replacement, message
):
    announced = [(name, p.detach()) for name, p in Net(seed=1).named_parameters()]
    yielded = [(name, replacement if name == "layers.1.weight" else t) for name, t in announced]
    source = ListSource(announced, yielded)
    observed = ObservedSource(source, 1)
    transport, client = connect(tmp_path if shared else "", observed, Net(seed=2))
    with pytest.raises(ValueError, match=f"'layers.1.weight' {message}"), observed.one_pass():
        transport.send_weights()
    assert source.taken == len(announced)  # the other ranks are inside its collectives
    assert "finish" not in client.calls


@BOTH
def test_other_ranks_iterate_and_send_nothing(shared, tmp_path):
    weights = [(name, parameter.detach()) for name, parameter in Net(seed=1).named_parameters()]
    source = ListSource(weights, weights)
    transport, client = connect(tmp_path if shared else "", source, Net(seed=2), rank=1)
    transport.send_weights()
    transport.shutdown()
    assert client is None and source.taken == len(weights) and not list(tmp_path.iterdir())


@BOTH
def test_the_next_group_is_gathered_while_the_last_is_loaded(shared, tmp_path, monkeypatch):
    """Each load waits until the source goes on: without overlap it would wait for ever."""
    gathered = threading.Semaphore(0)

    class SignallingSource(ModuleSource):
        def iter_groups(self):
            for group in super().iter_groups():
                gathered.release()
                yield group
            gathered.release()

    source = SignallingSource(Net(seed=1))
    transport, client = connect(tmp_path if shared else "", source, Net(seed=2))
    deliver = client.worker.update_weights

    def deliver_when_the_next_is_there(info):
        assert gathered.acquire(timeout=20)
        deliver(info)

    monkeypatch.setattr(client.worker, "update_weights", deliver_when_the_next_is_there)
    transport.send_weights()
    assert gathered.acquire(timeout=0)  # five of six signals were used


def test_a_group_is_freed_before_the_next_is_gathered():
    """The sender holds one group of the source at a time."""
    weights = [(name, p.detach()) for name, p in Net(seed=1).named_parameters()]
    alive = []

    class CountingSource(ListSource):
        def iter_groups(self):
            for names in self.groups():
                gc.collect()
                alive.append(sum(t.shape == (9999,) for t in gc.get_objects() if type(t) is Marked))
                yield names, [Marked(torch.zeros(9999)) for _ in names]

    class Marked(torch.Tensor):
        pass

    announced = [(name, torch.zeros(9999)) for name, _ in weights]
    model = Net(seed=2)
    model.load_weights = list
    transport, _ = connect("", CountingSource(announced, []), model)
    transport.send_weights()
    assert alive == [0] * 5


def test_memory_files_leave_nothing(tmp_path):
    gc.collect()

    def traces():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        open_files = [os.readlink(link) for link in links if os.path.islink(link)]
        found = [*open_files, *open("/proc/self/maps")]
        return sum("megatron_espo_weights" in text for text in found)

    before = traces()
    transport, client = connect("", ModuleSource(Net(seed=1)), Net(seed=2))
    transport.send_weights()
    assert traces() > before
    transport.shutdown()
    client.worker.shutdown()
    gc.collect()
    assert traces() == before


def test_shared_files_are_private_replaced_and_removed(tmp_path):
    folder = tmp_path / "run" / "weights"
    folder.mkdir(parents=True)
    stale = folder / "engine-rank2-0"
    stale.write_bytes(b"of a run that was killed")
    other = folder / "engine-0"
    other.write_bytes(b"of another engine")
    transport, client = connect(folder, ModuleSource(Net(seed=1)), Net(seed=2))
    assert stale.read_bytes() == b"" and stale.stat().st_mode & 0o777 == 0o600
    transport.send_weights()
    assert client.init_info["paths"] == [str(folder / f"engine-rank2-{i}") for i in range(2)]
    transport.shutdown()
    assert list(folder.iterdir()) == [other]


def test_a_worker_that_cannot_open_the_files_says_so(tmp_path, monkeypatch):
    """Trainer and engine see different files under one path."""
    start = FileWeightTransferEngine.init_transfer_engine

    def without_files(self, init_info):
        for path in init_info.paths:
            os.unlink(path)
        start(self, init_info)

    monkeypatch.setattr(FileWeightTransferEngine, "init_transfer_engine", without_files)
    with pytest.raises(FileNotFoundError, match="engine-rank2-0"):
        connect(tmp_path, ModuleSource(Net(seed=1)), Net(seed=2))
