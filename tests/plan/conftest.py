from tests.checkpoint.fixtures import checkpoint, copy

__all__ = ["checkpoint", "copy"]
