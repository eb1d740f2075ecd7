"""Everything that touches Megatron-Core: runtime, model, the forward step, the optimizer step, checkpoints."""
