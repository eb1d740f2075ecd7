"""vLLM weight transport ``ipc_json``: vLLM's CUDA IPC transport with JSON in place of pickles.

vLLM sends CUDA IPC handles over HTTP as a pickle, and its workers refuse pickles unless
``VLLM_ALLOW_INSECURE_SERIALIZATION`` is set. Here the handles travel as JSON: a tuple is a list,
bytes are ``{"bytes": base64}``, and a class or dtype is ``{"name": ...}`` from a fixed list.
Importing this module registers both sides with vLLM's factories.
"""

import base64
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCTrainerInitInfo,
    IPCTrainerWeightTransferEngine,
    IPCWeightTransferEngine,
    IPCWeightTransferUpdateInfo,
)

BACKEND = "ipc_json"
_NAMED = {
    "Tensor": torch.Tensor,
    "Parameter": torch.nn.Parameter,
    "TypedStorage": torch.storage.TypedStorage,
    "UntypedStorage": torch.UntypedStorage,
    "uint8": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_NAMES = {value: name for name, value in _NAMED.items()}
_FIELDS = {"names", "dtype_names", "shapes", "tensor_sizes"}

Handle = dict[str, tuple]  # GPU UUID -> arguments of torch's rebuild_cuda_tensor


@dataclass
class IPCJsonTrainerInitInfo(IPCTrainerInitInfo):
    """As vLLM's, for this backend."""

    backend: ClassVar[str] = BACKEND


class IPCJsonWeightTransferEngine(IPCWeightTransferEngine):
    """Worker side."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        """Decode the handles.

        Raises:
            ValueError: an unknown field (such as a pickle), or a class that is not allowed.
        """
        fields = dict(update_dict)
        handles = decode_handles(fields.pop("ipc_handles_json", None))
        if unknown := sorted(fields.keys() - _FIELDS):
            raise ValueError(f"{BACKEND}: unknown fields {', '.join(unknown)} in the update info.")
        return super().parse_update_info(fields | {"ipc_handles": handles})


class IPCJsonTrainerWeightTransferEngine(IPCTrainerWeightTransferEngine):
    """Trainer side."""

    init_info_cls = IPCJsonTrainerInitInfo

    def _do_send(
        self,
        names: list[str],
        dtype_names: list[str],
        shapes: list[list[int]],
        ipc_handles: list[Handle] | Handle,
        tensor_sizes: list[int] | None = None,
    ) -> None:
        if self.is_sender:
            info = {"names": names, "dtype_names": dtype_names, "shapes": shapes}
            info |= {"tensor_sizes": tensor_sizes, "ipc_handles_json": encode_handles(ipc_handles)}
            self.client.update_weights(info)


def encode_handles(handles: list[Handle] | Handle) -> Any:
    """JSON form of one handle or of a list of them; TypeError for a value that has none."""
    if isinstance(handles, list):
        return [encode_handles(handle) for handle in handles]
    return {gpu: _encode(arguments) for gpu, arguments in handles.items()}


def decode_handles(coded: Any) -> Any:
    """Inverse of ``encode_handles``; ValueError for anything that it does not produce."""
    if isinstance(coded, list):
        return [decode_handles(handle) for handle in coded]
    if not isinstance(coded, dict):
        raise ValueError(f"{BACKEND}: expected IPC handles by GPU, got {coded!r}.")
    return {gpu: _decode(arguments) for gpu, arguments in coded.items()}


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, type | torch.dtype) and value in _NAMES:
        return {"name": _NAMES[value]}
    raise TypeError(f"{BACKEND}: an IPC handle holds {value!r}, which has no JSON form here.")


def _decode(value: Any) -> Any:
    match value:
        case None | bool() | int():
            return value
        case list():
            return tuple(_decode(item) for item in value)
        case {"bytes": str(text), **rest} if not rest:
            return base64.b64decode(text, validate=True)
        case {"name": str(name), **rest} if not rest and name in _NAMED:
            return _NAMED[name]
    raise ValueError(f"{BACKEND}: an IPC handle holds {value!r}, which is not allowed.")


WeightTransferEngineFactory.register_engine(BACKEND, IPCJsonWeightTransferEngine)
WeightTransferTrainerFactory.register_engine(BACKEND, IPCJsonTrainerWeightTransferEngine)
