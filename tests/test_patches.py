"""The patches of Megatron-Core and torch are still needed by the installed releases."""

import pytest

from megatron_espo.distributed import cpu

cpu.install()
from megatron_espo.megatron.patches import PATCHES


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_patch_is_still_needed(patch):
    assert patch.is_needed(), f"delete {patch.name}: {patch.module} no longer has {patch.source!r}"
