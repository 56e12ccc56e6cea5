"""Batches to a checkpoint."""

from .loop import evaluate_bits_per_byte, train
from .recipe import Recipe, load_recipe

__all__ = ["Recipe", "evaluate_bits_per_byte", "load_recipe", "train"]
