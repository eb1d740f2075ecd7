"""Vocabulary-parallel log-prob and entropy. Imports torch only; Triton when a path asks for it; groups are arguments."""

from megatron_espo.numerics.logits import vocab_parallel_logprob_entropy

__all__ = ["vocab_parallel_logprob_entropy"]
