"""A safetensors file written tensor by tensor: its layout is known first, so no tensor waits in memory for others."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .tensor_file import make_header

# What files hold, by safetensors' names.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


@contextmanager
def write_tensors(
    path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], written: Collection[str] = ()
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield a function that writes one tensor of a new file; all have to be written, in any order.

    Args:
        path: A new file; it is complete when the context ends without an error.
        layout: As for :func:`btlm.checkpoint.tensor_file.make_header`.
        written: Tensors that the file has from an earlier time; if there are any, it is not new.
    """
    header, missing = make_header(layout), set(layout) - set(written)
    with path.open("r+b" if written else "xb") as file:
        if not written:
            file.write(header.content)

        def write(name: str, tensor: Tensor) -> None:
            dtype, shape = layout[name]
            assert (DTYPES[dtype], tuple(shape)) == (tensor.dtype, tuple(tensor.shape)), (
                f"{name}: {tensor.dtype} {tensor.shape}"
            )
            missing.remove(name)
            file.seek(header.starts[name])
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()  # for whoever records what has been written

        yield write
        assert not missing, f"never written: {sorted(missing)}"
