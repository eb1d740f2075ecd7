"""Prompt sources, tokenizer, prompt stream, recorded rollouts and packing."""

from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
