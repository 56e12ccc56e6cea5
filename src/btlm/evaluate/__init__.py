"""A checkpoint to results: loss on held-out text, memory and speed."""
