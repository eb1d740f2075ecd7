"""vLLM weight transport ``ipc_json``: vLLM's CUDA IPC transport with JSON in place of pickles.

vLLM sends CUDA IPC handles over HTTP as a pickle, and its workers refuse pickles unless
``VLLM_ALLOW_INSECURE_SERIALIZATION`` is set. Here the handles travel as JSON: a tuple is a list and
bytes are hexadecimal text. Classes do not travel, because vLLM's packed buffer always has the same.
Importing this module registers both sides with vLLM's factories.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer import factory, ipc_engine

BACKEND = "ipc_json"
# Positions and values of the classes among the arguments of torch's ``rebuild_cuda_tensor``.
_CLASSES = {0: torch.Tensor, 4: torch.storage.TypedStorage, 5: torch.uint8}
_FIELDS = ("names", "dtype_names", "shapes", "tensor_sizes")


@dataclass
class IPCJsonTrainerInitInfo(ipc_engine.IPCTrainerInitInfo):
    """As vLLM's, for this backend. Handles are those of the packed buffer."""

    backend: ClassVar[str] = BACKEND
    packed: bool = True


class IPCJsonWeightTransferEngine(ipc_engine.IPCWeightTransferEngine):
    """Worker side."""

    def parse_update_info(
        self, update_dict: dict[str, Any]
    ) -> ipc_engine.IPCWeightTransferUpdateInfo:
        """Decode the handles. Pickled handles are ignored."""
        coded = update_dict["ipc_handles_json"]
        handles = {gpu: decode_handle(values) for gpu, values in coded.items()}
        fields = {name: update_dict[name] for name in _FIELDS}
        return super().parse_update_info(fields | {"ipc_handles": handles})


class IPCJsonTrainerWeightTransferEngine(ipc_engine.IPCTrainerWeightTransferEngine):
    """Trainer side."""

    init_info_cls = IPCJsonTrainerInitInfo
    _error: Exception | None = None  # the first error of the client in this update

    def send_weights(self) -> None:
        """As vLLM's, but raises an error of the client at the end.

        Until then the other ranks wait for this one in a collective of each chunk.
        """
        assert self.source is not None
        self._error = None
        self._call(lambda: self.client.start_weight_update())
        self._send_packed(self.source)
        self._call(lambda: self.client.finish_weight_update())
        self._post_send_sync()
        if self._error is not None:
            raise self._error

    def _do_send(self, *, ipc_handles: Any, **fields: Any) -> None:  # type: ignore[override]
        def send() -> None:
            coded = {gpu: encode_handle(arguments) for gpu, arguments in ipc_handles.items()}
            self.client.update_weights(fields | {"ipc_handles_json": coded})

        self._call(send)  # vLLM passes all arguments by name

    def _call(self, call: Callable[[], None]) -> None:
        if self.is_sender and self._error is None:
            try:
                call()
            except Exception as error:
                self._error = error


def encode_handle(arguments: tuple) -> list[Any]:
    """JSON form of the arguments of ``rebuild_cuda_tensor``; TypeError for other classes."""
    if {i: arguments[i] for i in _CLASSES} != _CLASSES:
        raise TypeError(f"{BACKEND}: expected the handle of a packed buffer, got {arguments!r}.")
    values = [value for i, value in enumerate(arguments) if i not in _CLASSES]
    return [value.hex() if isinstance(value, bytes) else value for value in values]


def decode_handle(coded: list[Any]) -> tuple:
    """Inverse of ``encode_handle``."""
    whole = (bytes.fromhex(value) if isinstance(value, str) else value for value in coded)
    values = (tuple(value) if isinstance(value, list) else value for value in whole)
    count = len(coded) + len(_CLASSES)
    return tuple(_CLASSES[i] if i in _CLASSES else next(values) for i in range(count))


factory.WeightTransferEngineFactory.register_engine(BACKEND, IPCJsonWeightTransferEngine)
factory.WeightTransferTrainerFactory.register_engine(BACKEND, IPCJsonTrainerWeightTransferEngine)
