"""What the native kernels and those in torch offer to the interface."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .arrays import Array, Floats, Halves


class Implementation(Protocol):
    """What :class:`btlm.kernels.Kernels` runs on: arguments are as there, and already checked.

    ``matrix`` and ``cache`` return what the operations of the implementation expect in place of a
    :class:`btlm.kernels.WeightMatrix` and a :class:`btlm.kernels.Cache`.
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
        """A matrix; see :meth:`btlm.kernels.Kernels.matrix`."""

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
        """A cache over the arrays of :class:`btlm.kernels.Cache`; ``capacity`` is its length, rounded up to blocks."""

    def linear(self, x: Floats, matrix: Any, out: Floats, gate: Any, add: bool) -> None:
        """See :meth:`btlm.kernels.Kernels.linear`."""

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats, eps: float, out: Floats) -> None:
        """See :meth:`btlm.kernels.Kernels.layer_norm`."""

    def embed(self, ids: npt.NDArray[np.int64], matrix: Any, factor: float, out: Floats) -> None:
        """See :meth:`btlm.kernels.Kernels.embed`."""

    def attend(
        self, qkv: Floats, cache: Any, segments: npt.NDArray[np.int64], slopes: Floats, scale: float, out: Floats
    ) -> None:
        """See :meth:`btlm.kernels.Kernels.attend`."""

    def sum_bytes(self, values: npt.NDArray[np.uint8]) -> int:
        """See :meth:`btlm.kernels.Kernels.sum_bytes`."""
