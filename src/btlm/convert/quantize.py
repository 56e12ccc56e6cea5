"""`btlm quantize`: a checkpoint in four or eight bits, tensor by tensor, so that it never has to fit in memory."""

import hashlib
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tensor_file import make_header
from btlm.checkpoint.tensor_file_writer import DTYPES, write_tensors
from btlm.checkpoint.tensors import Weights
from btlm.console import gigabytes, note, plural, progress_bars
from btlm.devices import multiplies_bf16
from btlm.files import file_sha256, locked, require_space, whole_folder
from btlm.model import BTLMConfig
from btlm.model.architecture_btlm import TOKEN_TABLE, Architecture, Quantization
from btlm.model.config_keys_btlm import QUANT_METHOD
from btlm.model.storage_btlm import StoredMatrix, group_size_problem, pack, pack_scale, stored_matrices

from .calibrate import CALIBRATION_TOKENS, Rounded, TextStates, calibration_rows, first_states
from .options import QuantizeOptions
from .rounding import padded, round_weights, search_scales, values_of
from .unfinished import WEIGHTS, UnfinishedCopy, kept_bytes, unfinished_copy

# Dtype in safetensors' names and shape of tensors, by name.
Layout = dict[str, tuple[str, tuple[int, ...]]]

# Beside the weights: configuration and tokenizer.
_OTHER_FILES = 8_000_000


class MatrixError(NamedTuple):
    """What quantization did to one matrix."""

    weights: float
    """Root mean square of the difference over that of the weights."""
    outputs: float | None
    """The same of the outputs for the calibration text, biases included; None without one."""


def quantize(
    model: Checkpoint | Path | str,
    output: Path | str,
    *,
    bits: int = QuantizeOptions.bits,
    group_size: int = QuantizeOptions.group_size,
    table_bits: int = QuantizeOptions.table_bits,
    calibration: Path | str | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    base: Path | str | None = None,
) -> dict[str, MatrixError]:
    """Write a quantized copy of a checkpoint, with its tokenizer. :mod:`btlm.model.storage_btlm` has the storage.

    Args:
        model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters; not quantized.
        output: New folder; appears when it is complete.
        bits, table_bits, calibration: See :class:`btlm.convert.options.QuantizeOptions`; the text is UTF-8.
        group_size: Inputs that share a scale, 64 or 128; divides the width of the model.
        calibration_tokens: Tokens of the text that are used, at most.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.

    Returns:
        The errors of each matrix, by the name of its module.

    Raises:
        ValueError: Before any work: an argument is impossible, the checkpoint cannot be used or is quantized already,
            ``output`` exists, its disk is too small, or the text is not usable. While it works: a weight is not finite.
    """
    started = time.monotonic()
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists; give a new folder or remove it.")
    QuantizeOptions(bits, group_size, table_bits)  # type: ignore[arg-type]  # it checks them
    quantization = Quantization(bits, group_size, table_bits)
    checkpoint = open_checkpoint(model, base)
    config = checkpoint.config()
    if (stored := getattr(config, "quantization_config", None)) is not None:
        raise ValueError(
            f"{checkpoint.name} is quantized already ({stored.get('bits')} bits, groups of {stored.get('group_size')});"
            " give the folder that it was made from."
        )
    if problem := group_size_problem(config.n_embd, group_size):
        raise ValueError(problem)
    weights = Weights(checkpoint)
    tokenizer = checkpoint.transformers_tokenizer
    rows = None if calibration is None else calibration_rows(calibration, tokenizer, config, calibration_tokens)
    matrices = stored_matrices(config.architecture, quantization)
    layout = _layout(weights, config.architecture, matrices)
    size = make_header(layout).size

    console = Console(stderr=True)
    with ExitStack() as stack:
        stack.enter_context(locked(output))
        unfinished = None
        if rows is None:
            require_space(output, size + _OTHER_FILES, "choose another place")
            partial = stack.enter_context(whole_folder(output))
        else:
            require_space(output, size + _OTHER_FILES + kept_bytes(rows, config.n_embd), "choose another place")
            key = _key(checkpoint, weights, quantization, rows)
            unfinished = stack.enter_context(unfinished_copy(output, key, config.n_layer))
            partial = unfinished.folder
        _write_description(partial, checkpoint, config, quantization, weights)
        errors = _write(partial / WEIGHTS, layout, config, weights, matrices, rows, unfinished, console)
    # A narrow terminal breaks its lines: better than numbers that are cut off.
    Console(stderr=True, width=max(console.width, 100)).print(_error_table(errors, matrices))
    total, blocks = _bits_per_weight(layout, matrices, config)
    console.print(
        f"Wrote {output}: {gigabytes(size)}, {total:.2f} bits per weight ({blocks:.2f} in the blocks), in "
        f"{time.monotonic() - started:,.0f} s",
        soft_wrap=True,
        highlight=False,
    )
    return errors


def _write(
    path: Path,
    layout: Layout,
    config: BTLMConfig,
    weights: Weights,
    matrices: Mapping[str, StoredMatrix],
    rows: Tensor | None,
    unfinished: UnfinishedCopy | None,
    console: Console,
) -> dict[str, MatrixError]:
    """Write the tensors of the copy; with a calibration text, what an unfinished copy has is not computed again."""
    done = unfinished.blocks if unfinished is not None else 0
    errors = {name: MatrixError(*of) for name, of in (unfinished.notes if unfinished is not None else {}).items()}
    written = [name for name in layout if name.removesuffix("_scale").rpartition(".")[0] in errors]
    sizes = {name: matrix.padded_outputs * matrix.padded_inputs for name, matrix in matrices.items()}
    with write_tensors(path, layout, written) as write, progress_bars(console=console) as progress:
        task = progress.add_task("quantize", total=sum(sizes.values()), completed=sum(sizes[name] for name in errors))

        def put(name: str, weight: Tensor, rounded: Rounded) -> None:
            matrix = matrices[name]
            write(f"{name}.weight", torch.from_numpy(pack(rounded.q_NK.numpy(), matrix.bits)))
            write(f"{name}.weight_scale", _bf16(rounded.scale_NG))
            if rounded.bias_N is not None:
                write(f"{name}.bias", rounded.bias_N)
            difference = values_of(rounded.q_NK, rounded.scale_NG, matrix.bits).sub_(weight)
            errors[name] = MatrixError(ratio(difference.norm(), weight.norm()), rounded.output_error)
            progress.advance(task, sizes[name])

        table: Rounded | None = None
        for name in [] if done else matrices:
            if ".h." not in name or rows is None:
                weight, rounded = _round_alone(weights, name, matrices[name])
                put(name, weight, rounded)
                if name == TOKEN_TABLE:
                    table = rounded
        if unfinished is not None and rows is not None:
            hidden_BQC = unfinished.hidden_BQC
            if hidden_BQC is None:
                assert table is not None
                hidden_BQC = first_states(config, weights, _embedded(table, rows, matrices[TOKEN_TABLE].bits))
            del table
            states, started = TextStates(config, weights, matrices, hidden_BQC), time.monotonic()
            for layer in range(done, config.n_layer):
                for name, weight, rounded in states.round_block(layer):
                    put(name, weight, rounded)
                unfinished.save(layer + 1, states.hidden_BQC, errors)
                if not console.is_terminal:
                    seconds = time.monotonic() - started
                    left = timedelta(seconds=round(seconds * (config.n_layer - layer - 1) / (layer + 1 - done)))
                    note(f"{layer + 1} of {plural(config.n_layer, 'block')} done; about {left} left")
        for name in layout.keys() - {key for key in layout if key.rpartition(".")[0] in matrices}:
            write(name, weights.read(name).to(DTYPES[layout[name][0]]))
    return errors


def _round_alone(weights: Weights, name: str, matrix: StoredMatrix) -> tuple[Tensor, Rounded]:
    """A matrix without a text: its padded weights ``[N, K]``, and what they are rounded to."""
    in_block = ".h." in name
    weight = weights.read(f"{name}.weight").float()
    weight = padded(weight.T if in_block else weight, matrix.padded_outputs, matrix.padded_inputs)
    scale_NG = search_scales(weight, matrix.bits, matrix.group_size)
    bias = None
    if in_block:
        bias = weights.read(f"{name}.bias").float()
        bias = torch.nn.functional.pad(bias, (0, matrix.padded_outputs - matrix.outputs))
    return weight, Rounded(round_weights(weight, scale_NG, matrix.bits), scale_NG, bias, None)


def _embedded(table: Rounded, rows: Tensor, bits: int) -> Tensor:
    """What the rounded table has for tokens ``[B, Q]``."""
    ids = rows.flatten()
    return values_of(table.q_NK[ids], table.scale_NG[ids], bits).view(*rows.shape, -1)


def _key(checkpoint: Checkpoint, weights: Weights, quantization: Quantization, rows: Tensor) -> dict[str, Any]:
    """Everything that a calibrated copy depends on."""
    return {
        "weights": [file_sha256(file) for file in checkpoint.weight_files],
        "config": file_sha256(checkpoint.folder / "config.json"),
        "text": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "options": vars(quantization),
        "btlm": version("btlm"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bf16": multiplies_bf16(),
    }


def _bf16(scale_NG: Tensor) -> Tensor:
    return torch.from_numpy(pack_scale(scale_NG.numpy())).view(torch.bfloat16)


# Before any work


def _layout(weights: Weights, architecture: Architecture, matrices: Mapping[str, StoredMatrix]) -> Layout:
    """Dtype in safetensors' names and shape of every tensor of the copy."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    layout: Layout = {}
    for name, facts in architecture.tensors.items():
        matrix = matrices.get(name.rpartition(".")[0])
        if matrix is None:
            layout[name] = (names.get(weights.dtype(name), "F32") if facts.kind == "slopes" else "F32", facts.shape)
        elif name.endswith(".bias"):
            layout[name] = ("F32", (matrix.padded_outputs,))
        else:
            layout[name] = ("U8", matrix.weight_shape)
            layout[f"{name}_scale"] = ("BF16", matrix.scale_shape)
    return layout


# What surrounds it


def _write_description(
    partial: Path, checkpoint: Checkpoint, config: BTLMConfig, quantization: Quantization, weights: Weights
) -> None:
    if (checkpoint.folder / "generation_config.json").is_file():
        shutil.copyfile(checkpoint.folder / "generation_config.json", partial / "generation_config.json")
    else:
        GenerationConfig.from_model_config(config).save_pretrained(partial)
    config.quantization_config = {"quant_method": QUANT_METHOD, **vars(quantization)}
    config.architectures = ["BTLMLMHeadModel"]
    if config.dtype is None:
        config.dtype = weights.dtype("transformer.wte.weight")
    config.__dict__.pop("auto_map", None)  # names code that does not come along
    config.save_pretrained(partial)
    checkpoint.transformers_tokenizer.save_pretrained(partial)


# What is told at the end


def ratio(error: Tensor, size: Tensor) -> float:
    """Of two norms; 0 where nothing could be wrong."""
    return (error / size).item() if size else 0.0


def _error_table(errors: dict[str, MatrixError], matrices: Mapping[str, StoredMatrix]) -> Table:
    calibrated = any(error.outputs is not None for error in errors.values())
    kinds = list(dict.fromkeys(name.split(".", 3)[3] for name in matrices if ".h." in name))
    title = "Relative error of the weights" + (" / of the outputs for the text" if calibrated else "")
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for layer in range(1 + max(int(name.split(".")[2]) for name in matrices if ".h." in name)):
        table.add_row(str(layer), *(_cell(errors[f"transformer.h.{layer}.{kind}"]) for kind in kinds))
    table.caption = ", ".join(
        f"{name.rpartition('.')[2]} {_cell(errors[name])}" for name in errors if ".h." not in name
    )
    return table


def _cell(error: MatrixError) -> str:
    return f"{error.weights:.2%}" + ("" if error.outputs is None else f" / {error.outputs:.2%}")


def _bits_per_weight(layout: Layout, matrices: Mapping[str, StoredMatrix], config: BTLMConfig) -> tuple[float, float]:
    """Bits of the file for each parameter of the model, and those of the matrices in the blocks for their weights."""
    in_blocks = {name: matrix for name, matrix in matrices.items() if ".h." in name}
    stored = sum(
        math.prod(shape) * DTYPES[dtype].itemsize
        for name, (dtype, shape) in layout.items()
        if name.rpartition(".")[0] in in_blocks and not name.endswith(".bias")
    )
    count = sum(matrix.outputs * matrix.inputs for matrix in in_blocks.values())
    return 8 * make_header(layout).size / config.num_parameters(), 8 * stored / count
