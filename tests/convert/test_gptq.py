from itertools import pairwise

import pytest
import torch

from btlm.convert.gptq import Moments, gptq, inverse_factor, output_error
from btlm.convert.rounding import round_weights, search_scales, values_of


def correlated(tokens, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 4, inputs, generator=generator)
    noise = torch.randn(tokens, inputs, generator=generator)
    return torch.randn(tokens, inputs // 4, generator=generator) @ mixing + 0.3 * noise


@pytest.fixture(scope="module")
def problem():
    inputs = correlated(1024, 256)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    moments = Moments(256)
    moments.add(inputs[:500])
    moments.add(inputs[500:].view(4, 131, 256))
    hessian = moments.hessian()
    torch.testing.assert_close(hessian, inputs.T @ inputs / 1024, rtol=1e-4, atol=1e-3)
    factor, damping = inverse_factor(hessian)
    return weight, inputs, hessian, factor, damping


def damage(weight, values, inputs):
    """Relative error of the outputs."""
    return ((inputs @ (values - weight).T).norm() / (inputs @ weight.T).norm()).item()


def test_the_factor_is_that_of_the_inverse(problem):
    _, inputs, hessian, factor, damping = problem
    assert torch.equal(factor, factor.triu())
    plain = (inputs.T @ inputs / 1024).double()
    assert damping == pytest.approx(0.01 * plain.diagonal().mean().item(), rel=1e-4)
    torch.testing.assert_close(hessian.diagonal(), (plain.diagonal() + damping).float(), rtol=1e-4, atol=1e-4)
    product = factor.double().T @ factor.double() @ hessian.double()
    torch.testing.assert_close(product, torch.eye(256, dtype=torch.float64), rtol=0, atol=1e-3)


def test_the_first_step_is_optimal_brain_surgery(problem):
    """Round the first group one input at a time by the paper's formula (equation 2), with inverses in fp64."""
    weight, _, hessian, factor, _ = problem
    q, scale = gptq(weight, hessian, factor, 4, 128, sweeps=0)
    rest, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    first = scale[:, :1].double()
    for k in range(128):
        rounded = (rest[:, k : k + 1] / first).round().clamp(-8, 7) * first
        # In fp32, a value in the middle between two steps may be rounded to either.
        same = rounded[:, 0] == (q[:, k].double() - 8) * first[:, 0]
        assert same.float().mean() > 0.95
        rounded[:, 0] = (q[:, k].double() - 8) * first[:, 0]
        rest -= (rest[:, k : k + 1] - rounded) * inverse[k] / inverse[k, k]
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [64, 128])
def test_outputs_change_less_than_by_rounding_to_the_nearest(problem, bits, group_size):
    weight, inputs, hessian, factor, _ = problem
    nearest = search_scales(weight, bits, group_size)
    by_nearest = damage(weight, values_of(round_weights(weight, nearest, bits), nearest, bits), inputs)
    damages = []
    for sweeps in (0, 1, 3):
        q, scale = gptq(weight, hessian, factor, bits, group_size, sweeps=sweeps)
        assert q.dtype == torch.uint8
        assert q.is_contiguous()
        assert torch.equal(scale, scale.bfloat16().float())
        assert int(q.max()) < 2**bits
        assert q.min() >= (0 if bits == 4 else 1)
        damages.append(damage(weight, values_of(q, scale, bits), inputs))
    assert damages[0] < 0.6 * by_nearest
    assert damages[2] < damages[1] < damages[0]
    # New inputs from the same distribution.
    assert damage(weight, values_of(q, scale, bits), correlated(512, 256, seed=0)[:256]) < 0.7 * by_nearest


def test_the_error_of_outputs_is_that_of_outputs(problem):
    weight, inputs, hessian, factor, damping = problem
    values = values_of(*gptq(weight, hessian, factor, 4, 128), 4)
    assert output_error(weight, values, hessian, damping) == pytest.approx(damage(weight, values, inputs), rel=1e-3)


def test_inputs_that_never_come_are_rounded_to_the_nearest():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    weight[:, 100:] = 0
    moments = Moments(128)
    moments.add(correlated(300, 80))
    hessian = moments.hessian()
    factor, _ = inverse_factor(hessian)
    q, scale = gptq(weight, hessian, factor, 4, 128)
    assert (q[:, 100:] == 8).all()
    assert torch.equal(q[:, 80:100], round_weights(weight, scale, 4)[:, 80:100])


def test_inputs_that_are_all_zero_leave_the_weights_to_plain_rounding():
    weight = torch.randn(16, 128)
    hessian = torch.zeros(128, 128)
    factor, damping = inverse_factor(hessian)
    q, scale = gptq(weight, hessian, factor, 4, 128)
    assert torch.equal(q, round_weights(weight, scale, 4))
    assert output_error(weight, values_of(q, scale, 4), hessian, damping) == 0


def test_a_singular_hessian_is_damped_until_it_can_be_factored():
    inputs = torch.ones(4, 128) * 1e3
    moments = Moments(128)
    moments.add(inputs)
    factor, _ = inverse_factor(moments.hessian())
    assert factor.isfinite().all()


def test_more_damping_replaces_the_damping_that_was_not_enough():
    hessian = torch.eye(128)
    hessian[0, 0] = -0.05  # as rounding can leave it: a hundredth of the mean is too little, a tenth is enough
    before = hessian.clone()
    factor, damping = inverse_factor(hessian)
    assert factor.isfinite().all()
    assert damping == pytest.approx(0.1 * before.diagonal().mean().item())
    torch.testing.assert_close(hessian, before + damping * torch.eye(128), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_sweep_makes_an_output_worse(problem, bits):
    """The best scale is rounded to bf16, which may leave it worse than the one before."""
    weight, _, hessian, factor, _ = problem
    errors = []
    for sweeps in range(5):
        values = values_of(*gptq(weight, hessian, factor, bits, 64, sweeps=sweeps), bits)
        difference = (values - weight).double()
        errors.append(((difference @ hessian.double()) * difference).sum(dim=1))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-4)).all()


def test_activations_that_are_not_finite_are_named():
    moments = Moments(128)
    moments.add(torch.full((4, 128), torch.inf))
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(moments.hessian())
