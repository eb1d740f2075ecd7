"""The trainer's weights into the rollout engine, version by version."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_espo.config import Config
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.rollout import Engine, make_trainer_transport, push_weights, resolve_transport
from megatron_espo.weights.vllm_source import MegatronWeightSource


class WeightSync:
    """Connects the model to the engine once, then pushes each new version.

    Args:
        config: the run's configuration.
        hf_config: the model's ``config.json``.
        chunks: this rank's model chunks.
        runtime: this rank's place.
        engine: the engine on rank 0, ``None`` elsewhere; waits until it is up.

    Raises:
        InputError: the engine's model and ours differ in names or shapes.
        EngineError: the engine did not start.
    """

    def __init__(
        self,
        config: Config,
        hf_config: dict[str, Any],
        chunks: Sequence[torch.nn.Module],
        runtime: Runtime,
        engine: Engine | None,
    ) -> None:
        name = resolve_transport(config.rollout.transport)
        dtype = config.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype
        source = MegatronWeightSource(
            chunks, hf_config, runtime.groups, dtype=getattr(torch, dtype), all_replicas=name == "ipc"
        )
        self._engine = engine
        self._transport = make_trainer_transport(name, engine=engine, source=source, rank=runtime.rank)

    def push(self, version: int) -> None:
        """Make the engine serve the current weights as policy ``version``. Collective: the gathers of ``MegatronWeightSource``.

        Raises:
            EngineError: on rank 0; the engine then serves nothing.
        """
        push_weights(self._transport, self._engine, version)
