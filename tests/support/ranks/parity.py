"""Ranks of tests/test_parity.py: compare a layout with a reference that the test has changed."""

import sys

from megatron_espo import cli
from megatron_espo.tools.parity import command


def compare(folder: str, layout: str) -> None:
    """Compare with the reference in ``folder``, and exit with the command's code."""
    args = cli.build_parser().parse_args(["parity", "--short", "--folder", folder])
    sys.exit(command.run_ranks(args, [layout], records=False))
