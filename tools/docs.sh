#!/usr/bin/env bash
# Writes the generated page and builds docs/ as a site in build/site; a dead link or a page that does not parse fails.
# Needs the extra `docs` (pip install -e ".[docs]"). Arguments go to mkdocs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -c 'from megatron_espo.config.reference import render_markdown; print(render_markdown(), end="")' >docs/configuration.md
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict "$@"
