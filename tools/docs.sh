#!/usr/bin/env bash
# Writes docs/configuration.md, and builds the site of docs/ in build/site.
# A dead link is an error.
# Needs the extra `docs` (pip install -e ".[docs]"). Arguments go to mkdocs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHONPATH=. python tools/configuration_page.py >docs/configuration.md
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict "$@"
