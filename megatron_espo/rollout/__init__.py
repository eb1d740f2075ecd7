"""Rollouts: vLLM's server as engine, environments that drive it, weights on their way into it.

Only ``vllm_plugin``, ``worker`` and what they import run inside vLLM's processes.
"""
