"""vLLM weight transport ``shared_memory``: trainer to engine on one machine, through memory and without a GPU.

The engine's workers map the sender's block, which they open through ``/proc``. Importing this module registers both sides with vLLM's factories.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from megatron_espo.rollout.block import SharedBlock
from megatron_espo.rollout.group_transfer import GroupInitInfo, GroupReceiver, GroupSender

BACKEND = "shared_memory"


@dataclass
class SharedMemoryTrainerInitInfo(TrainerInitInfo):
    """Trainer side: rank 0 sends, all ranks iterate the source."""

    backend: ClassVar[str] = BACKEND


@dataclass
class SharedMemoryInitInfo(GroupInitInfo):
    """Worker side: where the block is."""

    path: str


class SharedMemoryWeightTransferEngine(GroupReceiver):
    """Worker side: groups are in its memory when they are announced."""

    init_info_cls = SharedMemoryInitInfo

    def _attach(self, init_info: SharedMemoryInitInfo) -> SharedBlock:
        return SharedBlock.attach(init_info.path, init_info.capacity)


class SharedMemoryTrainerWeightTransferEngine(GroupSender):
    """Trainer side."""

    init_info_cls = SharedMemoryTrainerInitInfo

    def _introduce(self, init_info: SharedMemoryTrainerInitInfo, largest: int, manifest: dict[str, list]) -> None:
        block = self._block
        self.client.init_weight_transfer_engine(asdict(SharedMemoryInitInfo(block.bytes.numel(), path=block.path, **manifest)))


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)
WeightTransferTrainerFactory.register_engine(BACKEND, SharedMemoryTrainerWeightTransferEngine)
