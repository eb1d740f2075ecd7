"""``megatron-espo plan``: parameters, memory, pipeline and weight transfer, without a GPU."""
