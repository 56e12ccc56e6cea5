from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from btlm.train import loss as loss_module
from btlm.train.loss import linear_cross_entropy, next_token_labels

TOKENS, WIDTH, VOCAB = 37, 12, 53


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(TOKENS, WIDTH, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[::5] = -100
    labels[8:16] = -100  # so that one of the chunks of eight has no label that counts
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden.float() @ weight.T, labels, ignore_index=-100, reduction="sum")


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


# Chunk sizes for 37 tokens: more than all tokens, exactly all tokens, one token, and sizes that leave last chunks of 5,
# 1 and 17.
@pytest.mark.parametrize("chunk", [512, 37, 1, 8, 12, 20])
@pytest.mark.parametrize("uncounted", ["none", "some", "all"])
def test_loss_and_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk: int, uncounted: str
) -> None:
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", chunk)
    hidden, weight, labels = inputs()
    if uncounted != "some":
        labels = labels.clamp(min=0) if uncounted == "none" else torch.full_like(labels, -100)
    expected = plain(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    actual = linear_cross_entropy(hidden, weight, labels)
    assert actual.dtype == torch.float32
    assert actual.shape == ()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (hidden, weight)), expected_grads)


def test_gradients_are_scaled_by_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", 8)
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(plain(hidden, weight, labels) / 29 * 3, (hidden, weight))
    (linear_cross_entropy(hidden, weight, labels) / 29 * 3).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_gradients_accumulate_over_passes() -> None:
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(plain(hidden, weight, labels), weight)[0]
    for part, target in zip(hidden.split(10), labels.split(10), strict=True):
        linear_cross_entropy(part, weight, target).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = inputs(scale=1e3)
    expected = plain(hidden, weight, labels)
    actual = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(actual, expected)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(actual, (hidden, weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("with_grad", [True, False])
def test_the_form_for_gpus_never_waits_and_agrees(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float, with_grad: bool
) -> None:
    """The large scale makes probabilities of targets too small for their log."""
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", 8)

    def compute() -> tuple[Tensor, ...]:
        hidden, weight, labels = inputs(dtype, scale)
        with torch.set_grad_enabled(with_grad), Operations() as operations:
            loss = linear_cross_entropy(hidden, weight, labels)
            if with_grad:
                loss.backward()
        waits.append(bool(WAITING & operations.names))
        return (loss, hidden.grad, weight.grad) if hidden.grad is not None and weight.grad is not None else (loss,)

    waits: list[bool] = []
    on_cpu = compute()
    monkeypatch.setattr(loss_module, "_may_wait_for", lambda device: False)
    on_gpu = compute()
    assert waits == [True, False]
    torch.testing.assert_close(on_gpu[0], on_cpu[0], rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=0)
    torch.testing.assert_close(on_gpu[1:], on_cpu[1:], rtol=0, atol=0)


# Operations whose results, or the sizes of them, Python has to know.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item"}


class Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [512, 8])
def test_without_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", chunk)
    hidden, weight, labels = inputs()
    with torch.no_grad():
        actual = linear_cross_entropy(hidden, weight, labels)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, plain(hidden, weight, labels).detach())


@pytest.mark.parametrize("chunk", [512, 8])
def test_bfloat16_is_close(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", chunk)
    hidden, weight, labels = inputs(torch.bfloat16)
    expected = plain(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    actual = linear_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad(actual, (hidden, weight))
    assert actual.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(actual, expected, rtol=5e-3, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative(grad, expected_grad.float()) < 1e-2


class LargestTensor(TorchDispatchMode):
    """Largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("with_grad", [True, False])
def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch, with_grad: bool) -> None:
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", 4)
    hidden, weight, labels = inputs()
    with LargestTensor() as largest, torch.set_grad_enabled(with_grad):
        loss = linear_cross_entropy(hidden, weight, labels)
        if with_grad:
            loss.backward()
    assert largest.numel == VOCAB * WIDTH, "the gradient of the weight, or the weight"
    with LargestTensor() as largest:
        plain(hidden, weight, labels)
    assert largest.numel == TOKENS * VOCAB, "the test would have noticed the full logits"


def test_labels_are_the_next_tokens_of_each_row() -> None:
    labels = next_token_labels(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert labels.tolist() == [[2, 3, -100], [5, 6, -100]]


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(plain(hidden, weight, labels), hidden)[0]
    frozen = weight.detach()
    linear_cross_entropy(hidden, frozen, labels).backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert frozen.grad is None


def test_the_first_token_of_a_document_is_not_predicted() -> None:
    labels = next_token_labels(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]]))
    assert labels.tolist() == [[2, -100, 4, -100], [-100, -100, 8, -100]]
