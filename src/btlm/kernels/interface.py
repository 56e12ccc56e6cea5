"""The kernels: what the engine computes with.

Arrays are C-contiguous numpy arrays in main memory; bf16 numbers are stored in uint16. Results are written to arrays of
the caller. A token's result does not depend on the other tokens of a call: on the native kernels it has the same bits
alone, in a batch and in chunks.

Letters: T tokens, N outputs, K inputs, G group size, H heads, D head dimension, W head dimension rounded up to a
multiple of 16, S slots, L length of a slot in tokens, rounded up to a multiple of 64.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]

DTYPES = {"int4": 4, "int8": 8, "bfloat16": 16, "float32": 32}
"""Bits per number of the dtypes in which matrices and caches are stored."""

MAX_HEAD_DIM = 256
_PACKED = ("int4", "int8")  # stored as integers, with scales in bf16
_UINT8, _UINT16, _INT64, _FLOAT32 = (np.dtype(name) for name in ("uint8", "uint16", "int64", "float32"))
_ELEMENT = {"int4": _UINT8, "int8": _UINT8, "bfloat16": _UINT16, "float32": _FLOAT32}
_ROWS = 16  # outputs in a block of a packed matrix; groups and heads are multiples of it too
_BLOCK_BYTES = 64
_BLOCK_TOKENS = 64


class WeightMatrix:
    """A weight matrix with N ``rows`` and K ``columns``; made by :meth:`Kernels.matrix`."""

    def __init__(
        self, kernels: "Kernels", dtype: str, rows: int, columns: int, group: int, input_major: bool, handle: Any
    ) -> None:
        self.dtype = dtype
        self.rows = rows
        self.columns = columns
        self.group = group
        self.input_major = input_major
        self._owner = type(kernels._implementation)
        self._handle = handle


class Cache:
    """Keys and values of one layer; made by :meth:`Kernels.cache`.

    Only the kernels know the layout of its arrays.

    Args:
        kernels: See :meth:`Kernels.cache` for the others.
    """

    # int8: keys uint8 [S, H, L/64, W/4, 64, 4], stored as q + 128; values int8 [S, H, L/4, W, 4]. int4: keys uint8
    # [S, H, L/64, W/8, 64, 4], stored as q + 8, the first four of eight dimensions in the low nibbles; values uint8
    # [S, H, L/8, W, 4], stored as q + 8, the first four of eight tokens in the low nibbles. Both have bf16 scales
    # [S, H, L], one per token and head. Else: keys [S, H, L/16, W, 16], values [S, H, L, W].
    #
    # In every layout 64 tokens of a head lie together, so that the arrays here are [S, H, L/64, elements].

    def __init__(self, kernels: "Kernels", dtype: str, slots: int, heads: int, length: int, head_dim: int) -> None:
        blocks, elements = _cache_blocks(dtype, slots, heads, length, head_dim)
        self.dtype = dtype
        self.slots = slots
        self.heads = heads
        self.length = length
        self.head_dim = head_dim
        # np.zeros does not touch the memory: a page is used when the first token is written to it.
        self.keys: Array = np.zeros((slots, heads, blocks, elements), _ELEMENT[dtype])
        self.values: Array = np.zeros(self.keys.shape, np.int8 if dtype == "int8" else _ELEMENT[dtype])
        self.key_scales: Halves | None = None
        self.value_scales: Halves | None = None
        if dtype in _PACKED:
            self.key_scales, self.value_scales = (
                np.zeros((slots, heads, blocks, _BLOCK_TOKENS), np.uint16) for _ in range(2)
            )
        self._owner = type(kernels._implementation)
        self._handle = kernels._implementation.cache(
            dtype,
            self.keys,
            self.values,
            self.key_scales,
            self.value_scales,
            slots,
            heads,
            blocks * _BLOCK_TOKENS,
            head_dim,
        )

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of slot ``source`` to slot ``target``."""
        _require(
            0 <= source < self.slots and 0 <= target < self.slots and 0 <= tokens <= self.length,
            f"{tokens} tokens cannot be copied from slot {source} to slot {target} of a cache of {self.slots} slots of "
            f"{self.length} tokens",
        )
        blocks = _divide_up(tokens, _BLOCK_TOKENS)
        for array in (self.keys, self.values, self.key_scales, self.value_scales):
            if array is not None:
                array[target, :, :blocks] = array[source, :, :blocks]


def cache_bytes(dtype: str, *, slots: int, heads: int, length: int, head_dim: int) -> int:
    """Bytes of a :class:`Cache`, which holds one layer.

    Raises:
        ValueError: There is no such dtype, or a size is impossible.
    """
    blocks, elements = _cache_blocks(dtype, slots, heads, length, head_dim)
    scales = 2 * _BLOCK_TOKENS if dtype in _PACKED else 0
    return 2 * slots * heads * blocks * (elements * _ELEMENT[dtype].itemsize + scales)


class Implementation(Protocol):
    """What :class:`Kernels` runs on: arguments are as there, and already checked.

    ``matrix`` and ``cache`` return what the operations of the implementation expect in place of a
    :class:`WeightMatrix` and a :class:`Cache`.
    """

    @property
    def name(self) -> str:
        """``"torch"``, or the instruction set of the native kernels."""

    @property
    def threads(self) -> int:
        """Number of threads."""

    def matrix(
        self,
        dtype: str,
        weight: Array,
        scale: Halves | None,
        bias: Floats | None,
        rows: int,
        columns: int,
        group: int,
        input_major: bool,
    ) -> Any:
        """A matrix; see :meth:`Kernels.matrix`."""

    def cache(
        self,
        dtype: str,
        keys: Array,
        values: Array,
        key_scales: Halves | None,
        value_scales: Halves | None,
        slots: int,
        heads: int,
        capacity: int,
        head_dim: int,
    ) -> Any:
        """A cache over arrays in the layouts of :class:`Cache`; ``capacity`` is L."""

    def linear(self, x: Floats, matrix: Any, out: Floats, gate: Any, add: bool) -> None:
        """See :meth:`Kernels.linear`."""

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats, eps: float, out: Floats) -> None:
        """See :meth:`Kernels.layer_norm`."""

    def embed(self, ids: npt.NDArray[np.int64], matrix: Any, factor: float, out: Floats) -> None:
        """See :meth:`Kernels.embed`."""

    def attend(
        self, qkv: Floats, cache: Any, segments: npt.NDArray[np.int64], slopes: Floats, scale: float, out: Floats
    ) -> None:
        """See :meth:`Kernels.attend`."""

    def sum_bytes(self, values: npt.NDArray[np.uint8]) -> int:
        """See :meth:`Kernels.sum_bytes`."""


class Kernels:
    """The operations of a forward pass, on one instruction set and a fixed number of threads.

    Objects share nothing: one does not change the threads or the instruction set of another. Calls to one object run
    one after the other.

    Args:
        implementation: What computes; :func:`btlm.kernels.load_kernels` chooses it.
    """

    def __init__(self, implementation: Implementation) -> None:
        self._implementation = implementation
        self.name = implementation.name
        self.threads = implementation.threads

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
            dtype: ``"int4"`` or ``"int8"``, packed as :mod:`btlm.model.quantization_btlm` describes it, ``"bfloat16"``
                or ``"float32"``.
            weight: uint8 ``[N/16, K/8, 64]`` for int4 and ``[N/16, K/4, 64]`` for int8; else uint16 or fp32 ``[N, K]``.
            scale: bf16 ``[N/16, K/G, 16]`` for int4 and int8, where G is a multiple of 16; else None.
            bias: fp32 ``[N]``.
            input_major: A bfloat16 or float32 weight is ``[K, N]`` instead, as the network's projections are.

        Raises:
            ValueError: There is no such dtype, or the arrays do not fit together.
        """
        _require_dtype(dtype)
        group = 0
        if dtype in _PACKED:
            _require(
                weight.ndim == 3, f"an {dtype} weight is [N/16, columns, 64], and this one is {list(weight.shape)}"
            )
            _require(not input_major, f"an {dtype} matrix cannot be input-major")
            rows, columns = weight.shape[0] * _ROWS, weight.shape[1] * (_BLOCK_BYTES // _ROWS) * 8 // DTYPES[dtype]
            _require_array("weight", weight, _ELEMENT[dtype], (*weight.shape[:2], _BLOCK_BYTES))
            _require(
                scale is not None and scale.ndim == 3 and scale.shape[1] > 0,
                f"an {dtype} matrix needs scales [N/16, K/G, 16]",
            )
            assert scale is not None
            _require_array("scale", scale, _UINT16, (weight.shape[0], scale.shape[1], _ROWS))
            group = columns // scale.shape[1]
            _require(
                group % _ROWS == 0 and group * scale.shape[1] == columns,
                f"{scale.shape[1]} groups do not divide {columns} columns into multiples of {_ROWS}",
            )
        else:
            _require(weight.ndim == 2, f"a {dtype} weight has two dimensions, and this one is {list(weight.shape)}")
            _require(scale is None, f"a {dtype} matrix has no scales")
            _require_array("weight", weight, _ELEMENT[dtype], weight.shape)
            rows, columns = weight.shape[::-1] if input_major else weight.shape
        _require(min(rows, columns) > 0, f"the weight {list(weight.shape)} is empty")
        if bias is not None:
            _require_array("bias", bias, _FLOAT32, (rows,))
        handle = self._implementation.matrix(dtype, weight, scale, bias, rows, columns, group, input_major)
        return WeightMatrix(self, dtype, rows, columns, group, input_major, handle)

    def cache(self, dtype: str, *, slots: int, heads: int, length: int, head_dim: int) -> Cache:
        """Make an empty cache for one layer. Its memory is used as it fills; see :func:`cache_bytes`.

        Args:
            dtype: ``"int4"`` or ``"int8"``, with one scale per token and head, ``"bfloat16"`` or ``"float32"``.
            slots: Number of sequences.
            heads: Number of heads.
            length: Tokens per slot.
            head_dim: Dimensions per head, at most 256.

        Raises:
            ValueError: There is no such dtype, or a size is impossible.
        """
        return Cache(self, dtype, slots, heads, length, head_dim)

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
        _require_array("x", x, _FLOAT32, (tokens, matrix.columns))
        _require_out(out, (tokens, matrix.rows))
        if gate is not None:
            ours, theirs = ((one.dtype, one.rows, one.columns, one.group, one.input_major) for one in (matrix, gate))
            _require(ours == theirs, "the gate must have the dtype and shape of the matrix")
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
        _require_array("x", x, _FLOAT32, (tokens, columns))
        _require_array("weight", weight, _FLOAT32, (columns,))
        _require_array("bias", bias, _FLOAT32, (columns,))
        _require_out(out, (tokens, columns))
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
        _require(not matrix.input_major, "a table of embeddings cannot be input-major: it has one row per token id")
        _require_array("ids", ids, _INT64, (len(ids),))
        _require_out(out, (len(ids), matrix.columns))
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
            ValueError: The arrays do not fit together, or a segment does not fit the batch or the cache.
        """
        tokens, width = len(qkv), cache.heads * cache.head_dim
        _require_array("qkv", qkv, _FLOAT32, (tokens, 3 * width))
        _require_out(out, (tokens, width))
        _require_array("slopes", slopes, _FLOAT32, (cache.heads,))
        _require_array("segments", segments, _INT64, (len(segments), 4))
        for row, slot, start, count in segments.tolist():
            if count <= 0 or row < 0 or row + count > tokens:
                raise ValueError(f"a segment of {count} tokens from row {row} does not fit a batch of {tokens} tokens")
            if not (0 <= slot < cache.slots and start >= 0 and start + count <= cache.length):
                raise ValueError(
                    f"a segment of {count} tokens from {start} in slot {slot} does not fit a cache of {cache.slots} "
                    f"slots of {cache.length} tokens"
                )
        self._implementation.attend(qkv, self._handle(cache), segments, slopes, scale, out)

    def sum_bytes(self, values: npt.NDArray[np.uint8]) -> int:
        """Sum the bytes of ``[*]``, except up to 255 at the end: reads memory as fast as the machine can."""
        _require_array("values", values, _UINT8, (len(values),))
        return self._implementation.sum_bytes(values)

    def _handle(self, one: WeightMatrix | Cache) -> Any:
        if one._owner is not type(self._implementation):
            raise ValueError(f"a {type(one).__name__} of other kernels cannot be used on {self.name}; make it here")
        return one._handle


def _cache_blocks(dtype: str, slots: int, heads: int, length: int, head_dim: int) -> tuple[int, int]:
    """Number of blocks of 64 tokens in a slot, and elements of the keys of a block and head."""
    _require_dtype(dtype)
    _require(
        min(slots, heads, length) > 0,
        f"a cache of {slots} slots, {heads} heads and {length} tokens is empty; each must be at least 1",
    )
    _require(0 < head_dim <= MAX_HEAD_DIM, f"heads of {head_dim} dimensions are not between 1 and {MAX_HEAD_DIM}")
    width = _divide_up(head_dim, _ROWS) * _ROWS
    return _divide_up(length, _BLOCK_TOKENS), _BLOCK_TOKENS * width // (2 if dtype == "int4" else 1)


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _require_dtype(name: str) -> None:
    _require(name in DTYPES, f"the dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")


def _require_array(name: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    contiguous = array.flags.c_contiguous
    if array.shape != shape or array.dtype != dtype or not contiguous:
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape)}{'' if contiguous else ', not contiguous'}, and must be {dtype} "
            f"{list(shape)}"
        )


def _require_out(out: Floats, shape: tuple[int, ...]) -> None:
    _require_array("out", out, _FLOAT32, shape)
    if not out.flags.writeable:
        raise ValueError("out is read-only")
