"""The plug-in that lets vLLM serve checkpoints of BTLM.

vLLM finds it by the entry point group ``vllm.general_plugins`` and calls :func:`register` in each of its processes.
Nothing else imports these files, and only they import vLLM.
"""

from btlm.model.config_keys_btlm import MODEL_TYPE

__all__ = ["register"]

_ARCHITECTURE = "BTLMLMHeadModel"


def register() -> None:
    """Register the configuration and the network with Transformers and vLLM; calling it again changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from btlm.model import BTLMConfig

    from .limits import ConfigHook

    AutoConfig.register(MODEL_TYPE, BTLMConfig, exist_ok=True)
    # vLLM calls the hook in the process that the user sees, before it starts others.
    MODELS_CONFIG_MAP[_ARCHITECTURE] = ConfigHook
    # By name: vLLM imports the network only in the processes that compute with it.
    ModelRegistry.register_model(_ARCHITECTURE, f"{__name__}.network:BTLMForVLLM")
