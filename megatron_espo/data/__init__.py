"""Prompts in, prompt batches out: sources, tokenizer, and the resumable prompt stream."""

from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["PromptStream", "Tokenizer", "load_tokenizer"]
