"""`btlm train --plan`: what a recipe needs, from its numbers alone: steps, FLOPs, memory a device and days."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from btlm.model import BTLMConfig

from .loss import CHUNK_TOKENS
from .recipe import Recipe
from .recipe_file import load_recipe

# Assumptions, and printed as such. The peak is that of dense bf16 products on an NVIDIA H100 SXM (NVIDIA's data sheet:
# 1,979 TFLOP/s with sparsity, half of it without).
MFU = 0.4
PEAK_TFLOPS = 989.0

# More shards are worth a row while doubling them frees at least this part of the memory.
_WORTH_A_ROW = 0.05
_FP32 = 4


def run_plan(
    recipe_path: Path | str,
    mfu: float = MFU,
    peak_tflops: float = PEAK_TFLOPS,
    devices: Sequence[int] | None = None,
    changes: dict[str, Any] | None = None,
) -> None:
    """Print what :func:`plan` knows of a recipe to standard output; the arguments that it shares are described there.

    Args:
        recipe_path: YAML file.
        mfu: Expected part of the peak.
        peak_tflops: Of one device.
        devices: Numbers of devices.
        changes: Values to set on top of the file, as for :func:`btlm.train.load_recipe`.

    Raises:
        ValueError: The recipe cannot be read, or an argument cannot be.
    """
    recipe = load_recipe(recipe_path, changes)
    Console().print(render(Path(recipe_path).name, plan(recipe, mfu, peak_tflops, devices)))


def plan(
    recipe: Recipe,
    mfu: float = MFU,
    peak_tflops: float = PEAK_TFLOPS,
    devices: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What a run needs, as plain numbers; nothing is allocated, and of ``start.model`` only its configuration is read.

    FLOPs are those that training needs: recomputation by activation checkpointing is not among them, as in the
    definition of MFU (model FLOPs utilization; PaLM, arXiv 2204.02311, appendix B). With ``lora``, frozen matrices
    need no gradient: they take two thirds of their share.

    Args:
        recipe: The run.
        mfu: Part of the peak that is expected to go into those FLOPs, in (0, 1].
        peak_tflops: Of one device in the dtype of the recipe, TFLOP/s.
        devices: Numbers of devices to expect days for; by default those that can share the batches, each at least
            twice the one before.

    Returns:
        - ``dtype``, ``replicas``, ``checkpointing``, ``compiled``: of the recipe.
        - ``parameters``: ``total`` and ``without_embeddings`` as :meth:`btlm.BTLMConfig.num_parameters` counts them,
          ``adapters`` (0 without LoRA), and ``trained``, those that get gradients.
        - ``stages``: for each its ``sequence_length``, ``batch_tokens``, ``steps``, ``tokens``, and its FLOPs
          ``flops_by_parameters`` and ``flops``, see below.
        - ``steps``, ``tokens``: of all stages, whole steps only.
        - ``flops_by_parameters``: 6 a parameter and token; 4 a frozen one.
        - ``flops``: of matrices, head and causal attention (:meth:`btlm.BTLMConfig.flops_per_token`).
        - ``micro_batch_tokens``: tokens of a forward pass of one device.
        - ``memory``: rows of :func:`memory_per_device` for 1, 2, 4, ... ``shards``, until more make little difference
          or a step has too few rows.
        - ``mfu``, ``peak_tflops``: the assumptions behind
        - ``days``: rows of ``devices``, ``shards`` (devices that one copy of the state is cut over), ``micro_batches``
          (of each device in a step, the most of any stage), ``micro_batch_tokens`` (less than the recipe's where a
          device gets less), ``memory`` (bytes a device), and ``days``.

    Raises:
        ValueError: ``mfu``, ``peak_tflops`` or ``devices`` cannot be, replicas cannot share the batches, or ``lora``
            has other targets than matrices of the blocks.
    """
    config, replicas = recipe.config, recipe.parallelism.replicate
    _raise_problems(recipe, config, mfu, peak_tflops, devices)
    total, adapters = config.num_parameters(), num_adapter_parameters(recipe, config)
    stages = []
    for stage in recipe.stages:
        tokens = stage.steps * stage.batch_tokens
        forward = config.flops_per_token(stage.sequence_length)
        attention = config.n_layer * 4 * config.n_embd * (stage.sequence_length + 1) / 2
        # Backward through attention takes twice its forward pass whatever is trained.
        per_token = 3 * forward if recipe.lora is None else 2 * forward + attention + 6 * adapters
        per_parameter = 6 * total if recipe.lora is None else 4 * total + 6 * adapters
        stages.append(
            {
                "sequence_length": stage.sequence_length,
                "batch_tokens": stage.batch_tokens,
                "steps": stage.steps,
                "tokens": tokens,
                "flops_by_parameters": float(per_parameter * tokens),
                "flops": per_token * tokens,
            }
        )
    flops = sum(stage["flops"] for stage in stages)
    memory = [memory_per_device(recipe, 1, config)]
    while (shards := 2 * memory[-1]["shards"]) * replicas <= _rows(recipe):
        row = memory_per_device(recipe, shards, config)
        if row["total"] > (1 - _WORTH_A_ROW) * memory[-1]["total"]:
            break
        memory.append(row)
    days = []
    for count in devices if devices is not None else _device_counts(recipe):
        most = max(stage.batch_tokens // count for stage in recipe.stages)
        at_once = min(most, recipe.micro_batch_tokens)
        row = memory_per_device(recipe, count // replicas, config, at_once)
        days.append(
            {
                "devices": count,
                "shards": count // replicas,
                "micro_batches": math.ceil(most / at_once),
                "micro_batch_tokens": at_once,
                "memory": row["total"],
                "days": flops / (count * peak_tflops * 1e12 * mfu * 86_400),
            }
        )
    return {
        "dtype": recipe.precision.dtype,
        "replicas": replicas,
        "checkpointing": recipe.precision.activation_checkpointing,
        "compiled": recipe.precision.compile,
        "parameters": {
            "total": total,
            "without_embeddings": config.num_parameters(embeddings=False),
            "adapters": adapters,
            "trained": total if recipe.lora is None else adapters,
        },
        "stages": stages,
        "steps": recipe.total_steps,
        "tokens": recipe.total_tokens,
        "flops_by_parameters": sum(stage["flops_by_parameters"] for stage in stages),
        "flops": flops,
        "micro_batch_tokens": recipe.micro_batch_tokens,
        "memory": memory,
        "mfu": mfu,
        "peak_tflops": peak_tflops,
        "days": days,
    }


# Memory


def memory_per_device(
    recipe: Recipe, shards: int, config: BTLMConfig | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """Bytes of one device by what they are for, at the moment of a step when they are most.

    Not counted: the CUDA context, buffers of NCCL, what the allocator loses to fragments, and what compilation saves.

    Args:
        recipe: The run.
        shards: Devices that one copy of the state is cut over; 1 is a single process, without FSDP.
        config: Of the model, where it is at hand.
        tokens: Of a forward pass; the recipe's micro-batch by default.

    Returns:
        - ``shards``: as given.
        - ``moment``: ``forward`` (of the last block), ``loss``, or ``backward`` (of a block).
        - ``weights``: fp32, over the shards; with LoRA the frozen ones and the adapters.
        - ``gradients``: fp32, over the shards; with LoRA those of the adapters.
        - ``optimizer``: both moments of AdamW in fp32, for what has gradients, over the shards.
        - ``gathered``: weights in use, and gradients that are not reduced yet; see :func:`_gathered_bytes`.
        - ``activations``: of one forward pass in the graph, :func:`block_bytes_per_token` for each block; with
          checkpointing the fp32 input of every block, and all of one block. Then the final norm, masks of documents,
          and gradients within a block.
        - ``head``: buffers of :mod:`btlm.train.loss`, in its forward or backward pass, whichever are more.
        - ``total``.
    """
    config = config or recipe.config
    tokens = tokens or recipe.micro_batch_tokens
    adapters = num_adapter_parameters(recipe, config)
    parameters = config.num_parameters()
    trained = parameters if recipe.lora is None else adapters
    state = {
        "weights": math.ceil(_FP32 * (parameters + adapters) / shards),
        "gradients": math.ceil(_FP32 * trained / shards),
        "optimizer": math.ceil(2 * _FP32 * trained / shards),
    }
    gathered = _gathered_bytes(recipe, config, shards)
    activations = _activation_bytes(recipe, config, tokens)
    head = {"forward": 0, "loss": _head_bytes(recipe, config, shards, tokens), "backward": 0}
    moment = max(head, key=lambda moment: gathered[moment] + activations[moment] + head[moment])
    parts = {
        **state,
        "gathered": gathered[moment],
        "activations": activations[moment],
        "head": head[moment],
    }
    return {"shards": shards, "moment": moment, **parts, "total": sum(parts.values())}


def _gathered_bytes(recipe: Recipe, config: BTLMConfig, shards: int) -> dict[str, int]:
    """Bytes at each moment of weights as they are used, and of gradients before they are reduced.

    FSDP2 (``torch.distributed.fsdp.fully_shard``, and ``foreach_reduce`` behind it) keeps what is outside the blocks
    gathered during forward and backward, with its gradient. It gathers the blocks one by one, fetching one ahead; the
    gradient of a block is copied to fp32 to be reduced. All else is in ``gather_dtype``.

    Products in bf16 of fp32 weights add a bf16 copy. Autocast keeps those of all trained weights until the forward pass
    ends, also under checkpointing; the graph keeps those of the blocks that it holds.
    """
    layers, size, lora = config.n_layer, _weight_bytes(recipe, shards), recipe.lora
    adapters = num_adapter_parameters(recipe, config) // layers
    matrices = sum(rows * columns + columns for rows, columns in block_matrices(config).values())
    block = matrices + 4 * config.n_embd
    outside = config.num_parameters() - layers * block

    one_block = _product_bytes(recipe) * matrices if _product_bytes(recipe) < size else 0
    checkpointing = recipe.precision.activation_checkpointing
    copies = {
        "forward": one_block * (1 if checkpointing and lora is not None else layers),
        "loss": one_block * (0 if checkpointing else layers),
        "backward": one_block * (1 if checkpointing else layers),
    }
    if shards == 1:
        return copies
    trained_block, trained_outside = (block, outside) if lora is None else (adapters, 0)
    blocks = 2 * size * (block + adapters)
    reduced = max(blocks + (size + _FP32) * trained_block, _FP32 * trained_outside)
    return {
        "forward": size * outside + blocks + copies["forward"],
        "loss": size * outside + copies["loss"],
        "backward": size * (outside + trained_outside) + reduced + copies["backward"],
    }


def _activation_bytes(recipe: Recipe, config: BTLMConfig, tokens: int) -> dict[str, int]:
    """Bytes of activations at each moment of a forward and backward pass, those of the head apart."""
    width, size, layers = config.n_embd, _product_bytes(recipe), config.n_layer
    block = block_bytes_per_token(recipe, config)
    final_norm = _FP32 * width + 2 * _FP32
    # With checkpointing, the input of the block that is run again is among those that are kept.
    graph, again = layers * block, 0
    if recipe.precision.activation_checkpointing:
        graph, again = layers * _FP32 * width, block - _FP32 * width
    graph += width if config.embd_pdrop else 0
    graph += 2 * _longest(recipe) if recipe.data.mask_documents else 0  # of documents; of documents and causality
    # Of the residual stream, of the output of the feed-forward layer, and of what its activation takes and gives.
    gradients = _FP32 * width + size * width + 2 * size * config.inner_dim
    return {
        "forward": tokens * (graph + again),
        "loss": tokens * (graph + final_norm),
        "backward": tokens * (graph + again + gradients),
    }


def block_bytes_per_token(recipe: Recipe, config: BTLMConfig) -> int:
    """Bytes a token that the graph of one block keeps for the backward pass, its input among them.

    Read off :class:`btlm.model.modeling_btlm.BTLMBlock` under autocast, and measured in ``tests/train/test_plan.py``:
    each norm keeps its fp32 input and two statistics; each trained or adapted matrix its input in the dtype of
    products, cast anew for each; attention its queries, keys, values and output, which ALiBi makes wider, and one sum a
    head in fp32; the feed-forward layer what its activation is computed from. ``gelu_new`` is counted as on a CPU;
    autocast on a GPU runs its power in fp32. Dropout keeps a mask of one byte a value. ``mask_documents`` keeps a mask
    in the dtype of products.
    """
    width, inner, heads = config.n_embd, config.inner_dim, config.n_head
    size, lora = _product_bytes(recipe), recipe.lora
    alibi = config.position_embedding_type == "alibi"
    # Features of btlm.model.alibi.fold_attention_bias, and head dimensions rounded up to a multiple of 8.
    features = 8 if _longest(recipe) <= 2**16 else 10
    attended = heads * math.ceil((config.head_dim + features) / 8) * 8 if alibi else width
    kept = 2 * (_FP32 * width + 2 * _FP32) + 4 * size * attended + _FP32 * heads
    kept += size * inner * {"swiglu": 3, "gelu_new": 4}.get(config.activation_function, 1)
    kept += 2 * width if config.resid_pdrop else 0
    kept += size * _longest(recipe) if recipe.data.mask_documents else 0

    matrices = block_matrices(config)
    used = list(matrices) if lora is None else _adapted(recipe, config)
    # An input that is kept already: fp32 products read what the norm wrote, and some layers what the one before keeps.
    # Adapters cast theirs twice, to fp32 and back, or drop some of it: a copy of its own.
    kept_already = set()
    if lora is None or (size == _FP32 and not lora.dropout):
        kept_already |= {"mlp.c_fc2"} if size == _FP32 and "mlp.c_fc" in used else set()
        kept_already |= set() if alibi else {"attn.c_proj"}
        kept_already |= {"mlp.c_proj"} if config.activation_function == "relu" else set()
    kept += sum(size * matrices[name][0] for name in used if name not in kept_already)
    if lora is not None:
        kept += sum(size * lora.rank + (matrices[name][0] if lora.dropout else 0) for name in used)
    return kept


def block_matrices(config: BTLMConfig) -> dict[str, tuple[int, int]]:
    """Input and output width of every matrix of a block, by its name."""
    width, inner = config.n_embd, config.inner_dim
    return {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        **({"mlp.c_fc2": (width, inner)} if config.activation_function == "swiglu" else {}),
        "mlp.c_proj": (inner, width),
    }


def num_adapter_parameters(recipe: Recipe, config: BTLMConfig) -> int:
    """Parameters of the adapters: ``rank * (in + out)`` for each adapted matrix (arXiv 2106.09685); 0 without LoRA."""
    if recipe.lora is None:
        return 0
    matrices = block_matrices(config)
    return config.n_layer * sum(recipe.lora.rank * sum(matrices[name]) for name in _adapted(recipe, config))


def _adapted(recipe: Recipe, config: BTLMConfig) -> list[str]:
    """The matrices of a block that have adapters."""
    assert recipe.lora is not None
    targets = recipe.lora.target_modules
    return [name for name in block_matrices(config) if any(_names(target, name) for target in targets)]


def _names(target: str, name: str) -> bool:
    """Whether PEFT takes a target for this module: it names its last parts."""
    return f".{name}".endswith(f".{target}")


def _head_bytes(recipe: Recipe, config: BTLMConfig, shards: int, tokens: int) -> int:
    size, weight = _product_bytes(recipe), _weight_bytes(recipe, shards)
    head = config.vocab_size * config.n_embd
    chunk = min(CHUNK_TOKENS, tokens) * config.vocab_size
    # Logits, their probabilities, and an fp32 copy of bf16 logits; the gradient of the head and that of a chunk, and a
    # copy of the head in the dtype of products.
    forward = chunk * (size + _FP32 + (_FP32 if size != _FP32 else 0))
    forward += head * (_FP32 + size + (size if size != weight else 0))
    # The gradient before and after it is scaled, and in the dtype of the weight.
    backward = head * (2 * _FP32 + (weight if weight != _FP32 else 0))
    hidden = 2 * size * tokens * config.n_embd
    return max(forward, backward) + hidden


def _weight_bytes(recipe: Recipe, shards: int) -> int:
    """Bytes of a weight as modules see it; nothing is gathered for a single process."""
    return 2 if shards > 1 and recipe.parallelism.gather_dtype == "bfloat16" else _FP32


def _product_bytes(recipe: Recipe) -> int:
    return 2 if recipe.precision.dtype == "bfloat16" else _FP32


def _longest(recipe: Recipe) -> int:
    return max(stage.sequence_length for stage in recipe.stages)


# Devices


def _raise_problems(
    recipe: Recipe, config: BTLMConfig, mfu: float, peak_tflops: float, devices: Sequence[int] | None
) -> None:
    if not (_is_number(mfu) and 0 < mfu <= 1):
        raise ValueError(f"mfu is {mfu!r}; give a share of the peak, above 0 and at most 1 (0.4 for 40%).")
    if not (_is_number(peak_tflops) and 0 < peak_tflops <= 1e6):
        raise ValueError(
            f"peak_tflops is {peak_tflops!r}; give the peak of one device in TFLOP/s, above 0 and at most 1e6 "
            f"({PEAK_TFLOPS:g} for an H100 SXM in bf16)."
        )
    if recipe.lora is not None:
        # A name that only other activations have is none too many: PEFT passes over it.
        names = [*block_matrices(config), "mlp.c_fc2"]
        targets = recipe.lora.target_modules
        if not _adapted(recipe, config) or not all(any(_names(part, name) for name in names) for part in targets):
            counted = ", ".join(dict.fromkeys(names))
            raise ValueError(f"lora.target_modules are {', '.join(targets)}; a plan counts adapters of {counted}.")
    rows, replicas = _rows(recipe), recipe.parallelism.replicate
    if rows % replicas:
        raise ValueError(
            f"parallelism.replicate is {replicas}, but the steps have {rows} rows to share; give a divisor of that."
        )
    fitting = [count for count in range(replicas, rows + 1, replicas) if rows % count == 0]
    remedy = f"give some of {', '.join(map(str, fitting))}."
    if devices is not None and not devices:
        raise ValueError(f"devices is empty; leave it out, or {remedy}")
    for count in devices or ():
        if isinstance(count, bool) or count not in fitting:
            raise ValueError(f"devices has {count!r}, which cannot share the batches of the recipe evenly; {remedy}")


def _rows(recipe: Recipe) -> int:
    """The most devices that can share every batch, a row each; others have to divide it."""
    return math.gcd(*(stage.batch_tokens // stage.sequence_length for stage in recipe.stages))


def _device_counts(recipe: Recipe) -> list[int]:
    """Numbers of devices that can share the batches, each at least twice the one before."""
    rows, replicas = _rows(recipe), recipe.parallelism.replicate
    counts: list[int] = []
    for count in range(replicas, rows + 1, replicas):
        if rows % count == 0 and (not counts or count >= 2 * counts[-1]):
            counts.append(count)
    return counts


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Rendering


def render(name: str, numbers: dict[str, Any]) -> Group:
    """Tables of what :func:`plan` returns that fit 80 columns."""
    parameters = numbers["parameters"]
    counts = f"  {parameters['total']:,} parameters, {parameters['without_embeddings']:,} without embeddings"
    if parameters["adapters"]:
        counts += f"\n  {parameters['adapters']:,} more in adapters, the only ones that are trained"
    return Group(
        Text(name, "bold cyan"),
        counts,
        _stages(numbers),
        _memory(numbers),
        _days(numbers),
    )


def _stages(numbers: dict[str, Any]) -> Padding:
    table = _table("stages", ("tokens a row", 12), ("a step", 10), ("steps", 9), ("tokens", 8), ("FLOPs", 9))
    for index, stage in enumerate(numbers["stages"], start=1):
        table.add_row(
            str(index),
            f"{stage['sequence_length']:,}",
            f"{stage['batch_tokens']:,}",
            f"{stage['steps']:,}",
            _tokens(stage["tokens"]),
            f"{stage['flops']:#.3g}",
        )
    if len(numbers["stages"]) > 1:
        table.add_row("all", "", "", f"{numbers['steps']:,}", _tokens(numbers["tokens"]), f"{numbers['flops']:#.3g}")
    by_parameters = "6 x parameters x tokens"
    if numbers["parameters"]["adapters"]:
        by_parameters = "(4 x frozen + 6 x trained parameters) x tokens"
    note = f"FLOPs include causal attention; {by_parameters} is {numbers['flops_by_parameters']:#.3g}"
    return _section(table, note)


def _memory(numbers: dict[str, Any]) -> Padding:
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "head", "total")
    table = _table("memory", *((part, max(len(part), 7)) for part in parts))
    for row in numbers["memory"]:
        shards = row["shards"]
        sizes = (f"{_scaled(row[part])}B" if row[part] else "-" for part in parts)
        table.add_row(f"{shards:,} shard{'s' if shards > 1 else ''}", *sizes)
    moments: dict[str, list[str]] = {}
    for row in numbers["memory"]:
        moments.setdefault(row["moment"], []).append(str(row["shards"]))
    fullest = "; ".join(f"{moment} ({', '.join(shards)})" for moment, shards in moments.items())
    notes = [
        f"estimate for one device, {numbers['micro_batch_tokens']:,} tokens a micro-batch, at the fullest moment of",
        f"a step, by shards: {fullest}",
        "gathered: weights in use, gathered or cast, and gradients not yet reduced",
        *(["activations: block inputs are kept, the rest is recomputed"] if numbers["checkpointing"] else []),
        "not counted: CUDA context, NCCL, fragmentation" + (", savings by compilation" if numbers["compiled"] else ""),
    ]
    return _section(table, *notes)


def _days(numbers: dict[str, Any]) -> Padding:
    table = _table("devices", ("shards", 6), ("micro-batches", 15), ("memory", 9), ("time", 13))
    for row in numbers["days"]:
        table.add_row(
            f"{row['devices']:,}",
            f"{row['shards']:,}",
            f"{row['micro_batches']:,} x {row['micro_batch_tokens']:,}",
            f"{_scaled(row['memory'])}B",
            _duration(row["days"]),
        )
    peak = numbers["peak_tflops"]
    default = peak == PEAK_TFLOPS
    notes = [
        f"assumptions: MFU {numbers['mfu']:g} at any number of devices, and a peak of {peak:g} TFLOP/s each",
        *(["(dense bf16 products on an H100 SXM, NVIDIA's data sheet)"] if default else []),
    ]
    if default and numbers["dtype"] != "bfloat16":
        notes.append(f"the recipe computes in {numbers['dtype']}: give its peak with --peak-tflops")
    notes.append("micro-batches (number x tokens) in a step, and memory, are those of one device")
    if numbers["replicas"] > 1:
        notes.append(f"{numbers['replicas']} replicas: devices are that many times the shards")
    return _section(table, *notes)


def _table(title: str, *columns: tuple[str, int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column(Text(title, "bold"), width=12)
    for name, width in columns:
        table.add_column(name, justify="right", min_width=width, no_wrap=True)
    return table


def _section(table: Table, *notes: str) -> Padding:
    parts: list[RenderableType] = [table, *(Text(note, "dim") for note in notes)]
    return Padding(Group(*parts), (1, 0, 0, 2), expand=False)


def _scaled(value: float) -> str:
    """Three digits and a decimal prefix."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{_three_digits(value / scale)} {prefix}"
    return f"{value:.0f} "


def _tokens(value: float) -> str:
    return _scaled(value).replace("G", "B").strip()


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def _duration(days: float) -> str:
    for unit, size in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * size >= 1:
            return f"{_three_digits(days * size)} {unit}"
    return f"{_three_digits(days * 86_400)} seconds"
