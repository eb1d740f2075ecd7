"""Logits of a Hugging Face folder through Megatron against transformers; runs on every rank."""

import torch
import torch.distributed as dist

from megatron_espo.config import Megatron
from megatron_espo.distributed import runtime
from tests.support.weights_models import load_spec

TEXT = "The capital of France is Paris, and 17 + 25 = 42."


def logit_difference(folder: str, pipeline: int) -> float:
    """Largest absolute difference over the whole vocabulary, float32."""
    place = runtime.initialize(pipeline_model_parallel_size=pipeline)
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_espo.megatron.model import build_model
    from megatron_espo.weights.hf_io import load_hf_weights

    spec = load_spec(folder)
    chunks = build_model(spec, Megatron(pipeline_model_parallel_size=pipeline), place.groups)
    load_hf_weights(chunks, spec, folder, place.groups)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(TEXT)])

    def forward_step(_, model):
        return model(
            tokens, torch.arange(tokens.size(1))[None], None
        ), lambda output, non_loss_data: output

    with torch.no_grad():
        logits = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=chunks[0],
            num_microbatches=1,
            seq_length=tokens.size(1),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    difference = [float((logits[0] - expected).abs().max()) if logits else None]
    dist.broadcast_object_list(difference, src=dist.get_world_size() - 1)
    return difference[0]
