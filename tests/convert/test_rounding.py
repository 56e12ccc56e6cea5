import pytest
import torch

from btlm.convert.rounding import round_weights, search_scales, values_of


def error(weight, bits, group_size, importance=None, **options):
    """Squared error of each group, weighted with the importance, in fp64."""
    scale = search_scales(weight, bits, group_size, importance, **options)
    assert torch.equal(scale, scale.bfloat16().float())
    difference = (values_of(round_weights(weight, scale, bits), scale, bits) - weight).double().square()
    if importance is not None:
        difference *= importance
    return difference.view(*scale.shape, -1).sum(dim=-1)


def heavy_tailed(outputs, inputs):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs, inputs, generator=generator) ** 3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [64, 128])
def test_no_group_is_worse_than_by_plain_rounding(bits, group_size):
    weight = heavy_tailed(48, 512)
    plain, searched = (error(weight, bits, group_size, search=search) for search in (False, True))
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < (0.8 if bits == 4 else 1.0) * plain.sum()


def test_a_finer_search_finds_little_more():
    """Compare with the best of 4,001 scales of both signs, in fp64."""
    weight = heavy_tailed(4, 64)
    found = error(weight, 4, 64)[:, 0]
    scales = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None, None] * weight.abs().amax(dim=1)[:, None] / 4
    values = (weight.double() / scales).nan_to_num().round().clamp(-8, 7) * scales
    best = (values - weight).square().sum(dim=-1).amin(dim=0)
    assert (found <= best * 1.05).all()


def test_what_counts_more_is_nearer():
    weight = heavy_tailed(64, 128)
    importance = torch.ones(128)
    importance[::8] = 100
    assert (
        error(weight, 4, 128, importance).sum()
        < 0.9
        * (
            values_of(round_weights(weight, search_scales(weight, 4, 128), 4), search_scales(weight, 4, 128), 4)
            - weight
        )
        .square()
        .mul(importance)
        .sum()
    )


def test_a_scale_takes_the_sign_that_spares_the_largest_weight():
    """Four bits have eight steps on one side of zero and seven on the other."""
    weight = torch.linspace(-7, 8, 16).repeat(2, 4)
    weight[1] *= -1
    scale = search_scales(weight, 4, 64)
    assert torch.equal(scale, torch.tensor([[-1.0], [1.0]]))
    assert torch.equal(values_of(round_weights(weight, scale, 4), scale, 4), weight)


@pytest.mark.parametrize(("bits", "middle"), [(4, 8), (8, 128)])
@pytest.mark.parametrize("size", [0.0, 1e-38])
def test_a_group_of_zeros_has_scale_zero(bits, middle, size):
    weight = torch.randn(16, 128)
    weight[3, 64:] = size
    scale = search_scales(weight, bits, 64)
    q = round_weights(weight, scale, bits)
    assert scale[3].tolist() == [scale[3, 0], 0.0]
    assert (q[3, 64:] == middle).all()
    assert (scale != 0).sum() == 31


def test_eight_bits_leave_out_the_value_that_has_no_counterpart():
    weight = torch.randn(64, 128)
    q = round_weights(weight, search_scales(weight, 8, 64) * 0.5, 8)
    assert q.min() == 1
    assert q.max() == 255


def test_threads_change_nothing():
    weight = heavy_tailed(300, 512)
    threads = torch.get_num_threads()
    one = search_scales(weight, 4, 128)
    torch.set_num_threads(3)
    several = search_scales(weight, 4, 128)
    torch.set_num_threads(threads)
    assert torch.equal(one, several)
