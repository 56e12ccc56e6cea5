import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from btlm.checkpoint import BUNDLED_MODEL
from btlm.evaluate.held_out import engine_loss, transformers_loss
from btlm.train.held_out import token_bytes
from tests.data.tiny import write_streams

CONTEXT, TOKENS = 32, 80


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    rng = np.random.default_rng(0)
    books, code = rng.integers(0, 2000, 100), rng.integers(0, 2000, 40)
    streams = {"books": (books, books), "code": (code, code), "empty": (code, code[:0])}
    return write_streams(tmp_path_factory.mktemp("shards") / "shards", streams)


@pytest.fixture(scope="module")
def in_transformers(shards):
    return transformers_loss(BUNDLED_MODEL, shards, CONTEXT, TOKENS)


def test_loss_is_that_of_the_rows(shards, in_transformers):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    nats_by_source, bits_by_source = {}, {}
    for source in ("books", "code"):
        ids = shards.source_tokens("validation", source, TOKENS).astype(np.int64)
        nats, predicted = 0.0, []
        for start in range(0, len(ids), CONTEXT):
            row = torch.from_numpy(ids[start : start + CONTEXT])[None]
            with torch.no_grad():
                nats += float(model(row, labels=row).loss) * (row.shape[1] - 1)
            predicted += row[0, 1:].tolist()
        nats_by_source[source] = nats / len(predicted)
        bits_by_source[source] = nats / math.log(2) / token_bytes()[predicted].sum()
    for unit, expected in (("nats_per_token", nats_by_source), ("bits_per_byte", bits_by_source)):
        expected["mean"] = (expected["books"] + expected["code"]) / 2
        assert in_transformers[unit] == pytest.approx(expected, rel=1e-4)


def test_the_engine_finds_nearly_the_same(shards, in_transformers):
    """With quantized weights, as in the bundled model, the engine rounds activations to eight bits."""
    found = engine_loss(BUNDLED_MODEL, shards, CONTEXT, TOKENS)
    for unit, expected in in_transformers.items():
        assert found[unit] == pytest.approx(expected, rel=0.01)


def test_the_cache_matters_to_the_engine(shards):
    losses = [engine_loss(BUNDLED_MODEL, shards, CONTEXT, TOKENS, cache_dtype=dtype) for dtype in ("int4", "float32")]
    assert losses[0] != losses[1]


def test_no_held_out_text_is_no_loss(tmp_path):
    empty = write_streams(tmp_path / "shards", {"books": (np.arange(50), np.arange(0))})
    assert engine_loss(BUNDLED_MODEL, empty, CONTEXT, TOKENS) == {}
    assert transformers_loss(BUNDLED_MODEL, empty, CONTEXT, TOKENS) == {}
