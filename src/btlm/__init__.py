"""BTLM-3B-8k: the open reference implementation. Importing it registers BTLM with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from btlm.model import BTLMConfig, BTLMLMHeadModel, BTLMModel

__version__ = "0.1.0"
__all__ = ["BTLMConfig", "BTLMLMHeadModel", "BTLMModel", "__version__"]

AutoConfig.register("btlm", BTLMConfig)
AutoModel.register(BTLMConfig, BTLMModel)
AutoModelForCausalLM.register(BTLMConfig, BTLMLMHeadModel)
