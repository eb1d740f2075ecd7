#!/usr/bin/env bash
# Writes docs/configuration.md and the table of docs/metrics.md, and builds the site of docs/ in build/site.
# A dead link is an error.
# Needs the extra `docs` (pip install -e ".[docs]"). Arguments go to mkdocs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHONPATH=. python tools/configuration_page.py >docs/configuration.md
text=$(sed '/^<!-- Generated/q' docs/metrics.md)
{ printf '%s\n\n' "$text"; python -m megatron_espo.monitoring.metric_names; } >docs/metrics.md
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict "$@"
