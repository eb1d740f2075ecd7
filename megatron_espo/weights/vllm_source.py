"""``MegatronWeightSource`` as vLLM's own class. This module imports vLLM; nothing else here does."""

from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from megatron_espo.weights import source


class MegatronWeightSource(source.MegatronWeightSource, WeightSource):
    """The same stream for a transport that asks for vLLM's types."""

    def metadata(self) -> list[ParamMeta]:
        """As in the parent, as vLLM's ``ParamMeta``."""
        return [ParamMeta(item.name, item.dtype, item.shape) for item in super().metadata()]
