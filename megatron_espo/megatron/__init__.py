"""Megatron-Core: model, training, checkpoints, offload."""

from megatron.core import __version__ as _megatron

from megatron_espo.errors import InputError

if tuple(map(int, _megatron.split(".")[:2])) < (0, 19):
    raise InputError(
        f"megatron-core: expected 0.19 or newer, got {_megatron}; install 'megatron-core>=0.19' "
        "(Python 3.12), or run tools/env.sh"
    )
