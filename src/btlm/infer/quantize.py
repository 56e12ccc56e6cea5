"""`btlm quantize`: a checkpoint in eight bits, half the size of bf16."""

import shutil
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from btlm.model.quantization_btlm import QUANT_METHOD, quantized_state_dict

from .load import load_model


def quantize(model: str, output: Path | str) -> None:
    """Write an eight-bit copy of a checkpoint, with its tokenizer.

    Args:
        model: Folder or hub id.
        output: New folder; appears when it is complete.

    Raises:
        ValueError: The checkpoint cannot be loaded, or ``output`` exists.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; give a new folder or remove it.")
    network, tokenizer = load_model(model)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.config.quantization_config = {"quant_method": QUANT_METHOD, "bits": 8}
    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(partial)
    network.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    state = quantized_state_dict(network)
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(output)
    size = sum(tensor.nbytes for tensor in state.values())
    bits = 8 * size / network.config.num_parameters()
    Console(stderr=True).print(f"Wrote {output}: {size / 1e6:,.1f} MB of weights, {bits:.2f} bits a parameter")
