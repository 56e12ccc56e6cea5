import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from btlm.data import Document, read_documents

RECORDS = [
    {"text": "first\nline two", "meta": {"redpajama_set_name": "RedPajamaBook"}},
    {"text": "zweitens: ä, 🙂, \u2028 is no end of a line", "meta": {}},
    {"text": "third", "meta": None, "id": 3},
    {"text": ""},
]
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
DOCUMENTS = [
    Document("first\nline two", "RedPajamaBook"),
    Document("zweitens: ä, 🙂, \u2028 is no end of a line", "part"),
    Document("third", "part"),
    Document("", "part"),
]


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "part.jsonl": bytes,
    "part.jsonl.gz": gzip.compress,
    "part.jsonl.zst": zstd,
}


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["no end of the last line", "ends of all lines"])
def test_every_form_of_jsonl_holds_the_same_documents(tmp_path: Path, name: str, end: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(PACK[name](JSONL.rstrip(b"\n") + end))
    assert list(read_documents([file])) == DOCUMENTS
    assert list(read_documents([str(file)])) == DOCUMENTS


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    file = tmp_path / "part.jsonl"
    file.write_bytes(JSONL.replace(b"\n", b"\r\n"))
    assert list(read_documents([file])) == DOCUMENTS


def test_a_file_of_several_zstandard_frames_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "part.jsonl.zst"
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    cut = len(JSONL) // 3  # within a line
    file.write_bytes(skippable + zstd(JSONL[:cut]) + zstd(b"") + skippable + zstd(JSONL[cut:]))
    assert list(read_documents([file])) == DOCUMENTS


def test_files_larger_than_a_buffer(tmp_path: Path) -> None:
    noise = random.Random(0)
    texts = [noise.randbytes(500_000 if i == 7 else i % 500).hex() for i in range(1000)]
    file = tmp_path / "large.jsonl.zst"
    file.write_bytes(zstd("\n".join(json.dumps({"text": text}) for text in texts).encode()))
    assert file.stat().st_size > 4 * 2**17
    assert [document.text for document in read_documents([file])] == texts


def test_a_text_file_is_one_document_with_plain_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "Moby Dick.old.txt"
    file.write_bytes("Call me\r\nIshmaël.\n".encode())
    assert list(read_documents([file])) == [Document("Call me\nIshmaël.\n", "Moby Dick")]


def test_a_folder_is_read_in_the_order_of_names_at_any_depth(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "b.jsonl").mkdir(parents=True)  # a folder in spite of its name
    (folder / "b.jsonl" / "x.txt").write_text("x")
    (folder / "c.txt").write_text("c")
    (folder / "a.txt").write_text("a")
    (folder / "README.md").write_text("no document")
    last = tmp_path / "last.txt"
    last.write_text("last")
    texts = [document.text for document in read_documents([folder, last])]
    assert texts == ["a", "x", "c", "last"]


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "part.jsonl"
    file.write_bytes(JSONL + b"{broken\n")
    documents = read_documents([file])
    assert [next(documents) for _ in DOCUMENTS] == DOCUMENTS
    with pytest.raises(ValueError, match=r"line 5"):
        next(documents)


# What cannot be read

BAD_LINES = {
    "cut off": b'{"text": "a',
    "no JSON": b"text",
    "empty line": b"",
    "no text": b'{"meta": {}}',
    "list": b'["text"]',
    "string": b'"text"',
    "number": b"1",
    "null": b"null",
    "text is null": b'{"text": null}',
    "text is a number": b'{"text": 1}',
    "text is a list": b'{"text": ["a"]}',
    "source is a number": b'{"text": "a", "meta": {"redpajama_set_name": 1}}',
    "not UTF-8": b'{"text": "\xff"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16-le"),
    "half a surrogate pair": b'{"text": "\\ud83d"}',
}


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named(tmp_path: Path, name: str, line: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(PACK[name](b'{"text": "good"}\n' * 2 + line + b'\n{"text": "good"}\n'))
    with pytest.raises(ValueError, match=r'^\S+, line 3: not a JSON object in UTF-8 with a string "text"\.$') as caught:
        list(read_documents([file]))
    assert str(file) in str(caught.value)
    assert type(caught.value) is ValueError


MANY = "".join(json.dumps({"text": f"{i} {i * i}"}) + "\n" for i in range(10_000)).encode()
compressed = pytest.mark.parametrize("name", ["part.jsonl.gz", "part.jsonl.zst"])


@compressed
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.9, "all but the checksum"])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, name: str, kept: float | str) -> None:
    packed = PACK[name](MANY)
    file = tmp_path / name
    file.write_bytes(packed[: int(len(packed) * kept)] if isinstance(kept, float) else packed[:-3])
    read: list[Document] = []
    with pytest.raises(ValueError, match=r"damaged or cut off \(.+\)\.$") as caught:
        read.extend(read_documents([file]))
    assert str(caught.value).startswith(f"{file}, line {len(read) + 1}: ")
    assert read == [Document(json.loads(line)["text"], "part") for line in MANY.splitlines()[: len(read)]]


@compressed
def test_a_file_that_is_not_compressed_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(JSONL)
    with pytest.raises(ValueError, match=r"line 1: damaged") as caught:
        list(read_documents([file]))
    assert str(file) in str(caught.value)


@compressed
@pytest.mark.parametrize("start", [10, 10_000], ids=["first block", "middle"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, start: int) -> None:
    packed = bytearray(PACK[name](MANY))
    assert len(packed) > 2 * start
    packed[start : start + 64] = b"\xff" * 64
    file = tmp_path / name
    file.write_bytes(packed)
    with pytest.raises(ValueError, match=r"^\S+, line \d+: ") as caught:
        list(read_documents([file]))
    assert str(file) in str(caught.value)


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("eins\r\nzwei\r\ndrei ä\r\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"^\S+latin\.txt, line 3: not UTF-8\.$") as caught:
        list(read_documents([file]))
    assert type(caught.value) is ValueError


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist; give"):
        list(read_documents([tmp_path / "nowhere.jsonl"]))


@pytest.mark.parametrize("name", ["data.parquet", "data.json", "data", "data.txt.zst"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=rf"{name} is not \.jsonl"):
        list(read_documents([tmp_path / name]))
