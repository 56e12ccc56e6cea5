"""Evaluates checkpoints: loss on held-out text, memory and speed."""
