"""The network. Imports torch and Transformers and nothing else of btlm, so that its files can travel with a checkpoint."""

from .configuration_btlm import BTLMConfig
from .modeling_btlm import BTLMLMHeadModel, BTLMModel

__all__ = ["BTLMConfig", "BTLMLMHeadModel", "BTLMModel"]
