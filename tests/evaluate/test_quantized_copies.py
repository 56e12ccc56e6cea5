import math

import numpy as np
import pytest

from btlm.checkpoint import BUNDLED_MODEL
from btlm.evaluate import quantized_copies
from btlm.evaluate.quantized_copies import Quality, calibration_text, compare_copies
from btlm.model.tokenization_btlm import load_tokenizer
from tests.data.tiny import write_documents, write_streams


def test_copies_are_compared_with_the_original_in_transformers(monkeypatch, tmp_path):
    """Each copy is made only after the previous one has been measured."""
    nats = {"original": (2.0, 2.1), "a": (2.5, 2.6), "b": (3.0, 3.1)}
    happened = []

    def measure(index):
        def loss(checkpoint, shards, context, tokens):
            assert (context, tokens) == (32, 80)
            happened.append(f"measured {checkpoint.name}")
            value = nats[checkpoint.name][index]
            return {"nats_per_token": {"books": 0.0, "mean": value}, "bits_per_byte": {"books": 0.0, "mean": value / 4}}

        return loss

    def make(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        happened.append(f"made {name}")
        return name

    def copies():
        yield from map(make, ("a", "b"))

    monkeypatch.chdir(tmp_path)
    given = write_streams(tmp_path / "shards", {"books": (np.arange(9), np.arange(9))})
    monkeypatch.setattr(quantized_copies, "ENGINES", {"transformers": measure(0), "engine": measure(1)})
    rows = list(compare_copies(make("original"), copies(), given, 32, 80))
    for row, values in zip(rows, nats.values(), strict=True):
        for quality, value in zip(row.values(), values, strict=True):
            expected = Quality(math.exp(value), math.exp(value - 2.0) - 1, value / 4)
            assert quality == pytest.approx(expected)
    steps = ["made original", "measured original", "made a", "measured a", "made b", "measured b"]
    assert list(dict.fromkeys(happened)) == steps


def test_every_engine_measures_a_folder(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2000, 40)
    (row,) = compare_copies(BUNDLED_MODEL, [], write_streams(tmp_path / "shards", {"books": (ids, ids)}), 32, 40)
    assert list(row) == ["transformers", "engine", "engine, int4 cache"]
    assert row["transformers"].change == 0
    assert all(abs(quality.change) < 0.2 for quality in row.values())
    assert len({quality.perplexity for quality in row.values()}) == 3


def test_no_held_out_text_is_an_error(tmp_path):
    shards = write_streams(tmp_path / "shards", {"books": (np.arange(50), np.arange(0))})
    with pytest.raises(ValueError, match="no held-out text"):
        next(compare_copies(BUNDLED_MODEL, [], shards, 32, 40))


def test_calibration_text_is_training_text_of_every_source(tmp_path):
    texts = {"books": ["One book.", "Another book."], "code": ["x = 1"]}
    encode = load_tokenizer().encode
    documents = [(source, [*encode(text), 50256]) for source, of in texts.items() for text in of]
    held_out = [("books", [*encode("Never seen."), 50256])]
    shards = write_documents(tmp_path / "shards", {"train": [documents], "validation": [held_out]})
    assert calibration_text(shards, 1000).split("\n\n") == ["One book.", "Another book.", "", "x = 1", ""]
