"""What a run will need and move, before any GPU is taken: parameters, memory, pipeline and weight transfer."""
