"""Hugging Face weights into Megatron, and Megatron's weights to Hugging Face folders and vLLM."""

from megatron_espo.weights.hf_io import load_hf_weights, save_hf
from megatron_espo.weights.source import WeightGatherer
