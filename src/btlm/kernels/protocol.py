"""What an implementation of the kernels offers.

Arrays are C-contiguous numpy arrays in main memory; bf16 is held in uint16. Results go to arrays of the caller. A
token's result does not depend on the other tokens of a call: the native kernels give the same bits alone, in a batch
and in chunks.

Letters: T tokens, N outputs, K inputs, G group size, H heads, D head dimension, W head dimension padded to a multiple
of 16, S slots, L capacity of a slot in tokens.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]


class WeightMatrix(Protocol):
    """A weight matrix; keeps the arrays it was made of."""

    @property
    def rows(self) -> int:
        """N."""

    @property
    def columns(self) -> int:
        """K."""


class LayerCache(Protocol):
    """Keys and values of one layer; keeps the arrays it was made of."""


class Kernels(Protocol):
    """The kernels.

    Raises:
        ValueError: Each of them, where the shapes do not belong together.
    """

    def Matrix(  # noqa: N802 - a class of the modules
        self,
        kind: str,
        weight: npt.NDArray[Any],
        scale: Halves | None,
        bias: Floats | None,
        rows: int,
        columns: int,
        group: int = 0,
        input_major: bool = False,
    ) -> WeightMatrix:
        """A weight matrix.

        Args:
            kind: ``"q4"`` or ``"q8"``, packed as :mod:`btlm.model.quantization_btlm` describes it, ``"bf16"`` or
                ``"f32"``.
            weight: uint8 ``[N/16, K/8, 64]`` for q4 and ``[N/16, K/4, 64]`` for q8; else uint16 or fp32.
            scale: bf16 ``[N/16, K/G, 16]`` for q4 and q8.
            bias: ``[N]``.
            rows, columns: N and K.
            group: G of q4 and q8, a multiple of 16.
            input_major: The plain weight is ``[K, N]``, as the network's projections are; else ``[N, K]``.
        """

    def Cache(  # noqa: N802
        self,
        kind: str,
        keys: npt.NDArray[Any],
        values: npt.NDArray[Any],
        key_scales: Halves | None,
        value_scales: Halves | None,
        slots: int,
        heads: int,
        capacity: int,
        head_dim: int,
    ) -> LayerCache:
        """The cache of one layer; its arrays start as zeros.

        Args:
            kind: ``"int4"``, ``"int8"``, ``"bf16"`` or ``"f32"``.
            keys: int8: uint8 ``[S, H, L/64, W/4, 64, 4]``, 128 above the value. int4: uint8
                ``[S, H, L/64, W/8, 64, 4]``, 8 above the value, the first four of eight dimensions in the low nibbles.
                Else ``[S, H, L/16, W, 16]``.
            values: int8: int8 ``[S, H, L/4, W, 4]``. int4: uint8 ``[S, H, L/8, W, 4]``, 8 above the value, the first
                four of eight tokens in the low nibbles. Else ``[S, H, L, W]``.
            key_scales, value_scales: int4 and int8: bf16 ``[S, H, L]``, one a token and head.
            slots, heads, capacity, head_dim: S, H, L (a multiple of 64) and D (at most 256).
        """

    def linear(
        self, x: Floats, matrix: WeightMatrix, out: Floats, gate: WeightMatrix | None = None, add: bool = False
    ) -> None:
        """``x`` times the matrix, plus its bias.

        With packed weights ``x`` is rounded to eight bits, one scale a token and group of inputs, and sums of a group
        are exact; with plain ones everything is fp32.

        Args:
            x: ``[T, K]``.
            matrix: ``[N, K]``.
            out: ``[T, N]``, receives the result, or has it added.
            gate: A second matrix, with its bias; the result is multiplied by the SiLU of its product.
            add: Add to ``out``.
        """

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats, eps: float, out: Floats) -> None:
        """Layer normalization of ``[T, K]``."""

    def embed(self, ids: npt.NDArray[np.int64], matrix: WeightMatrix, factor: float, out: Floats) -> None:
        """Rows of a table times a factor, ``[T, K]``."""

    def attend(
        self,
        qkv: Floats,
        cache: LayerCache,
        segments: npt.NDArray[np.int64],
        slopes: Floats,
        scale: float,
        out: Floats,
    ) -> None:
        """Append keys and values to the cache, then attend causally with ALiBi.

        With an int8 cache, queries, keys and values are rounded to eight bits, one scale a token and head, and
        probabilities to sixteen; with an int4 cache, keys and values to four bits, of -7 to 7.

        Args:
            qkv: ``[T, 3 * H * D]``.
            cache: Of the layer.
            segments: ``[*, 4]``: row of the first token, slot, its position, and the number of consecutive tokens. What
                the slot holds before that position belongs to the same text.
            slopes: ``[H]``, interpolation included.
            scale: What products of queries and keys are multiplied by.
            out: ``[T, H * D]``.
        """

    def sum_bytes(self, values: npt.NDArray[np.uint8]) -> int:
        """Sum of the bytes (but the last up to 255 of every mebibyte): reads memory as fast as the machine can."""

    def set_threads(self, threads: int) -> None:
        """Work on so many threads; idle ones sleep."""

    def threads(self) -> int:
        """Number of threads."""

    def paths(self) -> list[str]:
        """Instruction paths that this machine can run, the fastest first."""

    def path(self) -> str:
        """The instruction path in use."""

    def use_path(self, name: str) -> None:
        """Use another path."""
