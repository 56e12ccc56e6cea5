"""What vLLM cannot run of the BTLM family, told before anything is loaded."""

from typing import Any

from btlm.errors import NotSupported, TooLong
from btlm.model import BTLMConfig
from btlm.model.alibi import train_seq_len
from btlm.model.config_keys_btlm import QUANT_METHOD

# vLLM's other backends take the slopes and ignore them, or refuse them.
ALIBI_BACKENDS = frozenset(
    {"CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "ROCM_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"}
)


def check_config(config: BTLMConfig) -> None:
    """Check that vLLM runs a network and reads its weights.

    Raises:
        NotSupported: The interpolation is dynamic, or the weights are in the format of ``btlm quantize``.
    """
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") == QUANT_METHOD:
        raise NotSupported(
            f"The weights have {stored.get('bits')} bits in the format of `btlm quantize`, which vLLM does not read; "
            "serve the folder they were made from, or write a plain one: "
            "btlm.BTLMLMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    if train_seq_len(config.alibi_scaling) is not None:
        raise NotSupported(
            f"alibi_scaling is {config.alibi_scaling}: this interpolation changes with the length of the text, so "
            "cached keys and values become wrong, and vLLM keeps them; set a fixed one in config.json, for example "
            '{"type": "linear", "factor": 2.0}, or run the model with Transformers.'
        )


def check_backend(name: str) -> None:
    """Check that an attention backend of vLLM computes ALiBi.

    Args:
        name: Its name in vLLM.

    Raises:
        NotSupported: It does not, so that the model would run without positions.
    """
    if name not in ALIBI_BACKENDS:
        raise NotSupported(
            f"vLLM's attention backend {name} does not compute ALiBi; set the attention backend to FLASH_ATTN or "
            "TRITON_ATTN."
        )


class ConfigHook:
    """What vLLM calls with its configuration of a BTLM model."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse what :func:`check_config` refuses, and tell vLLM that the model uses ALiBi.

        Args:
            model_config: vLLM's ``ModelConfig``.

        Raises:
            NotSupported: vLLM cannot run the model.
            TooLong: The context is longer than the table of learned positions.
        """
        config = model_config.hf_config
        check_config(config)
        # vLLM reads this key. Without it, it may compute a shared prefix with a kernel that has no ALiBi.
        config.alibi = config.position_embedding_type == "alibi"
        if not config.alibi and model_config.max_model_len > config.n_positions:
            raise TooLong(
                f"max_model_len is {model_config.max_model_len:,}, but the learned positions end at "
                f"{config.n_positions:,}; set max_model_len to that or less."
            )

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Nothing to add to the rest of vLLM's configuration."""
