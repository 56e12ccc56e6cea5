import hashlib
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from btlm.data import shards as shards_module
from btlm.data.shards import TokenShards, tokenizer_sha256, write_manifest, write_shard
from tests.data.tiny import vocabulary_files, write_documents

END_OF_TEXT = 50256
SUFFIXES = (".bin", ".offsets.npy", ".sources.npy")
DOCUMENTS: list[tuple[ArrayLike, int, int]] = [
    ([1, 2, 3], 1, 30),
    ([], 0, 0),
    (np.array([50255], dtype=np.uint16), 1, 7),
    (np.arange(9), 0, 90),
]


# write_shard


def test_a_shard_holds_its_documents(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, "train-00003", DOCUMENTS)
    names = [f"train-00003{suffix}" for suffix in SUFFIXES]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    expected = [1, 2, 3, END_OF_TEXT, END_OF_TEXT, 50255, END_OF_TEXT, *range(9), END_OF_TEXT]
    assert (tmp_path / names[0]).read_bytes() == b"".join(token.to_bytes(2, "little") for token in expected)
    offsets, sources = (np.load(tmp_path / name) for name in names[1:])
    assert (offsets.dtype, offsets.tolist()) == (np.int64, [0, 4, 5, 7, 17])
    assert (sources.dtype, sources.tolist()) == (np.uint16, [1, 0, 1, 0])
    assert entry == {
        "name": "train-00003",
        "documents": 4,
        "bytes": 127,
        "tokens": 17,
        "sha256": {s: hashlib.sha256((tmp_path / f"train-00003{s}").read_bytes()).hexdigest() for s in SUFFIXES},
        "sources": {
            "1": {"documents": 2, "bytes": 37, "tokens": 6},
            "0": {"documents": 2, "bytes": 90, "tokens": 11},
        },
    }
    assert json.loads(json.dumps(entry)) == entry, "the entry survives being stored as JSON"
    (tmp_path / "again").mkdir()
    assert write_shard(tmp_path / "again", "train-00003", iter(DOCUMENTS)) == entry


def test_a_shard_without_documents(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, "test-00000", [])
    assert (entry["documents"], entry["bytes"], entry["tokens"], entry["sources"]) == (0, 0, 0, {})
    assert (tmp_path / "test-00000.bin").read_bytes() == b""
    assert np.load(tmp_path / "test-00000.offsets.npy").tolist() == [0]
    assert np.load(tmp_path / "test-00000.sources.npy").shape == (0,)


def test_documents_are_held_one_at_a_time(tmp_path: Path) -> None:
    seen: list[weakref.ref[NDArray[np.int64]]] = []

    def documents() -> Iterator[tuple[NDArray[np.int64], int, int]]:
        for _ in range(50):
            assert sum(ref() is not None for ref in seen) <= 1
            seen.append(weakref.ref(ids := np.arange(100)))
            yield ids, 0, 1
            del ids

    assert write_shard(tmp_path, "train-00000", documents())["documents"] == 50


def test_a_shard_appears_when_it_is_complete(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[list[int], int, int]]:
        yield [1], 0, 1
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path, "train-00000", failing())
    assert list(tmp_path.iterdir()) == []
    write_shard(tmp_path, "train-00000", DOCUMENTS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path, "train-00000", failing())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ids", [[1, END_OF_TEXT, 2], [50257], [70_000]])
def test_text_has_no_end_of_text_and_no_token_beyond_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(AssertionError, match="end-of-text"):
        write_shard(tmp_path, "train-00000", [(ids, 0, 1)])


# write_manifest


def write_all(folder: Path) -> dict[str, Any]:
    """Two shards of training documents, one of validation, none of test."""
    folder.mkdir()
    entries = {
        "train": [write_shard(folder, f"train-{i:05d}", DOCUMENTS[i : i + 3]) for i in range(2)],
        "validation": [write_shard(folder, "validation-00000", DOCUMENTS[:1])],
        "test": [],
    }
    return write_manifest(folder, entries, ["books", "code"], {"recipe": {"seed": 3}})


def test_the_manifest_sums_what_is_there(tmp_path: Path) -> None:
    manifest = write_all(tmp_path / "shards")
    assert json.loads((tmp_path / "shards/manifest.json").read_text()) == manifest
    assert len(list((tmp_path / "shards").iterdir())) == 10, "no other file is left"
    train = manifest["splits"]["train"]
    assert {key: train[key] for key in ("documents", "bytes", "tokens", "sources")} == {
        "documents": 6,
        "bytes": 37 + 97,
        "tokens": 7 + 13,
        "sources": {
            "books": {"documents": 3, "bytes": 90, "tokens": 12},
            "code": {"documents": 3, "bytes": 44, "tokens": 8},
        },
    }
    assert [shard["name"] for shard in train["shards"]] == ["train-00000", "train-00001"]
    assert [sorted(shard) for shard in train["shards"]] == [["bytes", "documents", "name", "sha256", "tokens"]] * 2
    assert manifest["splits"]["validation"]["sources"]["books"] == {"documents": 0, "bytes": 0, "tokens": 0}
    assert manifest["splits"]["test"]["tokens"] == 0
    assert manifest["sources"] == ["books", "code"]
    assert manifest["tokenizer"] == {"sha256": tokenizer_sha256(), "vocab_size": 50257, "end_of_text": 50256}
    assert (manifest["format"], manifest["dtype"], manifest["recipe"]) == (1, "uint16", {"seed": 3})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    manifest = write_all(tmp_path / "shards")
    read = TokenShards(tmp_path / "shards")
    assert read.manifest == manifest
    assert [read.num_tokens(split) for split in ("train", "validation", "test", "other")] == [20, 4, 0, 0]
    assert read.tokens("validation", 0, 99).tolist() == [1, 2, 3, END_OF_TEXT]
    assert read.source_tokens("train", "code", 99).tolist() == [1, 2, 3, *[END_OF_TEXT, 50255] * 2, END_OF_TEXT]


def test_the_tokenizer_is_told_by_its_vocabulary() -> None:
    assert tokenizer_sha256() == hashlib.sha256(b"".join(map(Path.read_bytes, vocabulary_files()))).hexdigest()


def test_workers_stay_light() -> None:
    code = "import sys, btlm.data.shards, btlm.data.loader; print(sys.modules.keys() & {'torch', 'transformers'})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# TokenShards


@pytest.fixture
def random_shards(tmp_path: Path) -> tuple[TokenShards, list[tuple[str, list[int]]]]:
    """Shards of 0 to 12 short documents, and all documents in order."""
    rng = np.random.default_rng(0)
    shards: list[list[tuple[str, list[int]]]] = [
        [(str(rng.choice(["a", "b", "c"])), rng.integers(0, 2**16, rng.integers(1, 9)).tolist()) for _ in range(size)]
        for size in (0, 5, 12, 0, 0, 1, 7, 0)
    ]
    read = write_documents(tmp_path / "shards", {"train": shards, "validation": [[("c", [7, 8, 9])]]})
    return read, [document for shard in shards for document in shard]


def stream_of(documents: list[tuple[str, list[int]]]) -> NDArray[np.int64]:
    return np.concatenate([ids for _, ids in documents])


def test_tokens_span_shards(random_shards: tuple[TokenShards, list[tuple[str, list[int]]]]) -> None:
    read, documents = random_shards
    stream = stream_of(documents)
    assert read.num_tokens("train") == len(stream) > 80
    assert read.sources == ["a", "b", "c"]
    for start in range(0, len(stream) + 5, 3):
        for count in (0, 1, 10, 1000):
            tokens = read.tokens("train", start, count)
            assert tokens.dtype == np.uint16
            assert tokens.tolist() == stream[start : start + count].tolist()
    assert read.tokens("test", 0, 10).shape == (0,)


@pytest.mark.parametrize("length", [1, 4, 30, 80])
def test_rows_straddle_shards_and_go_round(
    random_shards: tuple[TokenShards, list[tuple[str, list[int]]]], length: int
) -> None:
    read, documents = random_shards
    stream = stream_of(documents)
    offsets = np.random.default_rng(1).permutation(len(stream))
    rows = read.rows("train", offsets, length)
    assert rows.dtype == np.uint16
    np.testing.assert_array_equal(rows, stream.take(offsets[:, None] + np.arange(length), mode="wrap"))


@pytest.mark.parametrize("count", [0, 1, 4, 30, 80])
def test_document_starts(random_shards: tuple[TokenShards, list[tuple[str, list[int]]]], count: int) -> None:
    read, documents = random_shards
    begins = np.concatenate([np.arange(len(ids)) == 0 for _, ids in documents])
    for start in range(len(begins)):
        starts = read.document_starts("train", start, count)
        assert starts.dtype == np.int64
        assert starts.tolist() == np.flatnonzero(begins.take(range(start, start + count), mode="wrap")).tolist()


@pytest.mark.parametrize("limit", [0, 1, 17, 1000])
def test_tokens_of_a_source(random_shards: tuple[TokenShards, list[tuple[str, list[int]]]], limit: int) -> None:
    read, documents = random_shards
    for source in "abc":
        tokens = read.source_tokens("train", source, limit)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == [token for name, ids in documents if name == source for token in ids][:limit]
    assert read.source_tokens("validation", "a", 5).shape == read.source_tokens("test", "a", 5).shape == (0,)
    assert read.source_tokens("validation", "c", 2).tolist() == [7, 8]


def test_more_shards_than_may_be_open(
    random_shards: tuple[TokenShards, list[tuple[str, list[int]]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_OPEN_MAPS", 2)
    opened = []
    original = TokenShards._open
    monkeypatch.setattr(TokenShards, "_open", lambda self, name: opened.append(name) or original(self, name))  # type: ignore[func-returns-value]
    read = TokenShards(tmp_path / "shards")
    for _ in range(2):
        np.testing.assert_array_equal(read.tokens("train", 0, 1000), stream_of(random_shards[1]))
    assert len(opened) == 8, "each of the 4 shards with tokens has been closed before it is needed again"


def test_the_fingerprint_tells_streams_apart(tmp_path: Path) -> None:
    documents: dict[str, list[list[tuple[str, Any]]]] = {
        "one": [[("a", [1, 2, 3]), ("a", [4])]],
        "another token": [[("a", [1, 2, 3]), ("a", [5])]],
        "other documents": [[("a", [1, 2]), ("a", [3, 4])]],
        "another order": [[("a", [4]), ("a", [1, 2, 3])]],
    }
    found = {name: write_documents(tmp_path / name, {"train": shards}) for name, shards in documents.items()}
    assert len({read.fingerprint("train") for read in found.values()}) == 4
    assert TokenShards(tmp_path / "one").fingerprint("train") == found["one"].fingerprint("train")


# What is refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_all(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(folder: Path, suffix: str) -> None:
    (folder / f"train-00001{suffix}").unlink()
    for verify in (True, False):
        with pytest.raises(ValueError, match=rf"train-00001{suffix} is missing; copy the folder again, or tokenize"):
            TokenShards(folder, verify)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "short": lambda content: content[:-1],
    "long": lambda content: content + b"\0",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_another_size_is_named(folder: Path, suffix: str, change: str) -> None:
    file = folder / f"validation-00000{suffix}"
    before = file.read_bytes()
    file.write_bytes(after := CHANGES[change](before))
    message = rf"^{file} has {len(after)} bytes, not {len(before)}; copy the folder again, or tokenize"
    for verify in (True, False):
        with pytest.raises(ValueError, match=message):
            TokenShards(folder, verify)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_is_named(folder: Path, suffix: str) -> None:
    file = folder / f"train-00001{suffix}"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file} is damaged: its SHA-256 is \w+, not \w+; copy the folder again"):
        TokenShards(folder)
    TokenShards(folder, verify=False)


def test_a_folder_without_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=rf"^{folder} holds no manifest\.json; tokenize documents into it first\.$"):
        TokenShards(folder)
    with pytest.raises(ValueError, match=rf"^There is no folder {folder}/nowhere\.$"):
        TokenShards(folder / "nowhere")


def test_a_folder_with_a_mistyped_name_is_named(folder: Path) -> None:
    wrong = folder.with_name(f"{folder.name}x")
    with pytest.raises(ValueError, match=rf"^There is no folder {wrong}: did you mean {folder}\?$"):
        TokenShards(wrong)


def test_the_folder_around_the_shards_is_no_folder_of_shards(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{folder.parent} holds no manifest\.json: did you mean {folder}\?$"):
        TokenShards(folder.parent)


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "tok', b"[1]", b"\xff\xfe", b'{"format": 1, "tokenizer": 3}'])
def test_a_manifest_that_is_none_is_named(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{folder}/manifest\.json is not a manifest of token shards \(.+\)"):
        TokenShards(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"has format 2, but this version reads 1; tokenize the documents again"),
        ({"format": None}, r"has format None, but this version reads 1; tokenize"),
        ({"tokenizer": {"sha256": "0" * 64}}, r"was written with another tokenizer \(SHA-256 0{64}, BTLM's is \w+\)"),
        ({"tokenizer": {}}, r"was written with another tokenizer \(SHA-256 None"),
    ],
)
def test_a_manifest_of_something_else_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for verify in (True, False):
        with pytest.raises(ValueError, match=rf"^{file} {message}"):
            TokenShards(folder, verify)
