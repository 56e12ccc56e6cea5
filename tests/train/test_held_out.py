import math
from pathlib import Path

import pytest
import torch

from btlm.data.shards import TokenShards
from btlm.model import BTLMLMHeadModel
from btlm.train import evaluate_held_out
from btlm.train.distributed import Ranks
from btlm.train.step import LossModel
from tests.data.tiny import write_streams
from tests.train.tiny import TOKEN_BYTES, tiny_recipe, tiny_shards

ALONE = Ranks(torch.device("cpu"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.mark.parametrize("rows_per_pass", [1, 2])
def test_held_out_loss(shards: TokenShards, rows_per_pass: int) -> None:
    torch.manual_seed(0)
    model = BTLMLMHeadModel(tiny_recipe({"resid_pdrop": 0.5}).config).train()
    actual = evaluate_held_out(LossModel(model, torch.bfloat16), shards, 32, 100, TOKEN_BYTES, ALONE, rows_per_pass)
    assert model.training, "training mode is restored"
    model.eval()
    expected: dict[str, dict[str, float]] = {"nats_per_token": {}, "bits_per_byte": {}}
    # Books give 100 of 150 tokens, in rows of 32, 32, 32 and 4; code gives all 70, in rows of 32, 32 and 6.
    for source, lengths in (("books", (32, 32, 32, 4)), ("code", (32, 32, 6))):
        stream, nats, size = shards.source_tokens("validation", source, 1000).tolist(), 0.0, 0
        for length in lengths:
            row, stream = stream[:length], stream[length:]
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                log_probs = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
            for position, token in enumerate(row[1:]):
                nats -= float(log_probs[position, token])
                size += int(TOKEN_BYTES[token])
        expected["nats_per_token"][source] = nats / (sum(lengths) - len(lengths))
        expected["bits_per_byte"][source] = nats / math.log(2) / size
    for unit, by_source in expected.items():
        by_source["mean"] = (by_source["books"] + by_source["code"]) / 2
        assert actual[unit] == pytest.approx(by_source, rel=1e-5)
        assert list(actual[unit]) == ["books", "code", "mean"]


def test_sources_without_held_out_text_are_left_out(tmp_path: Path) -> None:
    shards = write_streams(
        tmp_path / "shards", {"a": (range(99), [3, 4, 5, 6]), "b": (range(99), []), "c": (range(99), [7])}
    )
    model = BTLMLMHeadModel(tiny_recipe().config)
    result = evaluate_held_out(LossModel(model, torch.float32), shards, 16, 100, TOKEN_BYTES, ALONE)["bits_per_byte"]
    assert list(result) == ["a", "mean"]
    assert result["a"] == result["mean"]


def test_held_out_documents_are_kept_apart_where_training_keeps_them_apart(tmp_path: Path) -> None:
    end = len(TOKEN_BYTES) - 1
    texts = [[5, 6, 7, 8, end], [9, 3, end]]
    shards = write_streams(tmp_path / "shards", {"a": (range(99), [token for text in texts for token in text])})
    torch.manual_seed(0)
    model = BTLMLMHeadModel(tiny_recipe().config).eval()
    loss_model = LossModel(model, torch.float32)
    actual = evaluate_held_out(loss_model, shards, 32, 100, TOKEN_BYTES, ALONE, mask_documents=True)
    nats, predicted = 0.0, [token for text in texts for token in text[1:]]
    for text in texts:
        with torch.no_grad():
            log_probs = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
        nats -= float(log_probs[range(len(text) - 1), text[1:]].sum())
    assert actual["nats_per_token"]["a"] == pytest.approx(nats / len(predicted), rel=1e-5)
    assert actual["bits_per_byte"]["a"] == pytest.approx(nats / math.log(2) / TOKEN_BYTES[predicted].sum(), rel=1e-5)
