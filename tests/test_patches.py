"""The patches of Megatron-Core and torch are still needed by the installed releases."""

import importlib
import inspect

import pytest

from megatron_espo.distributed import cpu

cpu.install()
from megatron_espo.megatron import patches

CHECKPOINTS = "megatron.core.dist_checkpointing.strategies.filesystem_async"
OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
# A patch is needed while the module's source contains this text.
SOURCES = {
    "keep_checkpoint_results_in_process": (CHECKPOINTS, "ctx.Manager().Queue()"),
    "prepare_adam_for_loading": (OPTIMIZER, "dst_tensors[key].copy_(tensors[key])"),
    "keep_configured_settings": (OPTIMIZER, "**param_groups_map[needed_groups]"),
    "separate_adam_steps": (OPTIMIZER, 's["step"] = step\n'),
    "save_optimizer_shards": (OPTIMIZER, "return_on_all_ranks=return_on_all_ranks or is_lo"),
    "fake_process_groups": ("megatron.core.parallel_state", 'backend="gloo"'),
}


@pytest.mark.parametrize("name", SOURCES)
def test_patch_is_still_needed(name):
    module, source = SOURCES[name]
    assert hasattr(patches, name)
    text = inspect.getsource(importlib.import_module(module))
    assert source in text, f"delete {name}: {module} no longer has {source!r}"
