"""Checkpoints written and read in different layouts; runs on every rank."""

import torch

from megatron_espo.mcore import runtime


def write(pairs: list[list[str]], **sizes) -> None:
    """``[Hugging Face folder, checkpoint to write]`` each."""
    from megatron_espo.mcore.checkpoint import save_checkpoint
    from megatron_espo.weights.hf_io import load_hf_weights

    place = runtime.initialize(**sizes)
    for folder, out in pairs:
        chunks, hf_config = _empty_model(folder, place, sizes)
        load_hf_weights(chunks, hf_config, folder, place.groups)
        save_checkpoint(chunks, hf_config, out)


def read(triples: list[list[str]], **sizes) -> list[float]:
    """``[Hugging Face folder, checkpoint, folder to write]`` each; the largest value in a padding row of the vocabulary, of each."""
    from megatron_espo.mcore.checkpoint import load_checkpoint
    from megatron_espo.weights.hf_io import save_hf

    place = runtime.initialize(**sizes)
    padding = []
    for folder, checkpoint, out in triples:
        chunks, hf_config = _empty_model(folder, place, sizes)
        load_checkpoint(chunks, hf_config, checkpoint)
        padding.append(_largest_padding(chunks, hf_config["vocab_size"], place.groups.tp))
        save_hf(chunks, hf_config, out, folder, place.groups, torch.float32)
    return padding


def read_one_short(folder: str, checkpoint: str) -> str:
    """The refusal of a checkpoint that lacks a parameter and has another that the model lacks."""
    from megatron_espo.errors import InputError
    from megatron_espo.mcore.checkpoint import load_checkpoint

    place = runtime.initialize()
    chunks, hf_config = _empty_model(folder, place, {})
    chunks[0].extra_scale = torch.nn.Parameter(torch.ones(1))
    del chunks[0].decoder.final_layernorm
    try:
        load_checkpoint(chunks, hf_config, checkpoint)
    except InputError as error:
        return str(error)
    return "loaded"


def _empty_model(folder, place, sizes):
    """Filled with NaN, so that a value which is not loaded shows."""
    from megatron_espo.mcore.model import Layout, build_model, read_hf_config

    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, Layout(**sizes), place.groups)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    return chunks, hf_config


def _largest_padding(chunks, vocab_size: int, group) -> float:
    """Largest absolute value beyond the vocabulary, over the tensor-parallel ranks (NaN counts as infinite)."""
    largest = torch.zeros(())
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                rows = parameter.size(0)
                beyond = parameter[max(0, vocab_size - group.rank() * rows) :].detach().abs()
                largest = torch.maximum(largest, beyond.nan_to_num(nan=torch.inf).max() if beyond.numel() else largest)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return float(largest)
