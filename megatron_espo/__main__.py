"""``python -m megatron_espo`` is the ``megatron-espo`` command."""

import sys

from megatron_espo.cli import main

if __name__ == "__main__":
    sys.exit(main())
