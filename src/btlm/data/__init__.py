"""Turns documents into token shards, and token shards into batches."""

from .loader import Batch, TokenLoader
from .recipe import DataRecipe, Execution
from .shards import TokenShards

__all__ = ["Batch", "DataRecipe", "Execution", "TokenLoader", "TokenShards"]
