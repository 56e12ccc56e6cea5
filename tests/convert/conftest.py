from tests.checkpoint.fixtures import checkpoint, copy, torch_state
from tests.convert.runs import one_thread, text

__all__ = ["checkpoint", "copy", "one_thread", "text", "torch_state"]
