"""A run's summary and learning curve, and the page of ``megatron-espo report``."""

from megatron_espo.monitoring.report.charts import draw_learning_curve
from megatron_espo.monitoring.report.runs import write_summary
