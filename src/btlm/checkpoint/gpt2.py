"""GPT-2's checkpoints as networks of BTLM, whose layout is GPT-2's: the names of the tensors are the same."""

from collections.abc import Mapping
from typing import Any

from btlm.model.config_keys_btlm import MODEL_TYPE, MUP_KEYS, OLDER_KEYS

GPT2_MODEL_TYPE = "gpt2"


def config_of_gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of BTLM for the same network.

    Keys that both have, and their defaults, mean the same. Of GPT-2's own, ``reorder_and_upcast_attn`` changes only
    roundings, and the ``summary_*`` keys belong to another head.

    Args:
        config: A ``config.json`` with the model_type ``gpt2``, of Cerebras-GPT for example.

    Raises:
        ValueError: BTLM has no such network.
    """
    if config.get("add_cross_attention"):
        raise ValueError("add_cross_attention is true; a decoder that reads an encoder is not a network of BTLM.")
    if other := [key for key in (*MUP_KEYS, *OLDER_KEYS, "alibi_scaling") if config.get(key) is not None]:
        raise ValueError(
            f"GPT-2 has no {', '.join(other)}; if the model was trained with that, its model_type is {MODEL_TYPE!r}: "
            "change it in config.json."
        )
    if (positions := config.get("position_embedding_type", "learned")) not in ("learned", "absolute"):
        raise ValueError(
            f"position_embedding_type is {positions!r}, and GPT-2's are learned; if that is right, set the model_type "
            f"{MODEL_TYPE!r} in config.json."
        )
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    standard: dict[str, Any] = {"mup_width_scale": 1.0, "mup_embeddings_scale": 1.0, "mup_output_alpha": 1.0}
    return {
        **kept,
        **standard,
        "mup_scale_qk_dot_by_d": False,
        "model_type": MODEL_TYPE,
        "architectures": ["BTLMLMHeadModel"],
        "position_embedding_type": "learned",
    }
