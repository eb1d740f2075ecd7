"""The monitored barrier names a late rank on every other rank, in time."""

from tests.support.distributed import run_ranks


def test_a_late_rank_is_named_on_all_others():
    for message, seconds in run_ranks(3, "tests.support.ranks.lockstep:lose", rank=1):
        assert message.startswith("rank 1 ended, or did not come within "), message
        assert message.endswith(" s, for the test"), message
        assert 2 <= seconds < 20
