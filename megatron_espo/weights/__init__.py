"""Hugging Face weights into Megatron, and Megatron's weights to Hugging Face folders and vLLM."""
