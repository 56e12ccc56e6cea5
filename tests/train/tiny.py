"""A run that takes a second: shards of random tokens, and a recipe of two stages with all features."""

from pathlib import Path
from typing import Any

import numpy as np

from btlm.data.shards import TokenShards
from btlm.train.recipe import Checkpoints, Evaluation, Optimizer, Recipe, Schedule, Stage, Watching
from tests.data.tiny import write_streams

VOCAB_SIZE = 200
# Bytes of text per token of an imaginary vocabulary; the last token is end-of-text.
TOKEN_BYTES = np.array([*(np.arange(VOCAB_SIZE - 1) % 7 + 1), 0])

MODEL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 44,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "mup_width_scale": 0.5,
    "mup_embeddings_scale": 3.0,
    "mup_output_alpha": 1.2,
    "mup_scale_qk_dot_by_d": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_recipe(model: dict[str, Any] | None = None, **overrides: Any) -> Recipe:
    """Four steps of four rows, then three steps of two rows twice as long, each in two passes."""
    values: dict[str, Any] = {
        "model": MODEL | (model or {}),
        "optimizer": Optimizer(lr=0.02, clip_norm=0.5),
        "schedule": Schedule(warmup_tokens=128, final_lr_ratio=0.1),
        "stages": [Stage(16, 64, 256), Stage(32, 64, 192)],
        "micro_batch_tokens": 32,
        "seed": 5,
        "evaluation": Evaluation(every_tokens=192, tokens_per_source=100),
        "checkpoints": Checkpoints(every_steps=2),
        "watching": Watching(tensorboard=False),
    }
    return Recipe(**values | overrides)


def tiny_shards(folder: Path) -> TokenShards:
    """Shards of two sources, in which smaller token ids are more frequent, so that there is something to learn."""
    rng = np.random.default_rng(0)

    def stream(size: int) -> Any:
        return np.minimum(rng.geometric(0.03, size) - 1, VOCAB_SIZE - 1)

    return write_streams(folder, {"books": (stream(2000), stream(150)), "code": (stream(1000), stream(70))})
