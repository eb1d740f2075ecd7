"""The weight stream over several nodes: exact tensors, and the bytes of ``megatron-espo plan``."""

from collections import Counter

import pytest

from megatron_espo.weights.exchange import Routes
from tests.support.distributed import run_ranks
from tests.support.plan_models import plan_command, sizes
from tests.support.weights_models import load_spec, save_model

PP2, PP4 = sizes(pipeline_model=2), sizes(pipeline_model=4)
TP2_PP2, TP2_PP4 = PP2 | sizes(tensor_model=2), PP4 | sizes(tensor_model=2)
EP2_PP2 = PP2 | sizes(expert_model=2)
# Family, ranks, and (layout, ranks of a node). The ranks that are left over are replicas.
CASES = {
    "dense": ("llama", 4, [(TP2_PP2, 2), (PP2, 2), (PP4, 2), (PP4, 4), (TP2_PP2, 4), (PP4, 1)]),
    "experts": ("qwen3_moe", 4, [(EP2_PP2, 2), (PP2, 2)]),
    # Two replicas, or two stages of two ranks, share a node.
    "eight": ("llama", 8, [(TP2_PP2, 4), (TP2_PP2, 2), (TP2_PP4, 4)]),
}


@pytest.mark.parametrize(
    "case", ["dense", "experts", pytest.param("eight", marks=pytest.mark.slow)]
)
def test_every_rank_gets_the_exact_weights_with_the_bytes_of_the_plan(tmp_path, case):
    family, ranks, layouts = CASES[case]
    save_model(family, tmp_path)
    target = "tests.support.ranks.weights:node_streams"
    measured = run_ranks(ranks, target, folder=str(tmp_path), layouts=layouts)
    for (layout, node), received in zip(layouts, measured, strict=True):
        _, text, plan = plan_command(
            tmp_path,
            load_spec(tmp_path).hf_config,
            *("--gpus", str(ranks), "--gpus-per-node", str(node)),
            model={"dtype": "float32"},
            megatron=layout,
            rollout={"transport": "ipc", "max_response_tokens": 8},
        )
        assert plan, text
        transfer, size = plan["transfer"], ranks // layout["pipeline_model_parallel_size"]
        assert received == [transfer["received"][rank // size] for rank in range(ranks)]
        # The network brings a node what it lacks, once. Parts are padded to equal sizes.
        for first in range(0, ranks, node):
            own = {rank // size for rank in range(first, first + node)}
            lacks = sum(bytes_ for stage, bytes_ in transfer["groups"] if stage not in own)
            network = sum(over_network for over_network, _ in received[first : first + node])
            assert lacks <= network <= 1.01 * lacks, (layout, node)


@pytest.mark.parametrize("ranks, stage, node", [(64, 16, 8), (64, 8, 8), (32, 2, 8), (8, 4, 4)])
def test_each_node_gets_each_part_over_the_network_once(ranks, stage, node):
    routes = Routes.of([rank // node for rank in range(ranks)], stage)
    assert routes.use_network
    for size in (1, 2):
        parts = routes.parts(size)
        for owner in range(ranks // stage):
            for first in range(0, ranks, node):
                got = Counter()
                for rank in range(first, first + node):
                    source = routes.rail(rank)[routes.source(owner)]
                    assert routes.is_source(source, owner) and source % node == rank % node
                    got[rank % size, rank % node // size] += 1
                assert got == {(s, part): 1 for s in range(size) for part in range(parts)}


@pytest.mark.parametrize(
    "nodes, stage",
    [("aaaa", 2), ("aaabbb", 2), ("aabbab", 2), ("aabbb", 1), ("abab", 2), ("aabb", 4)],
)
def test_uneven_nodes_use_megatrons_groups(nodes, stage):
    assert not Routes.of(nodes, stage).use_network
