"""CUDA IPC handles as JSON, without a GPU: the handle is written by hand in torch's form."""

import base64
import json
import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)

from megatron_espo.rollout import ipc_transport
from megatron_espo.rollout.ipc_transport import (
    IPCJsonTrainerInitInfo,
    IPCJsonTrainerWeightTransferEngine,
    IPCJsonWeightTransferEngine,
    decode_handles,
    encode_handles,
)
from megatron_espo.rollout.server import EngineConfig
from megatron_espo.rollout.transport import register_transports

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
    sender._do_send(["a"], ["bfloat16"], [[2, 3]], handles, tensor_sizes=sizes)
    return json.loads(json.dumps(infos[0]))


@pytest.mark.parametrize("handles", [{UUID: ARGUMENTS, "GPU-2": ARGUMENTS}, [{UUID: ARGUMENTS}]])
def test_handles_survive_json(handles):
    info = worker().parse_update_info(sent(handles, sizes=[12]))
    assert info.ipc_handles == handles
    assert (info.names, info.dtype_names, info.shapes) == (["a"], ["bfloat16"], [[2, 3]])
    assert info.tensor_sizes == [12]
    first = info.ipc_handles[0] if isinstance(info.ipc_handles, list) else info.ipc_handles
    assert first[UUID][0] is torch.Tensor and first[UUID][5] is torch.uint8


def test_the_arguments_are_those_of_torch():
    from inspect import signature

    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    assert len(signature(rebuild_cuda_tensor).parameters) == len(ARGUMENTS)
    kind = type(torch.zeros(1)._typed_storage())
    assert decode_handles(encode_handles({UUID: (kind, torch.bfloat16)}))[UUID][0] is kind


def test_other_ranks_send_nothing():
    sender = object.__new__(IPCJsonTrainerWeightTransferEngine)
    sender.is_sender, sender.client = False, None
    sender._do_send(["a"], ["bfloat16"], [[2, 3]], [{}])


@pytest.mark.parametrize(
    "value",
    [
        {"name": "OrderedDict"},
        {"name": "torch.Tensor"},
        {"name": "uint8", "bytes": ""},
        {"name": ["Tensor"]},
        {"bytes": "not base64!"},
        {"pickle": "gASVAA=="},
        "Tensor",
        1.5,
    ],
    ids=str,
)
def test_unknown_values_are_refused(value):
    with pytest.raises(ValueError):
        decode_handles({UUID: [value]})


@pytest.mark.parametrize("value", [dict, torch.int4, "text", 1.5, [1], torch.zeros(1)], ids=repr)
def test_values_without_a_json_form_are_refused(value):
    with pytest.raises(TypeError, match="has no JSON form"):
        encode_handles({UUID: (value,)})


def test_pickles_are_refused(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    pickled = base64.b64encode(pickle.dumps({UUID: ARGUMENTS})).decode()
    fields = {"names": [], "dtype_names": [], "shapes": [], "ipc_handles_pickled": pickled}
    with pytest.raises(ValueError, match="expected IPC handles by GPU, got None"):
        worker().parse_update_info(fields)
    with pytest.raises(ValueError, match="unknown fields ipc_handles_pickled"):
        worker().parse_update_info(fields | {"ipc_handles_json": {}})


def test_vllm_finds_both_sides():
    register_transports()
    backends = [EngineConfig("", "", "", name).backend for name in ("ipc", "nccl")]
    assert backends == [ipc_transport.BACKEND, "nccl"]
    assert ipc_transport.BACKEND == IPCJsonTrainerInitInfo.backend
    assert WeightTransferEngineFactory._registry["ipc_json"]() is IPCJsonWeightTransferEngine
    trainer = WeightTransferTrainerFactory._registry["ipc_json"]()
    assert trainer is IPCJsonTrainerWeightTransferEngine
