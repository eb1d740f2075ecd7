"""What is left of a run to look at: a summary and a picture at its end, and ``megatron-espo report``'s page."""

from megatron_espo.report.summary import draw_learning_curve, write_summary

__all__ = ["draw_learning_curve", "write_summary"]
