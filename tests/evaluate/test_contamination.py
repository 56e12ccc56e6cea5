"""Questions in training text."""

import numpy as np
import pytest

from btlm.checkpoint import BUNDLED_MODEL, Checkpoint
from btlm.data.shards import write_manifest, write_shard
from btlm.evaluate import contamination as module
from btlm.evaluate.contamination import Contamination, contamination


@pytest.fixture(scope="module")
def tokenizer():
    return Checkpoint.open(BUNDLED_MODEL).tokenizer


def words(first, number):
    return " ".join(f"w{i}" for i in range(first, first + number))


@pytest.fixture
def shards(tmp_path, tokenizer):
    """Three documents of 200 words that all differ."""
    documents = [(np.array(tokenizer.encode(f"{words(200 * i, 200)}").ids), 0, 1000) for i in range(3)]
    entries = [write_shard(tmp_path, "train-00000", documents)]
    write_manifest(tmp_path, {"train": entries, "validation": []}, ["books"])
    return tmp_path


@pytest.mark.parametrize("chunk", [64, 2**20])
def test_questions_that_share_an_ngram(shards, tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    read = []
    tasks = {
        "one": [
            {"question": f"No. {words(50, 13)}, or?", "answer": 1},  # found
            {"question": words(50, 12)},  # too short
            {"question": f"{words(195, 5)} {words(300, 12)}"},  # not in this order
            {"question": words(194, 13)},  # the last six words of a document and the first ones of the next
            {"choices": ["a", {"text": words(587, 13).upper().replace(" ", ",  ")}]},  # found: the end of the last one
        ],
        "other": [{"question": words(1000, 30)}],
        "none": [],
    }
    found = contamination(tasks, shards, tokenizer, on_tokens=lambda done, total: read.append((done, total)))
    assert found == {"one": Contamination(2, 4, 5), "other": Contamination(0, 1, 1), "none": Contamination(0, 0, 0)}
    assert sum(done for done, _ in read) == read[0][1]


def test_every_cut_is_read_across(shards, tokenizer, monkeypatch):
    """Each n-gram of the text is found, wherever the pieces are cut."""
    for chunk in (301, 302, 303):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        tasks = {"all": [{"question": words(200 * i + j, 13)} for i in range(3) for j in range(188)]}
        assert contamination(tasks, shards, tokenizer)["all"] == Contamination(564, 564, 564)
