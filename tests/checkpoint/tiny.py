"""A very small checkpoint. It has one token per byte, so that characters beyond ASCII take several tokens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import GPT2Tokenizer

from btlm.model import BTLMConfig, BTLMLMHeadModel

END = 256
TINY: dict[str, Any] = {
    "vocab_size": 257,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 36,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.4,
    "mup_width_scale": 0.5,
    "mup_embeddings_scale": 0.3,
    "mup_output_alpha": 1.2,
    "mup_scale_qk_dot_by_d": True,
    "bos_token_id": END,
    "eos_token_id": END,
}


def tiny_model(**overrides: Any) -> BTLMLMHeadModel:
    """A model whose weights depend only on its configuration."""
    torch.manual_seed(0)
    model = BTLMLMHeadModel(BTLMConfig(**{**TINY, **overrides}))
    model.eval()
    return model


def byte_tokenizer() -> GPT2Tokenizer:
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    end = "<|endoftext|>"
    return GPT2Tokenizer(vocab={**vocabulary, end: END}, merges=[], bos_token=end, eos_token=end, unk_token=end)


def save_tiny(folder: Path, **overrides: Any) -> Path:
    tiny_model(**overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# Ways to damage a checkpoint


def set_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json; a value of ``...`` removes the key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    # Copy the tensors, since they are mapped from the file that is overwritten.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(dict(change(tensors)), path, metadata={"format": "pt"})


def pickle_tensors(folder: Path, **options: Any) -> Path:
    """Replace the safetensors file by a pickle of the same tensors."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


def cut(path: Path, keep: float) -> None:
    """Truncate a file to a share ``keep`` of its size."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
