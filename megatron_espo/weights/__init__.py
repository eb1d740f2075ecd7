"""Megatron weights <-> Hugging Face: naming tables, loading, export, and the stream that feeds vLLM."""

from megatron_espo.weights.hf_io import load_hf_weights, save_hf
from megatron_espo.weights.source import MegatronWeightSource

__all__ = ["MegatronWeightSource", "load_hf_weights", "save_hf"]
