"""CUDA IPC handles as JSON, without a GPU: the handle is written by hand in torch's form."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)

from megatron_espo.rollout import ipc_transport
from megatron_espo.rollout.ipc_transport import (
    IPCJsonTrainerInitInfo,
    IPCJsonTrainerWeightTransferEngine,
    IPCJsonWeightTransferEngine,
    encode_handle,
)
from megatron_espo.rollout.server import EngineConfig, server_command
from megatron_espo.rollout.transport import make_trainer_transport
from tests.support.distributed import run_ranks

# Arguments of rebuild_cuda_tensor, in torch's order.
ARGUMENTS = (
    torch.Tensor,
    torch.Size([1 << 30]),
    (1,),
    0,
    torch.storage.TypedStorage,
    torch.uint8,
    3,
    bytes(range(256))[-66:],
    (1 << 40) + 512,
    (1 << 62) + 1,
    False,
    b"/torch_1234_0",
    7,
    b"\xff" * 64,
    True,
)
UUID = "GPU-8f3c"


def worker() -> IPCJsonWeightTransferEngine:
    return object.__new__(IPCJsonWeightTransferEngine)


def sent(handles, sizes=None):
    """The update info that a sender gives its client, after JSON."""
    sender, infos = object.__new__(IPCJsonTrainerWeightTransferEngine), []
    sender.is_sender, sender.client = True, SimpleNamespace(update_weights=infos.append)
    names = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
    sender._do_send(**names, ipc_handles=handles, tensor_sizes=sizes)
    return json.loads(json.dumps(infos[0]))


def test_handles_survive_json():
    handles = {UUID: ARGUMENTS, "GPU-2": ARGUMENTS}
    info = worker().parse_update_info(sent(handles, sizes=[12]))
    assert info.ipc_handles == handles
    assert (info.names, info.dtype_names, info.shapes) == (["a"], ["bfloat16"], [[2, 3]])
    assert info.tensor_sizes == [12]
    assert info.ipc_handles[UUID][0] is torch.Tensor and info.ipc_handles[UUID][5] is torch.uint8


def test_the_arguments_are_those_of_torch():
    from inspect import signature

    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    assert len(signature(rebuild_cuda_tensor).parameters) == len(ARGUMENTS)
    assert type(torch.zeros(1)._typed_storage()) is ARGUMENTS[4]


def test_other_ranks_send_nothing():
    sender = object.__new__(IPCJsonTrainerWeightTransferEngine)
    sender.is_sender, sender.client = False, None
    sender._do_send(names=["a"], dtype_names=["bfloat16"], shapes=[[2, 3]], ipc_handles={})


def test_the_buffer_holds_the_largest_tensor(monkeypatch):
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    for rows, expected in ((100, 1 << 30), (152_064, 152_064 * 8192 * 2)):
        metas = [ParamMeta("a", torch.bfloat16, (rows, 8192)), ParamMeta("b", torch.float32, (9,))]
        source = SimpleNamespace(metadata=lambda metas=metas: metas)
        sender = make_trainer_transport("ipc", engine=None, source=source, rank=1)
        assert sender.packed_buffer_size_bytes == expected


def test_an_error_of_the_engine_is_raised_after_the_collectives_of_the_update():
    found = run_ranks(2, "tests.support.ranks.ipc:failures", timeout=60)
    calls = ["start", "update", "update", "update", "finish"]
    expected = [[calls[:last], f"call {last}"] for last in range(1, 6)]
    assert found == [*expected, [calls, "no error"]]


@pytest.mark.parametrize("place, kind", [(0, torch.nn.Parameter), (5, torch.bfloat16)])
def test_handles_of_other_tensors_are_refused(place, kind):
    with pytest.raises(TypeError, match="expected the handle of a packed buffer"):
        encode_handle((*ARGUMENTS[:place], kind, *ARGUMENTS[place + 1 :]))


def test_pickles_are_not_read(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    info = sent({UUID: ARGUMENTS}) | {"ipc_handles_pickled": "not a pickle"}
    assert worker().parse_update_info(info).ipc_handles == {UUID: ARGUMENTS}


def test_vllm_finds_both_sides():
    for transport, backend in (("ipc", ipc_transport.BACKEND), ("nccl", "nccl")):
        command = server_command(EngineConfig("", "", "", transport), [])
        found = command[command.index("--weight-transfer-config") + 1]
        assert json.loads(found) == {"backend": backend}
    assert ipc_transport.BACKEND == IPCJsonTrainerInitInfo.backend
    assert WeightTransferEngineFactory._registry["ipc_json"]() is IPCJsonWeightTransferEngine
    trainer = WeightTransferTrainerFactory._registry["ipc_json"]()
    assert trainer is IPCJsonTrainerWeightTransferEngine
