"""The ``ipc`` transport on ranks without a GPU: handles are written by hand."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer import ipc_engine
from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

from megatron_espo.rollout.engine import EngineError
from megatron_espo.rollout.ipc_transport import IPCJsonTrainerWeightTransferEngine
from tests.test_ipc_transport import ARGUMENTS

CALLS = 5  # of an update of three chunks


def chunks(iterator, gpu_uuid, **_):
    for name, _ in iterator:
        yield PackedIpcChunk([name], [[1]], ["float32"], [4], {gpu_uuid: ARGUMENTS})


def failures() -> list[tuple[list[str], str]]:
    """Fail in each call of an update in turn; return the calls and the error of rank 0."""
    ipc_engine.packed_ipc_producer = chunks
    torch.cuda.synchronize = torch.cuda.ipc_collect = lambda: None
    found = []
    for last in range(1, CALLS + 2):
        calls, text = [], "no error"

        def call(name, calls=calls, last=last) -> None:
            calls.append(name)
            if len(calls) == last:
                raise EngineError(f"call {last}")

        client = SimpleNamespace(
            start_weight_update=lambda call=call: call("start"),
            update_weights=lambda info, call=call: call("update"),
            finish_weight_update=lambda call=call: call("finish"),
        )
        sender = object.__new__(IPCJsonTrainerWeightTransferEngine)
        sender.is_sender = dist.get_rank() == 0
        sender.client = client if sender.is_sender else None
        sender.source = [(name, torch.zeros(1)) for name in "abc"]
        sender.packed, sender.packed_buffer_size_bytes = True, 4
        sender.gpu_uuid = f"GPU-{dist.get_rank()}"
        try:
            sender.send_weights()
        except EngineError as error:
            text = str(error)
        dist.barrier()
        found.append((calls, text))
    return found
