"""Megatron-Core: model, training, checkpoints, offload."""
