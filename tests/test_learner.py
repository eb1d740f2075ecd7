"""What the learner reports of several optimizer steps."""

from megatron_espo.mcore import cpu

cpu.install()

from megatron_espo.mcore.learner import average  # noqa: E402


def test_average_keeps_extremes():
    found = average([{"a": 1.0, "gap_max": 3.0, "ratio_min": 0.5}, {"a": 3.0, "gap_max": 1.0, "ratio_min": 0.7, "b": 2.0}])
    assert found == {"a": 2.0, "gap_max": 3.0, "ratio_min": 0.5, "b": 2.0}
