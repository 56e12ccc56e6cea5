from tests.checkpoint.fixtures import checkpoint, copy, torch_state

__all__ = ["checkpoint", "copy", "torch_state"]
