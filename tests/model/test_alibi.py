from typing import Any

import pytest
import torch

from btlm.model.alibi import (
    alibi_slopes,
    attention_bias,
    fold_attention_bias,
    interpolated_slopes,
    train_seq_len,
)
from tests.model.reference import press_slopes

FIXED = {"type": "linear", "factor": 4.0}
DYNAMIC = {"type": "linear", "train_seq_len": 8192}


def test_slopes_of_btlm() -> None:
    slopes = alibi_slopes(32)
    assert slopes.dtype == torch.float32
    assert slopes[0].item() == pytest.approx(0.8408964, rel=1e-6)
    assert slopes[-1].item() == 0.00390625
    torch.testing.assert_close(slopes, torch.tensor([2 ** (-8 * (head + 1) / 32) for head in range(32)]))


@pytest.mark.parametrize("n_head", [*range(1, 21), 25, 40, 48, 64, 96, 128])
def test_slopes_are_those_of_press(n_head: int) -> None:
    torch.testing.assert_close(alibi_slopes(n_head), torch.tensor(press_slopes(n_head)), rtol=1e-6, atol=0)


def test_train_seq_len() -> None:
    assert [train_seq_len(value) for value in (None, FIXED, DYNAMIC)] == [None, None, 8192]


@pytest.mark.parametrize(
    ("scaling", "lengths", "factors"),
    [
        (None, [5, 99_999], [1.0]),
        (FIXED, [5, 99_999], [4.0]),
        (DYNAMIC, [1, 8191, 8192, 8193, 16384, 20480], [1.0, 1.0, 1.0, 8193 / 8192, 2.0, 2.5]),
    ],
)
def test_interpolated_slopes(scaling: dict[str, Any] | None, lengths: list[int], factors: list[float]) -> None:
    slopes_H = alibi_slopes(6)
    expected = slopes_H / torch.tensor(factors)[:, None]
    torch.testing.assert_close(interpolated_slopes(slopes_H, scaling, torch.tensor(lengths)), expected)


def test_attention_bias_element_by_element() -> None:
    slopes_BH = torch.rand(2, 3)
    key_mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]], dtype=torch.bool)
    queries = torch.tensor([2, 4])
    bias = attention_bias(slopes_BH, queries, 5, key_mask)
    assert bias.shape == (2, 3, 2, 5)
    for b, h, q, k in torch.cartesian_prod(*map(torch.arange, bias.shape)).tolist():
        i = int(queries[q])
        expected = -slopes_BH[b, h].item() * (i - k)
        if not key_mask[b, k]:
            expected = torch.finfo(torch.float32).min / 2
        if k > i:  # below the value of padding, so that a row of only padding stays causal
            expected = torch.finfo(torch.float32).min
        assert bias[b, h, q, k].item() == pytest.approx(expected, rel=1e-6)


def test_attention_bias_without_slopes_is_only_the_mask() -> None:
    bias = attention_bias(None, torch.tensor([0, 1, 2]), 3, None)
    torch.testing.assert_close(bias[0, 0] == 0, torch.ones(3, 3).tril().bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_head", "head_dim"), [(32, 80), (12, 64), (6, 8)])
@pytest.mark.parametrize("num_keys", [300, 8192, 70_000])
def test_folded_bias_is_exact(dtype: torch.dtype, n_head: int, head_dim: int, num_keys: int) -> None:
    queries = torch.tensor([0, 1, 255, 256, 299, num_keys // 2 + 1, num_keys - 1])
    keys = torch.cat((queries, torch.arange(0, num_keys, 1 + num_keys // 1000), torch.arange(num_keys - 300, num_keys)))
    slopes_H = alibi_slopes(n_head) / 1.3
    query, key = fold_attention_bias(slopes_H[None], queries, num_keys, None, scale=1 / head_dim, dtype=dtype)
    assert query.dtype == key.dtype == dtype
    assert query.isfinite().all()
    assert key.isfinite().all()
    # Compute what a kernel does with only the features: products summed one after another in fp32.
    scores = torch.zeros(n_head, len(queries), len(keys))
    for feature in range(query.shape[-1]):
        scores += query[0, :, :, feature, None].float() * key[0, :, keys, feature].float()
    scores = (scores / head_dim).double()

    distance = (queries[:, None] - keys).double()
    expected = -slopes_H.double()[:, None, None] * distance
    # Softmax depends only on differences: compare with the query's own key, for keys with some weight.
    error = (scores - scores[:, range(len(queries)), range(len(queries))][..., None] - expected).abs()
    weighty = (distance >= 0) & (expected > -30)
    assert weighty.any(-1).all()
    assert error[weighty].max() < 1e-3
    plain = -(slopes_H.to(torch.bfloat16)[:, None, None] * distance.to(torch.bfloat16)).double()
    assert num_keys == 300 or (plain - expected).abs()[weighty].max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_padding_dominates_and_stays_finite(dtype: torch.dtype) -> None:
    key_mask = torch.ones(2, 40, dtype=torch.bool)
    key_mask[1, :7] = False
    query, key = fold_attention_bias(None, torch.arange(40), 40, key_mask, scale=1 / 80, dtype=dtype)
    assert query.isfinite().all()
    assert key.isfinite().all()
    scores = query.float() @ key.float().transpose(-1, -2) / 80
    assert scores.shape == (2, 1, 40, 40)
    assert (scores[0] == 0).all()
    assert (scores[1, :, :, :7] < -1e6).all()
    assert (scores[1, :, :, 7:] == 0).all()


def test_folded_features_stay_few() -> None:
    for num_keys, width in ((2**16, 8), (2**16 + 1, 10)):
        query, key = fold_attention_bias(
            alibi_slopes(4)[None], torch.tensor([3]), num_keys, None, scale=1, dtype=torch.bfloat16
        )
        assert query.shape == (1, 4, 1, width)
        assert key.shape == (1, 1, num_keys, width)
