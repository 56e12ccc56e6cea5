"""`btlm info`: what a model is and what it costs, from its configuration alone."""

import json
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from btlm.checkpoint.adapter import num_adapter_weights, open_checkpoint
from btlm.checkpoint.locate import BUNDLED_MODEL, is_adapter
from btlm.checkpoint.weight_files import weight_files
from btlm.console import plain_messages, scaled
from btlm.model import BTLMConfig
from btlm.model.architecture_btlm import VECTOR, Architecture, MupRow
from btlm.train import load_recipe
from btlm.train.cost import num_adapter_parameters

# Context of three quarters of BTLM's training, and of the models that it is compared with.
SHORT_CONTEXT = 2048

_FORMATS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}  # bits per weight
# What is shown of an architecture, and its name there.
_ARCHITECTURE = {
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "head_dim": "head_dim",
    "feed_forward": "inner_dim",
    "activation": "activation_function",
    "vocabulary": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "positions": "n_positions",
    "position_embedding": "position_embedding_type",
    "alibi_scaling": "alibi_scaling",
}


def run_info(model: Path | str = BUNDLED_MODEL, *, as_json: bool = False, base: Path | str | None = None) -> None:
    """Print what :func:`model_info` knows to standard output, as tables or as JSON.

    Args:
        model: Folder of a checkpoint or of adapters, id on the Hugging Face Hub, or recipe (``.yaml``).
        as_json: Print one JSON object.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.

    Raises:
        ValueError: The model or the recipe cannot be read.
    """
    path = Path(model)
    is_recipe = path.suffix in {".yaml", ".yml"} and not path.is_dir()
    with plain_messages():
        recipe = load_recipe(path) if is_recipe else None
        config = open_checkpoint(model, base, weights=False).config() if recipe is None else recipe.config
    adapters = num_adapter_weights(path) if is_adapter(path) else None
    if recipe is not None and recipe.lora is not None:
        adapters = num_adapter_parameters(recipe, config)
    info = model_info(config, adapters)
    if path.is_dir() and adapters is None:
        with suppress(ValueError):  # a folder without weights
            info["weight_bytes"]["stored"] = sum(file.stat().st_size for file in weight_files(path))
            info["quantization"] = getattr(config, "quantization_config", None)
    if as_json:
        sys.stdout.write(json.dumps(info, indent=2) + "\n")
    else:
        name = path.resolve().name if path.exists() else str(model)
        Console().print(render(name, info))


def model_info(config: BTLMConfig, adapters: int | None = None) -> dict[str, Any]:
    """Shape, muP and cost of a model as plain numbers; nothing is allocated.

    Args:
        config: Configuration of the model.
        adapters: Number of parameters in low-rank adapters, which are trained instead of the weights; None without.

    Returns:
        ``architecture``; ``mup`` with the rows of :mod:`btlm.model.architecture_btlm`, where ``lr_multiplier`` is what
        the peak learning rate is multiplied by; ``parameters``; ``flops_per_token`` at two contexts; ``kv_cache_bytes``
        in bf16; and ``weight_bytes`` by format, where int8 and int4 leave out the scales of a quantized file. Of a
        folder, :func:`run_info` adds the bytes of its files as ``stored``, and their ``quantization``.
    """
    architecture = config.architecture
    positions, cached = architecture.n_positions, architecture.kv_bytes_per_token()
    flops = partial(architecture.flops_per_token, adapters=adapters)
    return {
        "architecture": {name: getattr(architecture, key) for name, key in _ARCHITECTURE.items()},
        "mup": {
            "width_scale": architecture.mup_width_scale,
            "embeddings_multiplier": architecture.mup_embeddings_scale,
            "scores_multiplier": architecture.attention_scale,
            "logits_multiplier": architecture.logits_scale,
            "tensors": _tensors(architecture),
        },
        "parameters": {
            "total": architecture.num_parameters(),
            "without_embeddings": architecture.num_parameters(embeddings=False),
            **({} if adapters is None else {"adapters": adapters}),
        },
        "flops_per_token": [
            {"context": context, "forward": flops(context), "training": flops(context, training=True)}
            for context in sorted({min(SHORT_CONTEXT, positions), positions})
        ],
        "kv_cache_bytes": {"per_token": cached, "at_n_positions": cached * positions},
        "weight_bytes": {name: architecture.weight_bytes(bits) for name, bits in _FORMATS.items()},
    }


def _tensors(architecture: Architecture) -> list[dict[str, Any]]:
    """The rows of the muP table that this model has tensors for, and the last parts of the names of their layers."""
    layers: dict[MupRow, list[str]] = {}
    for name, tensor in architecture.tensors.items():
        if tensor.row not in (None, VECTOR) and (layer := name.split(".")[-2]) not in layers.setdefault(tensor.row, []):
            layers[tensor.row].append(layer)
    layers[VECTOR] = ["biases", "norms"]
    return [
        {
            "layers": names,
            "init_std": architecture.init_std(row),
            "lr_multiplier": architecture.lr_multiplier(row),
            "weight_decay": row.decays,
        }
        for row, names in layers.items()
    ]


# Rendering

_NAMES = {"swiglu": "SwiGLU", "relu": "ReLU", "silu": "SiLU", "alibi": "ALiBi"}


def render(name: str, info: dict[str, Any]) -> Group:
    """Tables that fit 80 columns."""
    parameters = info["parameters"]
    counts = f"  {parameters['total']:,} parameters, {parameters['without_embeddings']:,} without embeddings"
    if "adapters" in parameters:
        counts += f", {parameters['adapters']:,} in adapters"
    tables = _architecture(info["architecture"]), _mup(info["mup"]), _compute(info["flops_per_token"]), _memory(info)
    return Group(Text(name, "bold cyan"), counts, *tables)


def _architecture(architecture: dict[str, Any]) -> Padding:
    positions = _NAMES.get(architecture["position_embedding"], architecture["position_embedding"])
    scaling = architecture["alibi_scaling"]
    if scaling is not None:
        factor = scaling.get("factor")
        positions += f", interpolated by {factor:g}" if factor else ", interpolated dynamically"
    table = _table("architecture", "")
    table.add_column()
    for key, remark in (
        ("layers", ""),
        ("width", ""),
        ("heads", f"of {architecture['head_dim']} dimensions"),
        ("feed_forward", _NAMES.get(architecture["activation"], architecture["activation"])),
        ("vocabulary", "tied to the head" if architecture["tied_embeddings"] else "the head has its own table"),
        ("positions", positions),
    ):
        table.add_row(key.replace("_", "-"), f"{architecture[key]:,}", remark)
    return _section(table)


def _mup(mup: dict[str, Any]) -> Padding:
    table = _table("muP", "initial std", "learning rate", "weight decay")
    for row in mup["tensors"]:
        lr, std = row["lr_multiplier"], row["init_std"]
        table.add_row(
            ", ".join(row["layers"]),
            f"{std:.4g}" if std else "0, 1",
            "peak" if lr == 1 else f"{lr:.4g} x peak",
            "yes" if row["weight_decay"] else "no",
        )
    multipliers = ", ".join(f"{name} x {mup[f'{name}_multiplier']:.4g}" for name in ("embeddings", "scores", "logits"))
    return _section(table, f"forward pass: {multipliers}")


def _compute(rows: list[dict[str, Any]]) -> Padding:
    table = _table("FLOPs per token", "forward", "training")
    for row in rows:
        table.add_row(f"at context {row['context']:,}", scaled(row["forward"]), scaled(row["training"]))
    return _section(table)


def _memory(info: dict[str, Any]) -> Padding:
    weights, cache = info["weight_bytes"], info["kv_cache_bytes"]
    table = _table("memory", *_FORMATS)
    table.add_row("weights", *(f"{scaled(weights[name])}B" for name in _FORMATS))
    table.add_row("cache of one token", "", f"{scaled(cache['per_token'])}B")
    table.add_row(f"cache of {info['architecture']['positions']:,}", "", f"{scaled(cache['at_n_positions'])}B")
    remarks = ["int8 and int4 leave out the scales of quantized weights"]
    if "stored" in weights:
        few = info["quantization"]
        form = f" (blocks in {few['bits']} bits, table in {few['table_bits']}, scales)" if few else ""
        remarks.append(f"files of the weights: {scaled(weights['stored'])}B{form}")
    return _section(table, *remarks)


def _table(title: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(Text(title, "bold"), width=22)
    for name in numbers:
        table.add_column(name, justify="right", width=13)
    return table


def _section(*parts: RenderableType) -> Padding:
    return Padding(Group(*parts), (1, 0, 0, 2), expand=False)
