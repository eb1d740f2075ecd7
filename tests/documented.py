"""Which metrics ``docs/metrics.md`` lists."""

import re

from megatron_espo.metric_names import METRICS, as_pattern


def is_documented(metric: str) -> bool:
    return any(re.match(as_pattern(name), metric) for names in METRICS.values() for name in names)
