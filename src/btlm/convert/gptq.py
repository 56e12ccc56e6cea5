"""Rounding that keeps the outputs of a matrix: GPTQ (arXiv 2210.17323), then coordinate descent on the same error.

The error is ``tr(E H E^T)`` for the difference ``E`` of the weights and the second moments ``H`` of the inputs: the
mean squared error of the outputs. GPTQ rounds one input after the other and makes good the error of each with those
that are still to be rounded. Coordinate descent goes over all of them again, with all others rounded, and lets the
scales follow; no step of it makes the error larger.

Letters: N outputs, K inputs, G groups of inputs, g inputs of a group.
"""

import torch
from torch import Tensor

from .rounding import levels, reciprocal, search_scales, usable_scale

# Rows of the second moments that are summed at a time.
_PANEL = 1024
# Times that coordinate descent goes over all inputs.
SWEEPS = 3
# Added to the diagonal of H as a part of its mean, the least that lets it be factored.
_DAMPING = (0.01, 0.1, 1.0)


class Moments:
    """Second moments of the inputs of a matrix.

    Args:
        size: K, with padding; the inputs that are never given are zeros.
        device: Where the sum is kept.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self._sum_KK = torch.zeros(size, size, device=device)
        self._count = 0

    def add(self, inputs: Tensor) -> None:
        """Count inputs, fp32 ``[..., at most K]``."""
        inputs = inputs.flatten(0, -2)
        for start in range(0, inputs.shape[1], _PANEL):  # of a symmetric matrix, the lower triangle and some above it
            end = min(start + _PANEL, inputs.shape[1])
            self._sum_KK[start:end, :end].addmm_(inputs[:, start:end].T, inputs[:, :end])
        self._count += len(inputs)

    def hessian(self) -> Tensor:
        """Their mean, fp32 ``[K, K]``; ends the counting."""
        mean_KK = self._sum_KK.div_(self._count)
        for start in range(_PANEL, len(mean_KK), _PANEL):
            end = start + _PANEL
            mean_KK[:start, start:end] = mean_KK[start:end, :start].T
        return mean_KK


def inverse_factor(hessian_KK: Tensor) -> tuple[Tensor, float]:
    """The upper triangle ``U`` with ``H^-1 = U^T U``, and what was added to the diagonal of H for it.

    Args:
        hessian_KK: fp32 ``[K, K]``; its diagonal gets the damping.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    mean = hessian_KK.diagonal().mean().item()
    added = 0.0
    for part in _DAMPING:
        damping = part * mean or 1.0
        hessian_KK.diagonal().add_(damping - added)
        added = damping
        # Of H in reverse order, whose lower triangle is the upper one of H = R R^T: then U is the inverse of R.
        factor, failed = torch.linalg.cholesky_ex(hessian_KK.flip(0, 1))
        if not failed:
            inverse = torch.eye(len(factor), device=factor.device)
            torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
            return inverse.flip(0, 1), added
    raise ValueError("The activations for the calibration text are not finite; the weights may be damaged.")


def gptq(
    weight_NK: Tensor, hessian_KK: Tensor, factor_KK: Tensor, bits: int, group_size: int, *, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """Round weights so that their outputs change little.

    Args:
        weight_NK: fp32 ``[N, K]``.
        hessian_KK: H, damped, fp32 ``[K, K]``.
        factor_KK: Of :func:`inverse_factor`.
        bits: 4 or 8.
        group_size: Inputs that share a scale.
        sweeps: Of coordinate descent.

    Returns:
        uint8 ``[N, K]`` and fp32 ``[N, G]`` as of :func:`btlm.convert.rounding.round_weights` and
        :func:`btlm.convert.rounding.search_scales`.
    """
    # Inputs are rows here: what is worked on at a time is contiguous.
    weight_KN = weight_NK.T.contiguous()
    q_KN, scale_GN = _round_in_order(weight_KN.clone(), factor_KK, bits, group_size)
    if sweeps:
        _descend(weight_KN, q_KN, scale_GN, hessian_KK, bits, sweeps)
    q_NK = q_KN.T.add(2 ** (bits - 1)).to(torch.uint8, memory_format=torch.contiguous_format)
    return q_NK, scale_GN.T.contiguous()


def output_error(weight_NK: Tensor, values_NK: Tensor, hessian_KK: Tensor, damping: float) -> float:
    """Root mean square of the change of the outputs over that of the outputs, without biases.

    Args:
        weight_NK: Before, fp32 ``[N, K]``.
        values_NK: After.
        hessian_KK: Damped.
        damping: What to leave out of its diagonal.
    """

    def size(matrix_NK: Tensor) -> float:
        damped = ((matrix_NK @ hessian_KK) * matrix_NK).sum()
        return max(0.0, (damped - damping * matrix_NK.square().sum()).item())

    outputs = size(weight_NK)
    return float((size(values_NK - weight_NK) / outputs) ** 0.5) if outputs else 0.0


def _round_in_order(weight_KN: Tensor, factor_KK: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """GPTQ: fp32 ``q - 2 ** (bits - 1)`` ``[K, N]`` and scales ``[G, N]``; uses the weights up."""
    low, high = levels(bits)
    diagonal_K = factor_KK.diagonal()
    num_inputs, num_outputs = weight_KN.shape
    q_KN = torch.empty_like(weight_KN)
    scale_GN = weight_KN.new_empty(num_inputs // group_size, num_outputs)
    for start in range(0, num_inputs, group_size):
        end = start + group_size
        block_gN = weight_KN[start:end]
        factor_gg = factor_KK[start:end, start:end]
        # An error e of an input costs (e / U_kk)^2 once the inputs after it have made good what they can.
        importance_g = diagonal_K[start:end] ** -2
        scale_N = search_scales(block_gN.T.contiguous(), bits, group_size, importance_g)[:, 0]
        inverse_N = reciprocal(scale_N)
        errors_gN = torch.empty_like(block_gN)
        for k in range(group_size):
            q_N = q_KN[start + k]
            torch.mul(block_gN[k], inverse_N, out=q_N).round_().clamp_(low, high)
            torch.sub(block_gN[k], q_N * scale_N, out=errors_gN[k]).div_(factor_gg[k, k])
            block_gN[k + 1 :].addr_(factor_gg[k, k + 1 :], errors_gN[k], alpha=-1)
        scale_GN[start // group_size] = scale_N
        weight_KN[end:].addmm_(factor_KK[start:end, end:].T, errors_gN, alpha=-1)
    return q_KN, scale_GN


def _descend(weight_KN: Tensor, q_KN: Tensor, scale_GN: Tensor, hessian_KK: Tensor, bits: int, sweeps: int) -> None:
    """Coordinate descent on rounded weights and scales, in place."""
    low, high = levels(bits)
    group_size = len(q_KN) // len(scale_GN)
    # H E: minus half the gradient of the error by the values.
    values_KN = (q_KN.view(len(scale_GN), group_size, -1) * scale_GN[:, None]).view(q_KN.shape)
    slope_KN = hessian_KK @ values_KN.neg_().add_(weight_KN)
    del values_KN
    for start in [*range(0, len(q_KN), group_size)] * sweeps:
        end = start + group_size
        hessian_gg, q_gN, scale_N = hessian_KK[start:end, start:end], q_KN[start:end], scale_GN[start // group_size]
        before_gN = q_gN * scale_N
        slope_gN = slope_KN[start:end].clone()
        # The best scale for the integers as they are. The error is quadratic in the scale, and the one before is one of
        # bf16's numbers too, so that the nearest of them is never worse.
        along_N = (q_gN * slope_gN).sum(dim=0)
        curvature_N = (q_gN * (hessian_gg @ q_gN)).sum(dim=0)
        change_N = usable_scale(scale_N + along_N / curvature_N.clamp(min=torch.finfo(torch.float32).tiny)) - scale_N
        scale_N += change_N
        slope_gN -= hessian_gg @ (q_gN * change_N)
        inverse_N = reciprocal(scale_N)
        for k in range(group_size):
            best_N = q_gN[k] * scale_N + slope_gN[k] / hessian_gg[k, k]
            new_N = best_N.mul_(inverse_N).round_().clamp_(low, high)
            slope_gN.addr_(hessian_gg[:, k], (new_N - q_gN[k]) * scale_N, alpha=-1)
            q_gN[k] = new_N
        slope_KN -= hessian_KK[:, start:end] @ (q_gN * scale_N - before_gN)
