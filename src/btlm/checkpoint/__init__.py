"""A name or folder to an open checkpoint. What needs torch loads when it is first used: the engine runs without."""

from typing import TYPE_CHECKING

from btlm import lazy

from .locate import BUNDLED_MODEL
from .open import Checkpoint

if TYPE_CHECKING:
    from .to_transformers import load_config, load_model

__all__ = ["BUNDLED_MODEL", "Checkpoint", "load_config", "load_model"]

__getattr__, __dir__ = lazy.names(__name__, {"load_config": ".to_transformers", "load_model": ".to_transformers"})
