"""Check weights of Megatron's model. Runs on every rank."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_espo.config import Megatron
from megatron_espo.distributed import runtime
from megatron_espo.megatron.model import build_model
from megatron_espo.models.mapping import EXPERT_BIAS
from megatron_espo.weights.hf_io import load_hf_weights, save_hf
from megatron_espo.weights.source import WeightGatherer
from tests.support.weights_models import load_spec


def check_layouts(
    folders: list[str], layouts: list[dict[str, Any]], out: str, occupied: str
) -> dict[str, float]:
    """Load, compare with ``<folder>.logits``, stream and export each model in each layout.

    Returns:
        "<layout> <model>" -> largest absolute difference of the logits, over all ranks.
    """
    differences = {}
    for sizes in layouts:
        groups = start(sizes)
        for folder in folders:
            spec = load_spec(folder)
            if groups.ep.size() > 1 and spec.experts is None:
                continue
            chunks = load(spec, folder, sizes, groups)
            case = f"{json.dumps(sizes)} {Path(folder).name}"
            differences[case] = logits_difference(chunks, groups, load_file(folder + ".logits"))
            check_stream(chunks, spec, groups, whole_checkpoint(folder))
            check_stage_stream(chunks, spec, groups, whole_checkpoint(folder))
            if spec.experts:
                check_held_names(chunks, spec, groups)
            export = Path(out, f"{layouts.index(sizes)}", Path(folder).name)
            save_hf(chunks, spec, export, folder, groups, torch.float32, max_file_bytes=20_000)
            check_padding(chunks, spec, groups)
        check_failed_export(chunks, spec, groups, folder, occupied)
    return differences


def start(sizes: dict[str, Any]):
    """Return Megatron's process groups for a layout."""
    return runtime.initialize(**sizes).groups


def load(spec, folder, sizes, groups, dtype=torch.float32) -> list[torch.nn.Module]:
    """Build the model, fill it with NaN, load it: values that were not loaded stay NaN."""
    chunks = build_model(spec, Megatron(**sizes), groups, dtype=dtype)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    load_hf_weights(chunks, spec, folder, groups)
    return chunks


def whole_checkpoint(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    return {
        name: t
        for file in Path(folder).glob("*.safetensors")
        for name, t in load_file(file).items()
    }


@torch.no_grad()
def logits_difference(chunks, groups, reference: dict[str, torch.Tensor]) -> float:
    """Run the chunks in pipeline order; return the largest difference of the logits."""
    tokens, expected = reference["tokens"], reference["logits"]
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    hidden_size = chunks[0].config.hidden_size
    hidden = torch.empty(tokens.size(1), tokens.size(0), hidden_size)
    difference = torch.zeros(())
    for chunk in chunks:
        chunk.eval()  # Megatron refuses to train experts with TP > 1 and whole sequences
        for stage in range(groups.pp.size()):
            if stage == groups.pp.rank():
                chunk.set_input_tensor(hidden)
                output = chunk(tokens, positions, None)
                if chunk.post_process:
                    whole = [torch.empty_like(output) for _ in range(groups.tp.size())]
                    dist.all_gather(whole, output.contiguous(), group=groups.tp)
                    logits = torch.cat(whole, dim=-1)[..., : expected.size(-1)]
                    difference = (logits - expected).abs().max()
                else:
                    hidden = output.contiguous()
            dist.broadcast(hidden, src=dist.get_global_rank(groups.pp, stage), group=groups.pp)
    assert not difference.isnan()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return difference.item()


def check_stream(chunks, spec, groups, expected: dict[str, torch.Tensor]) -> None:
    """Compare the stream with the checkpoint, twice, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        source = WeightGatherer(chunks, spec, groups, dtype=dtype)
        metadata = source.metadata()
        assert sorted(m.name for m in metadata) == sorted(expected)
        assert source.held_names() is None
        for _ in range(2):
            items = list(source)
            assert source.participates == (groups.dp.rank() == 0 or groups.expt_dp.rank() == 0)
            assert len(items) == (len(metadata) if source.participates else 0)
            for (name, tensor), declared in zip(items, metadata, strict=source.participates):
                assert (name, tensor.dtype, tuple(tensor.shape)) == (
                    declared.name,
                    declared.dtype,
                    declared.shape,
                )
                assert tensor.is_contiguous()
                assert torch.equal(tensor, expected[name].to(declared.dtype)), name
                assert declared.dtype == (torch.float32 if name.endswith(EXPERT_BIAS) else dtype)
        assert [names for names, _ in source.iter_groups()] == (
            source.groups() if source.participates else []
        )
    everywhere = WeightGatherer(chunks, spec, groups, dtype=torch.float32, all_replicas=True)
    assert len(list(everywhere)) == len(metadata)


def check_stage_stream(chunks, spec, groups, expected: dict[str, torch.Tensor]) -> None:
    """Check that a sharded stream has its rank's tensors, and None for others' experts."""
    source = WeightGatherer(
        chunks, spec, groups, dtype=torch.float32, sharded=True, all_replicas=True
    )
    items = dict(source)
    assert list(items) == [name for group in source.groups() for name in group]
    assert {name for name, tensor in items.items() if tensor is not None} == source.held_names()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in items.items() if tensor is not None
    )
    held: list[Any] = [None] * groups.pp.size()
    dist.all_gather_object(held, list(items), group=groups.pp)
    assert sorted(name for names in held for name in names) == sorted(
        m.name for m in source.metadata()
    )


def check_held_names(chunks, spec, groups) -> None:
    """Check that ranks with a shard of an expert hold its names, and replicas hold all names."""
    source = WeightGatherer(
        chunks, spec, groups, dtype=torch.float32, sharded=True, all_replicas=True
    )
    names = {m.name for m in source.metadata()}
    local = {
        int(found[1])
        for c in chunks
        for n, _ in c.named_parameters()
        if (found := re.search(r"local_experts.(\d+)", n))
    }
    experts = {
        groups.ep.rank() * spec.experts.count // groups.ep.size() + number for number in local
    }
    place = (groups.pp.rank(), groups.ep.rank(), groups.expt_tp.rank(), groups.expt_dp.rank())
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (place, sorted(source.held_names()), sorted(experts)))
    for _, held, of_rank in answers:
        assert {int(name.split(".")[5]) for name in held if ".experts." in name} == set(of_rank)
    for shard, replica in {place[2:] for place, _, _ in answers}:
        parts = [held for place, held, _ in answers if place[2:] == (shard, replica)]
        expert_names = [name for held in parts for name in held if ".experts." in name]
        assert sorted(expert_names) == sorted(name for name in names if ".experts." in name)
        assert set().union(*parts) == names


def stream_peak(folder: str, sizes: dict[str, Any], holds_last: bool = False) -> dict[str, int]:
    """Return the peak bytes beyond the model on any rank, and the bytes of the largest group.

    ``holds_last``: as vLLM's transports, keep each tensor until the next one is there.
    """
    from tests.support.ranks.plan import Allocated

    groups = start(sizes)
    spec = load_spec(folder)
    source = WeightGatherer(load(spec, folder, sizes, groups), spec, groups, dtype=torch.float32)
    sizes_of = {meta.name: 4 * torch.Size(meta.shape).numel() for meta in source.metadata()}
    largest = max(sum(sizes_of[name] for name in names) for names in source.groups())
    passes = []
    for _ in range(
        3
    ):  # gloo's threads may let go of a buffer late, which is not the stream's doing
        dist.barrier()
        with Allocated() as extra:
            last = None
            for _, tensor in source:
                last = tensor if holds_last else None
                del tensor
            del last
        passes.append(extra.peak)
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, min(passes))
    return {"peak": max(peaks), "layer": largest}


def node_streams(folder: str, layouts: list[tuple[dict[str, int], int]]) -> list[list[list[int]]]:
    """Stream the model in each (layout, ranks of a node); compare every rank with the checkpoint.

    Returns:
        For each layout and rank the bytes that it received over the network and inside its node.
    """
    received = []
    expected, spec = whole_checkpoint(folder), load_spec(folder)
    for sizes, node in layouts:
        groups = start(sizes)
        chunks = load(spec, folder, sizes, groups)
        with CountedBytes(node) as counted:
            source = WeightGatherer(chunks, spec, groups, dtype=torch.float32, all_replicas=True)
            counted.received, counted.calls = [0, 0], ""
            items = dict(source)
        assert list(items) == [meta.name for meta in source.metadata()]
        for name, tensor in items.items():
            assert torch.equal(tensor, expected[name]), (sizes, node, name)
        if "g" in counted.calls:  # each group sends its second batch before it gathers its first
            assert counted.calls.count("ss") >= len(source.groups()), (sizes, node, counted.calls)
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, counted.received)
        received.append(of_ranks)
    return received


class CountedBytes:
    """Splits the ranks into nodes, and counts the bytes that this rank receives in collectives.

    ``received``: over the network, inside the node. ``calls``: "s" for a broadcast, "g" for a
    gather.
    """

    def __init__(self, node: int) -> None:
        self._node, self.received, self.calls = node, [0, 0], ""

    def __enter__(self) -> "CountedBytes":
        from megatron_espo.weights import source

        rank = dist.get_rank()
        self._patch = patch = pytest.MonkeyPatch()
        patch.setattr(source, "gethostname", lambda: f"node{rank // self._node}")
        broadcast, gather = dist.broadcast, dist.all_gather_into_tensor

        def count(tensor: torch.Tensor, sender: int) -> None:
            if sender != rank:
                inside = sender // self._node == rank // self._node
                self.received[inside] += tensor.nbytes

        def counted_broadcast(tensor, src, *args, **kwargs):
            self.calls += "s"
            count(tensor, src)
            return broadcast(tensor, src, *args, **kwargs)

        def counted_gather(output, tensor, group):
            self.calls += "g"
            for sender in dist.get_process_group_ranks(group):
                count(tensor, sender)
            return gather(output, tensor, group=group)

        patch.setattr(dist, "broadcast", counted_broadcast)
        patch.setattr(dist, "all_gather_into_tensor", counted_gather)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def check_padding(chunks, spec, groups) -> None:
    """Check that padding rows of the embedding are zero."""
    if chunks[0].pre_process:
        weight = chunks[0].embedding.word_embeddings.weight
        start = groups.tp.rank() * weight.shape[0]
        assert not weight[max(0, spec.vocab_size - start) :].any()


def check_failed_export(chunks, spec, groups, folder: str, out: str) -> None:
    """Check that a failed write raises on every rank."""
    message = None
    try:
        save_hf(chunks, spec, out, folder, groups, torch.float32)
    except (ValueError, RuntimeError) as error:
        message = str(error)
    assert message is not None and "expected nothing or an earlier export" in message


def check_vllm_class(folder: str) -> None:
    """Check that vLLM's default batching and the overridden one are equal."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    from megatron_espo.weights.vllm_source import MegatronWeightSource as VllmSource

    groups = start({})
    spec = load_spec(folder)
    source = VllmSource(load(spec, folder, {}, groups), spec, groups, dtype=torch.bfloat16)
    assert isinstance(source, WeightSource) and all(
        isinstance(item, ParamMeta) for item in source.metadata()
    )
    assert source.groups() == WeightSource.groups(source)
    for (names, tensors), (default_names, default) in zip(
        source.iter_groups(), WeightSource.iter_groups(source), strict=True
    ):
        assert names == default_names and all(map(torch.equal, tensors, default))
