"""Whether ``docs/metrics.md`` lists a metric."""

import re

from megatron_espo.monitoring.metric_names import METRICS, as_pattern


def is_documented(metric: str) -> bool:
    return any(re.match(as_pattern(name), metric) for names in METRICS.values() for name in names)
