"""Write and load checkpoints in different layouts. Runs on every rank."""

import torch

from megatron_espo.config import Megatron
from megatron_espo.distributed import runtime
from tests.support.weights_models import load_spec


def write(pairs: list[list[str]], **sizes) -> None:
    """Write a checkpoint for each ``[Hugging Face folder, checkpoint]``."""
    from megatron_espo.megatron.checkpoint import save_checkpoint
    from megatron_espo.weights.hf_io import load_hf_weights

    place = runtime.initialize(**sizes)
    for folder, out in pairs:
        chunks, spec = _empty_model(folder, place, sizes)
        load_hf_weights(chunks, spec, folder, place.groups)
        save_checkpoint(chunks, spec, out).finish()


def fail_in_the_background(folder: str, out: str, **sizes) -> list[str]:
    """Return each rank's error of a save whose files rank 1 cannot write."""
    import torch.distributed as dist

    from megatron_espo.megatron import checkpoint

    def no_space(bucket):
        raise OSError(28, "No space left on device")

    place = runtime.initialize(**sizes)
    if dist.get_rank() == 1:
        checkpoint._write_file = no_space
    chunks, spec = _empty_model(folder, place, sizes)
    save, errors = checkpoint.save_checkpoint(chunks, spec, out), [""] * dist.get_world_size()
    try:
        save.finish()
        own = "saved"
    except OSError as error:
        own = str(error)
    dist.all_gather_object(errors, own)
    return errors


def read(triples: list[list[str]], **sizes) -> list[float]:
    """Load and export each ``[Hugging Face folder, checkpoint, folder to write]``.

    Returns the largest value in a padding row of the vocabulary of each.
    """
    from megatron_espo.megatron.checkpoint import load_checkpoint
    from megatron_espo.weights.hf_io import save_hf

    place = runtime.initialize(**sizes)
    padding = []
    for folder, checkpoint, out in triples:
        chunks, spec = _empty_model(folder, place, sizes)
        load_checkpoint(chunks, spec, checkpoint)
        padding.append(_largest_padding(chunks, spec.vocab_size, place.groups.tp))
        save_hf(chunks, spec, out, folder, place.groups, torch.float32)
    return padding


def read_one_short(folder: str, checkpoint: str) -> str:
    """Return the error for a checkpoint with a missing and an unknown parameter."""
    from megatron_espo.errors import InputError
    from megatron_espo.megatron.checkpoint import load_checkpoint

    place = runtime.initialize()
    chunks, spec = _empty_model(folder, place, {})
    chunks[0].extra_scale = torch.nn.Parameter(torch.ones(1))
    del chunks[0].decoder.final_layernorm
    try:
        load_checkpoint(chunks, spec, checkpoint)
    except InputError as error:
        return str(error)
    return "loaded"


def _empty_model(folder, place, sizes):
    """Build a model filled with NaN, so that values that are not loaded are found."""
    from megatron_espo.megatron.model import build_model

    spec = load_spec(folder)
    chunks = build_model(spec, Megatron(**sizes), place.groups)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    return chunks, spec


def _largest_padding(chunks, vocab_size: int, group) -> float:
    """Return the largest absolute padding value over the tensor-parallel ranks; NaN is infinite."""
    largest = torch.zeros(())
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                rows = parameter.size(0)
                beyond = parameter[max(0, vocab_size - group.rank() * rows) :].detach().abs()
                largest = torch.maximum(
                    largest, beyond.nan_to_num(nan=torch.inf).max() if beyond.numel() else largest
                )
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return float(largest)
