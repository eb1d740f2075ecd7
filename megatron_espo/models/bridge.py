"""Models that Megatron-Bridge builds, loads and exports."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.models.spec import Experts, ExternalSpec


class MegatronBridge(ExternalSpec):
    """Any causal language model of Megatron-Bridge's ``AutoBridge``.

    Set ``model.family: megatron_espo.models.bridge:MegatronBridge``. Only sizes are read from
    ``config.json``; Megatron-Bridge checks it. The loss, the schedule, checkpoints and weight
    updates are those of the other families.
    """

    architecture, model_type = "", ""

    @classmethod
    def read(cls, hf: dict[str, Any]) -> "MegatronBridge":
        # Megatron-Bridge reads the rotary embedding and the window.
        absent = dict.fromkeys(("rope_parameters", "rope_scaling", "sliding_window"))
        return super().read(hf | (hf.get("text_config") or {}) | absent)

    @classmethod
    def problems(cls, hf: dict[str, Any]) -> Iterator[str]:
        # The only sizes that this package itself uses, beside those of the experts.
        if missing := [key for key in cls.required if not isinstance(hf.get(key), int)]:
            yield f"expected {', '.join(missing)}, found none"

    @classmethod
    def read_experts(cls, hf: dict[str, Any]) -> Experts | None:
        # Families give this number different names.
        names = "num_experts", "num_local_experts", "n_routed_experts"
        count = next((hf[name] for name in names if hf.get(name)), None)
        if count is None:
            return None
        first = hf.get("first_k_dense_replace", 0)
        return Experts(
            count=count,
            per_token=hf["num_experts_per_tok"],
            ffn=hf.get("moe_intermediate_size") or hf["intermediate_size"],
            normalized=hf.get("norm_topk_prob", False),
            layers=tuple(i >= first for i in range(hf["num_hidden_layers"])),
        )

    def build(self, path: str, arguments: dict[str, Any], groups: Any) -> list[Any]:
        provider = _auto_bridge(path).to_megatron_provider(load_weights=False)
        arguments = arguments | {
            "seq_length": self.max_position_embeddings,
            # The embedding's rows are divided by the tensor-parallel ranks, and no further.
            "should_pad_vocab": True,
            "make_vocab_size_divisible_by": 1,
            # Only the objective changes the weights, and only of what the engine samples with.
            "mtp_num_layers": None,
            "moe_aux_loss_coeff": 0.0,
            "moe_router_bias_update_rate": 0.0,
        }
        for name, value in arguments.items():
            if not hasattr(provider, name):
                raise InputError(f"Megatron-Bridge: {type(provider).__name__} has no field {name}")
            setattr(provider, name, value)
        provider.finalize()
        provider._pg_collection = groups
        stages = arguments["virtual_pipeline_model_parallel_size"]
        return [provider.provide(vp_stage=i if stages else None).cuda() for i in range(stages or 1)]

    def load(self, chunks: Sequence[Any], path: str) -> None:
        _auto_bridge(path).load_hf_weights(list(chunks))

    def export(self, chunks: Sequence[Any], path: str) -> Iterator[tuple[str, Any]]:
        yield from _auto_bridge(path).export_hf_weights(list(chunks), show_progress=False)


def _auto_bridge(path: str) -> Any:
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise InputError(
            f"model.family: expected an installed megatron-bridge, got {error}; docs/models.md "
            "tells which release fits"
        ) from error
    return AutoBridge.from_hf_pretrained(path)
