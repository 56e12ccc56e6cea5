import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from btlm.data.loader import Batch
from btlm.errors import NotFinite
from btlm.model import BTLMLMHeadModel
from btlm.train.distributed import Ranks
from btlm.train.step import LossModel, take_step
from tests.train.tiny import VOCAB_SIZE, tiny_recipe

ALONE = Ranks(torch.device("cpu"))
LENGTH = 24


def network() -> BTLMLMHeadModel:
    torch.manual_seed(0)
    return BTLMLMHeadModel(tiny_recipe().config)


def batch(rows: int, documents: bool = False) -> Batch:
    """Rows with documents of different lengths, which therefore predict different numbers of tokens."""
    rng = np.random.default_rng(1)
    input_ids = rng.integers(0, VOCAB_SIZE, (rows, LENGTH))
    ids = np.stack([np.sort(rng.integers(0, 1 + 3 * row, LENGTH)) for row in range(rows)]).astype(np.int32)
    return Batch(input_ids, ids if documents else None, input_ids.size)


def plain_loss(model: BTLMLMHeadModel, data: Batch) -> Tensor:
    """Mean loss over the predicted tokens of the whole batch, document by document if they are kept apart."""
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for row, ids in enumerate(torch.from_numpy(data.input_ids)):
        documents = [ids]
        if data.document_ids is not None:
            documents = list(ids.split(np.unique(data.document_ids[row], return_counts=True)[1].tolist()))
        for document in documents:
            if len(document) > 1:
                logits = model(document[None], use_cache=False).logits[0, :-1]
                nats = nats + F.cross_entropy(logits.double(), document[1:], reduction="sum")
                count += len(document) - 1
    return nats / count


def step(model: BTLMLMHeadModel, data: Batch, micro_batch_rows: int) -> tuple[Any, dict[str, Tensor]]:
    """The result of a step of plain gradient descent, and the gradient computed from the change of the weights."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = take_step(LossModel(model, torch.float32), optimizer, data, micro_batch_rows * LENGTH, 1e9, ALONE)
    assert all(p.grad is None for p in model.parameters())
    return result, {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("micro_batch_rows", [1, 2, 3, 6])
def test_accumulated_gradients_are_those_of_the_whole_batch(documents: bool, micro_batch_rows: int) -> None:
    data = batch(6, documents)
    model = network()
    loss = plain_loss(model, data)
    expected = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    result, gradient = step(model, data, micro_batch_rows)
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert result.grad_norm == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in expected.values())), rel=1e-5
    )
    for name, wanted in expected.items():
        torch.testing.assert_close(gradient[name], wanted, rtol=1e-4, atol=1e-6)


def test_the_mean_of_micro_batches_would_be_something_else() -> None:
    """The rows above predict different numbers of tokens."""
    data = batch(6, documents=True)
    assert data.document_ids is not None
    parts = [Batch(data.input_ids[i : i + 1], data.document_ids[i : i + 1], 0) for i in range(6)]
    mean = sum(float(plain_loss(network(), part).detach()) for part in parts) / 6
    assert mean != pytest.approx(float(plain_loss(network(), data).detach()), rel=1e-4)


def test_documents_do_not_see_each_other() -> None:
    data = batch(1, documents=False)._replace(document_ids=np.array([[0] * 10 + [1] * 14], dtype=np.int32))
    model = LossModel(network(), torch.float32)
    ids, documents = torch.from_numpy(data.input_ids), torch.from_numpy(data.document_ids)
    embeddings = model.network.transformer.wte(ids).detach().requires_grad_()
    handle = model.network.transformer.wte.register_forward_hook(lambda *_: embeddings)
    model(ids, documents).backward()
    handle.remove()
    assert embeddings.grad is not None
    separate = [part.detach().requires_grad_() for part in embeddings.detach().split([10, 14], dim=1)]
    for part, tokens in zip(separate, ids.split([10, 14], dim=1), strict=True):
        handle = model.network.transformer.wte.register_forward_hook(lambda *_, part=part: part)
        model(tokens).backward()
        handle.remove()
    torch.testing.assert_close(embeddings.grad, torch.cat([part.grad for part in separate], dim=1))


def test_gradients_are_clipped_over_all_parameters() -> None:
    data, model = batch(2), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    result = take_step(LossModel(model, torch.float32), optimizer, data, 2 * LENGTH, 0.25, ALONE)
    assert result.grad_norm > 0.25
    change = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float(change.norm()) == pytest.approx(0.25, rel=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    data, model = batch(3), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    calls = iter([1.0, math.nan, 1.0])
    loss_model = LossModel(model, torch.float32)
    loss_model.register_forward_hook(lambda *args: args[2] * next(calls))
    with pytest.raises(NotFinite, match=r"^loss nan, gradient norm nan; nothing was updated$") as caught:
        take_step(loss_model, optimizer, data, LENGTH, 1.0, ALONE)
    assert [math.isfinite(value) for value in caught.value.losses[0]] == [True, False, True]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = LossModel.forward
    monkeypatch.setattr(LossModel, "forward", lambda *arguments: original(*arguments) + math.inf)
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NotFinite, match=r"loss inf, gradient norm \d"):
        step(model, batch(2), 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
