"""Shard layouts against Megatron's definitions, written with ``torch.cat`` and ``chunk``."""

import pytest
import torch

from megatron_espo.errors import InputError
from megatron_espo.models.layouts import ShardLayout, local_shape, shard_into, unshard_into
from megatron_espo.models.mapping import ParamRule

HEAD_DIM, HIDDEN = 3, 5


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def shards_of(sources, layout, tp_size, query_groups=1, padded_vocab=0, dtype=torch.float32):
    shape = local_shape(layout, [s.shape for s in sources], tp_size, padded_vocab)
    shards = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(tp_size)]
    for rank, shard in enumerate(shards):
        shard_into(shard, sources, layout, rank, tp_size, query_groups)
    return shards


def qkv(groups: int, heads_per_group: int, bias: bool):
    columns = () if bias else (HIDDEN,)
    query = random(groups * heads_per_group * HEAD_DIM, *columns)
    return [query, random(groups * HEAD_DIM, *columns), random(groups * HEAD_DIM, *columns) + 9]


def interleaved(sources, groups: int) -> torch.Tensor:
    """Megatron's fused matrix: for each group its query heads, its key head, its value head."""
    per_group = zip(*(source.chunk(groups) for source in sources), strict=True)
    return torch.cat([torch.cat(group) for group in per_group])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("groups,heads_per_group", [(4, 3), (4, 1), (2, 2), (1, 6)])
def test_qkv(groups, heads_per_group, tp_size, bias):
    sources = qkv(groups, heads_per_group, bias)
    whole = interleaved(sources, groups)
    shards = shards_of(sources, ShardLayout.QKV, tp_size, groups)
    for shard, expected in zip(shards, whole.chunk(tp_size), strict=True):
        assert torch.equal(shard, expected)
    assert_merges_back(shards, sources, ShardLayout.QKV, groups)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_gated(tp_size):
    gate, up = random(8, HIDDEN), random(8, HIDDEN) + 9
    shards = shards_of([gate, up], ShardLayout.GATED, tp_size)
    for shard, g, u in zip(shards, gate.chunk(tp_size), up.chunk(tp_size), strict=True):
        assert torch.equal(shard, torch.cat([g, u]))
    assert_merges_back(shards, [gate, up], ShardLayout.GATED)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_fused_gated(tp_size):
    """One tensor, gate above up projection, is sharded as the two tensors are."""
    gate, up = random(8, HIDDEN), random(8, HIDDEN) + 9
    shards = shards_of([torch.cat([gate, up])], ShardLayout.FUSED_GATED, tp_size)
    expected = shards_of([gate, up], ShardLayout.GATED, tp_size)
    assert all(map(torch.equal, shards, expected))
    assert_merges_back(shards, [torch.cat([gate, up])], ShardLayout.FUSED_GATED)


@pytest.mark.parametrize("layout,dim", [(ShardLayout.COLUMN, 0), (ShardLayout.ROW, 1)])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_column_and_row(layout, dim, tp_size):
    source = random(8, 12)
    shards = shards_of([source], layout, tp_size)
    for shard, expected in zip(shards, source.chunk(tp_size, dim), strict=True):
        assert torch.equal(shard, expected)
    assert_merges_back(shards, [source], layout)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_replicated(tp_size):
    source = random(7)
    shards = shards_of([source], ShardLayout.REPLICATED, tp_size)
    assert all(torch.equal(shard, source) for shard in shards)
    assert_merges_back(shards, [source], ShardLayout.REPLICATED)


@pytest.mark.parametrize("tp_size,padded", [(1, 131), (1, 160), (2, 132), (4, 160), (4, 256)])
def test_vocabulary_padding_is_zero_and_dropped(tp_size, padded):
    source = random(131, HIDDEN)
    shards = shards_of([source], ShardLayout.VOCAB, tp_size, padded_vocab=padded)
    expected = torch.cat([source, torch.zeros(padded - 131, HIDDEN)])
    assert torch.equal(torch.cat(shards), expected)
    assert_merges_back(shards, [source], ShardLayout.VOCAB)


def test_casts_to_the_shard_dtype():
    source = random(8, 12)
    (shard,) = shards_of([source], ShardLayout.COLUMN, 1, dtype=torch.bfloat16)
    assert torch.equal(shard, source.to(torch.bfloat16))


def assert_merges_back(shards, sources, layout, query_groups=1):
    for step in (100, 3):  # whole shards, then three rows at a time
        outputs = [torch.full_like(source, float("nan")) for source in sources]
        for rank, shard in enumerate(shards):
            for row in range(0, len(shard), step):
                part, rows = shard[row : row + step], {"first_row": row, "local_rows": len(shard)}
                unshard_into(outputs, part, layout, rank, len(shards), query_groups, **rows)
        assert all(map(torch.equal, outputs, sources))


class CountedSlice:
    """A tensor with the interface of a safetensors slice. Counts the elements that are read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.read = tensor, 0

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, index):
        part = self.tensor[index]
        self.read += part.numel()
        return part


@pytest.mark.parametrize(
    "layout",
    [ShardLayout.QKV, ShardLayout.GATED, ShardLayout.COLUMN, ShardLayout.ROW, ShardLayout.VOCAB],
)
def test_each_rank_reads_only_its_own_part(layout):
    sources = {
        ShardLayout.QKV: qkv(4, 3, False),
        ShardLayout.GATED: [random(8, 4), random(8, 4)],
    }.get(layout, [random(8, 12)])
    shape = local_shape(layout, [s.shape for s in sources], 4)
    for rank in range(4):
        counted = [CountedSlice(source) for source in sources]
        shard_into(torch.empty(shape), counted, layout, rank, 4, 4)
        assert [c.read for c in counted] == [source.numel() // 4 for source in sources]


def test_indivisible_sizes_are_refused():
    with pytest.raises(InputError, match="gated weights of 6 features do not divide by 4"):
        local_shape(ShardLayout.GATED, [(6, 5), (6, 5)], 4)
    with pytest.raises(InputError, match="fused_gated weights of 6 features do not divide by 4"):
        local_shape(ShardLayout.FUSED_GATED, [(12, 5)], 4)
    with pytest.raises(InputError, match="row weights of 6 features do not divide by 4"):
        local_shape(ShardLayout.ROW, [(5, 6)], 4)


def test_a_rule_needs_as_many_tensors_as_its_layout():
    """Sharding a fused ``gate_up_proj`` as one tensor would mix gate and up rows at TP >= 2."""
    gate_up = (("mlp.gate_up_proj.weight", ("ffn", "hidden")),)
    qkv_proj = (("self_attn.qkv_proj.weight", ("query", "hidden")),)
    for layout, tensors in (
        (ShardLayout.GATED, gate_up),
        (ShardLayout.QKV, qkv_proj),
        (ShardLayout.ROW, gate_up * 2),
    ):
        with pytest.raises(ValueError, match=rf"a.weight: expected \d .*got {len(tensors)} \("):
            ParamRule(layout, ("a.weight",), tensors)
