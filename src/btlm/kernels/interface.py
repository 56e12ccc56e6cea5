"""The kernels: what the engine computes with.

Arrays are C-contiguous numpy arrays in main memory; bf16 numbers are stored in uint16. Results are written to arrays of
the caller. A token's result does not depend on the other tokens of a call: on the native kernels it has the same bits
alone, in a batch and in chunks.

Letters: T tokens, N outputs, K inputs, G group size, H heads, D head dimension.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from btlm.model.storage_btlm import BLOCK_BYTES, BLOCK_ROWS

from .arrays import (
    DTYPES,
    ELEMENT,
    FLOAT32,
    INT64,
    PACKED,
    PAGE_TOKENS,
    UINT8,
    UINT16,
    Array,
    Floats,
    Halves,
    require,
    require_array,
    require_dtype,
    require_out,
)
from .cache import Cache, PageTable

if TYPE_CHECKING:
    from .reference import TorchKernels


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """A weight matrix with N ``rows`` and K ``columns``; made by :meth:`Kernels.matrix`."""

    owner: type[Any]
    dtype: str
    rows: int
    columns: int
    group: int
    input_major: bool
    handle: Any


class Kernels:
    """The operations of a forward pass, on one instruction set and a fixed number of threads.

    Objects share nothing: one does not change the threads or the instruction set of another. Calls to one object run
    one after the other.

    Args:
        implementation: What computes; :func:`btlm.kernels.load_kernels` chooses it. The class of the native module has
            the methods of :class:`btlm.kernels.reference.TorchKernels`; both get arguments that are already checked.
    """

    def __init__(self, implementation: "TorchKernels") -> None:
        self._implementation = implementation
        self.name = implementation.name
        self.threads = implementation.threads

    @property
    def unpacked_bytes(self) -> int:
        """Bytes in memory for each weight that is not stored in fp32: torch computes on copies in fp32."""
        return 4 if self.name == "torch" else 0

    def matrix(
        self,
        dtype: str,
        weight: Array,
        scale: Halves | None = None,
        bias: Floats | None = None,
        *,
        input_major: bool = False,
    ) -> WeightMatrix:
        """Make a weight matrix; it keeps the arrays and reads them where they are.

        Args:
            dtype: ``"int4"`` or ``"int8"``, packed as :mod:`btlm.model.storage_btlm` describes it, ``"bfloat16"``
                or ``"float32"``.
            weight: uint8 ``[N/16, K/8, 64]`` for int4 and ``[N/16, K/4, 64]`` for int8; else uint16 or fp32 ``[N, K]``.
            scale: bf16 ``[N/16, K/G, 16]`` for int4 and int8, where G is a multiple of 16; else None.
            bias: fp32 ``[N]``.
            input_major: A bfloat16 or float32 weight is ``[K, N]`` instead, as the network's projections are.

        Raises:
            ValueError: There is no such dtype, or the arrays do not fit together.
        """
        require_dtype(dtype)
        group = 0
        if dtype in PACKED:
            require(weight.ndim == 3, f"an {dtype} weight is [N/16, columns, 64], and this one is {list(weight.shape)}")
            require(not input_major, f"an {dtype} matrix cannot be input-major")
            rows = weight.shape[0] * BLOCK_ROWS
            columns = weight.shape[1] * (BLOCK_BYTES // BLOCK_ROWS) * 8 // DTYPES[dtype]
            require_array("weight", weight, ELEMENT[dtype], (*weight.shape[:2], BLOCK_BYTES))
            require(
                scale is not None and scale.ndim == 3 and scale.shape[1] > 0,
                f"an {dtype} matrix needs scales [N/16, K/G, 16]",
            )
            assert scale is not None
            require_array("scale", scale, UINT16, (weight.shape[0], scale.shape[1], BLOCK_ROWS))
            group = columns // scale.shape[1]
            require(
                group % BLOCK_ROWS == 0 and group * scale.shape[1] == columns,
                f"{scale.shape[1]} groups do not divide {columns} columns into multiples of {BLOCK_ROWS}",
            )
        else:
            require(weight.ndim == 2, f"a {dtype} weight has two dimensions, and this one is {list(weight.shape)}")
            require(scale is None, f"a {dtype} matrix has no scales")
            require_array("weight", weight, ELEMENT[dtype], weight.shape)
            rows, columns = weight.shape[::-1] if input_major else weight.shape
        require(min(rows, columns) > 0, f"the weight {list(weight.shape)} is empty")
        if bias is not None:
            require_array("bias", bias, FLOAT32, (rows,))
        handle = self._implementation.matrix(dtype, weight, scale, bias, rows, columns, group, input_major)
        return WeightMatrix(type(self._implementation), dtype, rows, columns, group, input_major, handle)

    def cache(self, dtype: str, table: PageTable, *, heads: int, head_dim: int) -> Cache:
        """Make an empty cache for one layer. Its memory is used as it fills; see :func:`btlm.kernels.page_bytes`.

        Args:
            dtype: ``"int4"`` or ``"int8"``, with one scale per token and head, ``"bfloat16"`` or ``"float32"``.
            table: The pages of its slots; the layers of a network share one table.
            heads: Number of heads.
            head_dim: Dimensions per head, at most 256.

        Raises:
            ValueError: There is no such dtype, or a size is impossible.
        """
        return Cache(self._implementation, dtype, table, heads, head_dim)

    def linear(
        self, x: Floats, matrix: WeightMatrix, out: Floats, gate: WeightMatrix | None = None, add: bool = False
    ) -> None:
        """Multiply ``x`` by a matrix and add its bias.

        For an int4 or int8 matrix ``x`` is rounded to eight bits, with one scale per token and group of inputs, and the
        sums within a group are exact; other matrices are multiplied in fp32.

        Args:
            x: ``[T, K]``.
            matrix: ``[N, K]``.
            out: ``[T, N]``, receives the result.
            gate: A second matrix of the same dtype and shape; the result is multiplied by the SiLU of its product.
            add: Add the result to ``out`` instead of replacing it.

        Raises:
            ValueError: The arrays do not fit together.
        """
        tokens = len(x)
        require_array("x", x, FLOAT32, (tokens, matrix.columns))
        require_out(out, (tokens, matrix.rows))
        if gate is not None:
            ours, theirs = ((one.dtype, one.rows, one.columns, one.group, one.input_major) for one in (matrix, gate))
            require(ours == theirs, "the gate must have the dtype and shape of the matrix")
        gate_handle = None if gate is None else self._handle(gate)
        self._implementation.linear(x, self._handle(matrix), out, gate_handle, add)

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats, eps: float, out: Floats) -> None:
        """Normalize each row of ``x`` to mean 0 and variance 1, then scale and shift it.

        Args:
            x: ``[T, K]``.
            weight: ``[K]``.
            bias: ``[K]``.
            eps: Added to the variance.
            out: ``[T, K]``, receives the result; may be ``x``.

        Raises:
            ValueError: The arrays do not fit together.
        """
        if x.ndim != 2:
            raise ValueError(f"x is {list(x.shape)}, and must be [tokens, columns]")
        tokens, columns = x.shape
        require_array("x", x, FLOAT32, (tokens, columns))
        require_array("weight", weight, FLOAT32, (columns,))
        require_array("bias", bias, FLOAT32, (columns,))
        require_out(out, (tokens, columns))
        self._implementation.layer_norm(x, weight, bias, eps, out)

    def embed(self, ids: npt.NDArray[np.int64], matrix: WeightMatrix, factor: float, out: Floats) -> None:
        """Look up rows of a table and multiply them by a factor.

        Args:
            ids: ``[T]``, each below N.
            matrix: ``[N, K]``; not input-major.
            factor: Of all rows.
            out: ``[T, K]``, receives the result.

        Raises:
            ValueError: The arrays do not fit together, or an id is not in the table.
        """
        require(not matrix.input_major, "a table of embeddings cannot be input-major: it has one row per token id")
        require_array("ids", ids, INT64, (len(ids),))
        require_out(out, (len(ids), matrix.columns))
        if len(ids) and not (ids.min() >= 0 and ids.max() < matrix.rows):
            wrong = ids[(ids < 0) | (ids >= matrix.rows)][0]
            raise ValueError(f"token {wrong} is not in a table of {matrix.rows}")
        self._implementation.embed(ids, self._handle(matrix), factor, out)

    def attend(
        self,
        qkv: Floats,
        cache: Cache,
        segments: npt.NDArray[np.int64],
        slopes: Floats,
        scale: float,
        out: Floats,
    ) -> None:
        """Append keys and values to the cache, then attend causally with ALiBi.

        A token whose query, key or value in a head is not finite gets NaN from that head.

        For an int8 cache queries, keys and values are rounded to eight bits, with one scale per token and head, and
        probabilities to sixteen. An int4 cache stores keys and values as -7 to 7.

        Args:
            qkv: Queries, keys and values, ``[T, 3 * H * D]``.
            cache: Cache of the layer.
            segments: ``[*, 4]``: row of the first token in ``qkv``, slot, position of that token, and number of
                consecutive tokens. The slot holds the tokens before that position.
            slopes: ALiBi's slopes, interpolation included, ``[H]``.
            scale: Factor of the products of queries and keys.
            out: ``[T, H * D]``, receives the result.

        Raises:
            ValueError: The arrays do not fit together, a segment does not fit the batch or the cache, or its slot has
                no page for it.
        """
        tokens, width = len(qkv), cache.heads * cache.head_dim
        require_array("qkv", qkv, FLOAT32, (tokens, 3 * width))
        require_out(out, (tokens, width))
        require_array("slopes", slopes, FLOAT32, (cache.heads,))
        require_array("segments", segments, INT64, (len(segments), 4))
        for row, slot, start, count in segments.tolist():
            if count <= 0 or row < 0 or row + count > tokens:
                raise ValueError(f"a segment of {count} tokens from row {row} does not fit a batch of {tokens} tokens")
            table = cache.table
            if not (0 <= slot < table.slots and start >= 0 and start + count <= table.length):
                raise ValueError(
                    f"a segment of {count} tokens from {start} in slot {slot} does not fit a cache of {table.slots} "
                    f"slots of {table.length} tokens"
                )
            if table.entries[slot, (start + count - 1) // PAGE_TOKENS] < 0:  # the first pages are given first
                raise ValueError(f"slot {slot} has no page for token {start + count - 1}")
        self._implementation.attend(qkv, self._handle(cache), segments, slopes, scale, out)

    def sum_bytes(self, values: npt.NDArray[np.uint8]) -> int:
        """Sum the bytes of ``[*]``, except up to 255 at the end: reads memory as fast as the machine can."""
        require_array("values", values, UINT8, (len(values),))
        return self._implementation.sum_bytes(values)

    def _handle(self, one: WeightMatrix | Cache) -> Any:
        if one.owner is not type(self._implementation):
            raise ValueError(f"a {type(one).__name__} of other kernels cannot be used on {self.name}; make it here")
        return one.handle
