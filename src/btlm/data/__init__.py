"""Documents to token shards to batches."""

from .documents import Document, read_documents
from .shards import TokenShards, write_shards

__all__ = ["Document", "TokenShards", "read_documents", "write_shards"]
