"""A rank that does not come is named, on every other rank, in time."""

from tests.distributed import run_ranks


def test_a_late_rank_is_named_by_all_others():
    for message, seconds in run_ranks(3, "tests.ranks.lockstep:lose", rank=1):
        assert message.startswith("rank 1 ended, or did not come within ") and message.endswith(" s, for the test")
        assert 2 <= seconds < 4
