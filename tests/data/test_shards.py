import copy
import hashlib
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from btlm.data import Document, TokenShards, write_shards
from btlm.model.tokenization_btlm import load_tokenizer
from tests.data.tiny import write_streams

END_OF_TEXT = 50256
TEXTS = [f"Document {i}: ünïcode 🙂\n" + "word " * i for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer().backend_tokenizer


def documents(texts: list[str], source: str = "web") -> list[Document]:
    return [Document(text, source) for text in texts]


def decoded(folder: Path, source: str, split: str, tokenizer: Tokenizer) -> list[str]:
    """Texts of a stream, read without the code under test."""
    ids = np.fromfile(folder / f"{source}.{split}.bin", dtype="<u2").tolist()
    assert not ids or ids[-1] == END_OF_TEXT
    ends = [-1, *(i for i, token in enumerate(ids) if token == END_OF_TEXT)]
    return [tokenizer.decode(ids[a + 1 : b], skip_special_tokens=False) for a, b in pairwise(ends)]


# write_shards


def test_streams_decode_to_the_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "deep" / "shards"
    write_shards(documents(TEXTS), folder, tokenizer, holdout=0.1, batch=7)
    train, valid = (decoded(folder, "web", split, tokenizer) for split in ("train", "valid"))
    assert len(valid) == 4
    assert sorted(train + valid) == sorted(TEXTS)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "web.train.bin", "web.valid.bin"]
    assert [path.name for path in folder.parent.iterdir()] == ["shards"]


def test_the_smallest_hashes_are_held_out_whatever_the_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    for name, texts in (("one", TEXTS), ("two", shuffled)):
        write_shards(documents(texts), tmp_path / name, tokenizer, holdout=0.25)
    by_hash = sorted(TEXTS, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert sorted(decoded(tmp_path / "one", "web", "valid", tokenizer)) == sorted(by_hash[:10])
    for file in ("web.train.bin", "web.valid.bin", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(("holdout", "held_out"), [(0.0, 0), (1e-9, 1), (0.01, 1), (0.5, 20)])
def test_share_that_is_held_out(tmp_path: Path, tokenizer: Tokenizer, holdout: float, held_out: int) -> None:
    manifest = write_shards(documents(TEXTS), tmp_path / "shards", tokenizer, holdout=holdout)
    counts = manifest["sources"]["web"]
    assert (counts["valid"]["documents"], counts["train"]["documents"]) == (held_out, 40 - held_out)
    assert len(decoded(tmp_path / "shards", "web", "valid", tokenizer)) == held_out


def test_exact_copies_are_dropped_within_a_source(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["same", "other", "same", "two\nlines", "two\r\nlines", "Same"]
    manifest = write_shards(
        [*documents(texts, "a"), *documents(["same"], "b")], tmp_path / "shards", tokenizer, holdout=0
    )
    assert sorted(decoded(tmp_path / "shards", "a", "train", tokenizer)) == ["Same", "other", "same", "two\nlines"]
    assert decoded(tmp_path / "shards", "b", "train", tokenizer) == ["same"]
    assert manifest["sources"]["a"]["train"]["documents"] == 4


def test_manifest_counts_what_is_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "shards"
    returned = write_shards([*documents(TEXTS, "web"), *documents(TEXTS[:5], "code")], folder, tokenizer, holdout=0.2)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == returned
    assert manifest["holdout"] == 0.2
    assert manifest["tokenizer_sha256"] == hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    assert sorted(manifest["sources"]) == ["code", "web"]
    for source, splits in manifest["sources"].items():
        assert sorted(splits) == ["train", "valid"]
        for split, counts in splits.items():
            texts = decoded(folder, source, split, tokenizer)
            assert counts == {
                "documents": len(texts),
                "bytes": sum(len(text.encode()) for text in texts),
                "tokens": sum(len(tokenizer.encode(text).ids) + 1 for text in texts),
            }


def test_a_spelled_out_special_token_stays_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "GPT-2 ends a document with <|endoftext|>, as BTLM does.<|endoftext|>"
    assert END_OF_TEXT in tokenizer.encode(text).ids, "otherwise there is nothing to prevent"
    write_shards(documents([text]), tmp_path / "shards", tokenizer, holdout=0)
    assert decoded(tmp_path / "shards", "web", "train", tokenizer) == [text]
    assert END_OF_TEXT in tokenizer.encode(text).ids, "the tokenizer of the caller is left as it was"


def test_other_texts_have_the_ids_of_the_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "  def f(x):\n\treturn x < | endoftext | > 3 \n\n Ünïcode 🙂 don't <|im_start|> 12345"
    write_shards(documents([text]), tmp_path / "shards", tokenizer, holdout=0)
    ids = np.fromfile(tmp_path / "shards" / "web.train.bin", dtype="<u2").tolist()
    assert ids == [*tokenizer.encode(text).ids, END_OF_TEXT]


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def unread() -> Iterator[Document]:
        raise AssertionError
        yield

    with pytest.raises(ValueError, match=r"exists; give a new folder"):
        write_shards(unread(), tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="holds no documents"):
        write_shards([], tmp_path / "shards", tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["a/b", "../up", "/etc/x"])
def test_a_source_that_is_no_file_name_is_an_error(tmp_path: Path, tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(ValueError, match=rf"'{source}': not usable in a file name"):
        write_shards([*documents(TEXTS[:2]), Document("x", source)], tmp_path / "deep" / "shards", tokenizer)
    assert list(tmp_path.rglob("*")) == []


class Failing:
    """A tokenizer whose disk is full at the third batch."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.batches = tokenizer, 0

    def __deepcopy__(self, memo: object) -> "Failing":
        return self

    def to_str(self) -> str:
        return str(self.tokenizer.to_str())

    def encode_batch_fast(self, texts: list[str]) -> Any:
        self.batches += 1
        if self.batches == 3:
            raise OSError("disk full")
        return self.tokenizer.encode_batch_fast(texts)


def test_the_folder_appears_only_when_it_is_complete(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "shards"
    with pytest.raises(OSError, match="disk full"):
        write_shards(documents(TEXTS), folder, Failing(tokenizer), batch=8)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["shards.partial"]
    (tmp_path / "shards.partial" / "leftover.train.bin").touch()
    write_shards(documents(TEXTS), folder, tokenizer, holdout=0)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "web.train.bin", "web.valid.bin"]
    assert sorted(decoded(folder, "web", "train", tokenizer)) == sorted(TEXTS)


def test_a_failure_at_the_very_end_leaves_no_folder(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("btlm.data.shards.json.dumps", fail)
        with pytest.raises(OSError, match="disk full"):
            write_shards(documents(TEXTS), tmp_path / "shards", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["shards.partial"]
    write_shards(documents(TEXTS), tmp_path / "shards", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


# TokenShards


def test_streams_are_read_as_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(documents(TEXTS), tmp_path / "shards", tokenizer, holdout=0)
    read = TokenShards(tmp_path / "shards")
    assert read.sources == ["web"]
    assert read.tokens("web", "train").tolist() == np.fromfile(tmp_path / "shards/web.train.bin", dtype="<u2").tolist()
    assert read.tokens("web", "valid").shape == (0,)
    assert read.tokens("web", "train").dtype == np.uint16


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path} holds no manifest\.json"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("change", ["missing", "one token short", "half a token", "one token long", "empty"])
def test_a_shard_of_another_length_is_refused_by_name(tmp_path: Path, change: str) -> None:
    write_streams(tmp_path / "shards", {"a": (range(10), range(5)), "b": (range(20), range(5))})
    file = tmp_path / "shards" / "b.train.bin"
    content = file.read_bytes()
    file.unlink()
    if change != "missing":
        new = {"one token short": content[:-2], "half a token": content[:-1], "one token long": content + b"00"}
        file.write_bytes(new.get(change, b""))
    with pytest.raises(ValueError, match=r"/b\.train\.bin is missing or does not hold 20 tokens"):
        TokenShards(tmp_path / "shards")


# rows and batch


@pytest.fixture
def three(tmp_path: Path) -> TokenShards:
    """Three sources, none a multiple of a row, whose streams have no token in common."""
    return write_streams(
        tmp_path / "three",
        {"a": (range(10_007), []), "b": (range(20_000, 27_003), []), "c": (range(40_000, 44_001), [])},
    )


def read_tokens(shards: TokenShards, stages: list[tuple[int, int]], rows: list[NDArray[np.int64]]) -> list[list[int]]:
    return [shards.batch(part, length).reshape(-1).tolist() for (length, _), part in zip(stages, rows, strict=True)]


STAGES: list[tuple[list[tuple[int, int]], dict[str, float]]] = [
    ([(16, 6400), (64, 3200)], {"a": 3, "b": 2, "c": 1}),
    ([(64, 3200), (16, 6400)], {"a": 3, "b": 2, "c": 1}),
    ([(8, 2000), (32, 2000), (128, 2560)], {"a": 0.5, "b": 0.25, "c": 0.25}),
    ([(32, 9000)], {"a": 1}),
    ([(32, 32)], {"a": 1, "b": 1, "c": 1}),
    ([(32, 160)], {"a": 1, "b": 1}),
    ([(32, 96), (64, 1600)], {"a": 1.0, "b": 0.0, "c": 1e-9}),
    ([(16, 1600)], {"a": 0.1, "b": 0.7, "c": 0.2}),
    ([(7, 5000), (7, 5000)], {"a": 10, "b": 7, "c": 4}),
]


@pytest.mark.parametrize(("stages", "weights"), STAGES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_of_a_run(three: TokenShards, stages: list[tuple[int, int]], weights: dict[str, float], seed: int) -> None:
    rows = three.rows(stages, weights, seed)
    total_weight = sum(weights.values())
    for (length, tokens), part in zip(stages, rows, strict=True):
        assert part.dtype == np.int64
        assert len(part) >= tokens // length, "enough for every step of the stage"
        assert len(part) <= tokens // length + len(three.sources)
        for index, source in enumerate(three.sources):
            share = tokens / length * weights.get(source, 0) / total_weight
            assert abs((part[:, 0] == index).sum() - share) < 1
            if not share:
                assert index not in part[:, 0]
    seen = [token for part in read_tokens(three, stages, rows) for token in part]
    assert len(seen) == sum(length * len(part) for (length, _), part in zip(stages, rows, strict=True))
    assert len(set(seen)) == len(seen), "no token twice"


def test_rows_follow_the_seed(three: TokenShards) -> None:
    stages, weights = STAGES[0]
    first, again, other = (three.rows(stages, weights, seed) for seed in (1, 1, 2))
    for one, two, three_ in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, two)
        assert (one != three_).any(axis=1).mean() > 0.9


def test_rows_are_shuffled_over_sources_and_offsets(three: TokenShards) -> None:
    for part in three.rows(*STAGES[0], seed=1):
        for half in np.array_split(part, 2):
            assert set(half[:, 0]) == {0, 1, 2}
        offsets = part[part[:, 0] == 0, 1]
        assert 0.3 < (np.diff(offsets) > 0).mean() < 0.7
        assert len(set(offsets)) == len(offsets)
        assert offsets.max() > 8000, "from the whole stream"


def test_a_later_stage_does_not_change_the_rows_of_an_earlier_one(three: TokenShards) -> None:
    weights = {"a": 1.0, "b": 1.0}
    (alone,) = three.rows([(64, 3200)], weights, 1)
    first, _ = three.rows([(64, 3200), (64, 1600)], weights, 1)
    np.testing.assert_array_equal(alone, first)


def test_a_source_can_be_read_to_its_last_unit(three: TokenShards) -> None:
    (rows,) = three.rows([(64, 10_007 // 64 * 64)], {"a": 1.0}, 1)
    assert sorted(rows[:, 1]) == list(range(0, 10_007 - 64, 64))


@pytest.mark.parametrize("stages", [[(64, 10_048)], [(64, 6400), (64, 6400)], [(16, 5000), (64, 6400)]])
def test_more_tokens_than_a_source_holds_are_an_error(three: TokenShards, stages: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"^a has 9,984 training tokens, fewer than its share"):
        three.rows(stages, {"a": 1.0}, 1)


def test_an_unknown_source_is_an_error(three: TokenShards) -> None:
    with pytest.raises(ValueError, match=r"^No source named d, e in the shards; they have a, b, c\.$"):
        three.rows([(16, 64)], {"a": 1.0, "e": 1.0, "d": 0.0}, 1)


def test_lengths_that_do_not_divide_the_longest_are_an_error(three: TokenShards) -> None:
    with pytest.raises(ValueError, match=r"Rows of 64 tokens cannot be cut into rows of 24, 48\."):
        three.rows([(48, 480), (64, 640), (24, 480), (16, 64)], {"a": 1.0}, 1)


def test_a_batch_is_cut_from_the_streams(three: TokenShards) -> None:
    rows = np.array([[1, 0], [0, 9997], [2, 123], [1, 0]])
    batch = three.batch(rows, 10)
    assert batch.dtype == np.int64
    assert batch.tolist() == [
        [*range(20_000, 20_010)],
        [*range(9997, 10_007)],
        [*range(40_123, 40_133)],
        [*range(20_000, 20_010)],
    ]


def test_rows_of_every_length_come_from_the_same_shards(three: TokenShards) -> None:
    for length in (2, 100, 1000):
        stages = [(length, 4 * length)]
        rows = three.rows(stages, {"b": 1.0}, 3)
        for row in three.batch(rows[0], length):
            assert row.tolist() == list(range(row[0], row[0] + length))


def test_the_copy_of_a_tokenizer_encodes_alike(tokenizer: Tokenizer) -> None:
    """What write_shards relies on when it works on a copy."""
    twin = copy.deepcopy(tokenizer)
    assert [twin.encode(text).ids for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
