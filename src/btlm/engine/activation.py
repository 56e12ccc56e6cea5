"""The activations of feed-forward layers without a gate, in fp32.

A number's result depends on that number alone: it has the same bits whatever else is in the array.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_ROWS = 16  # that are worked on together, so that what lies between stays in the cache


def activate(name: str, x: Floats) -> None:
    """Apply an activation in place.

    Args:
        name: ``"gelu"``, ``"gelu_new"``, ``"gelu_pytorch_tanh"``, ``"relu"`` or ``"silu"``, as Transformers has them.
        x: fp32 ``[T, F]``; NaN stays NaN.
    """
    function = _FUNCTIONS[name]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for start in range(0, len(x), _ROWS):
            part = x[start : start + _ROWS]
            part[:] = function(part)


def _gelu(x: Floats) -> Floats:
    """``x Phi(x)``; the error function is formula 7.1.26 of Abramowitz and Stegun, exact to 1.5e-7."""
    z = np.abs(x, dtype=np.float64) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * polynomial * np.exp(-z * z)  # 1 - Phi(|x|)
    result: Floats = (x * np.where(x < 0, tail, 1 - tail)).astype(np.float32)
    return result


def _gelu_tanh(x: Floats) -> Floats:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * (x * x * x))
    result: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return result


def _relu(x: Floats) -> Floats:
    result: Floats = np.maximum(x, np.float32(0))
    return result


def _silu(x: Floats) -> Floats:
    result: Floats = x / (1 + np.exp(-x))
    return result


_FUNCTIONS = {"gelu": _gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "relu": _relu, "silu": _silu}
