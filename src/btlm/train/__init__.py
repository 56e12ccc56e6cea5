"""Batches to a checkpoint."""

from .held_out import evaluate_held_out
from .loop import train
from .recipe import Recipe
from .recipe_file import load_recipe

__all__ = ["Recipe", "evaluate_held_out", "load_recipe", "train"]
