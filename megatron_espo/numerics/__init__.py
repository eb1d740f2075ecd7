"""Vocabulary-parallel log-prob and entropy. Imports torch, and Triton where a call uses it."""

from megatron_espo.numerics.head import linear_logprob_entropy
from megatron_espo.numerics.logits import vocab_parallel_logprob_entropy
from megatron_espo.numerics.plan import plan_head
