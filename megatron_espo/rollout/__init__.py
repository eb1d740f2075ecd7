"""Rollout engines: one vLLM engine in a process of its own, here or on another machine, driven and synced by a trainer rank.

The only package that imports vllm, and only when a trainer connects to its engine (``make_trainer_transport``) or in
the child process.
"""

from megatron_espo.rollout.config import EngineConfig, engine_owners
from megatron_espo.rollout.engine import Engine
from megatron_espo.rollout.fleet import Fleet
from megatron_espo.rollout.lifecycle import EngineError
from megatron_espo.rollout.remote import dismiss
from megatron_espo.rollout.requests import Enough
from megatron_espo.rollout.transport import (
    engine_devices,
    make_trainer_transport,
    push_weights,
    register_transports,
    resolve_transport,
)

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineError",
    "Enough",
    "Fleet",
    "dismiss",
    "engine_devices",
    "engine_owners",
    "make_trainer_transport",
    "push_weights",
    "register_transports",
    "resolve_transport",
]
