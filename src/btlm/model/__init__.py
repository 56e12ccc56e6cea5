"""The network. Imports torch, Transformers and nothing else of btlm, so that its files can travel in a checkpoint."""

from .configuration_btlm import BTLMConfig
from .modeling_btlm import BTLMLMHeadModel, BTLMModel

__all__ = ["BTLMConfig", "BTLMLMHeadModel", "BTLMModel"]
