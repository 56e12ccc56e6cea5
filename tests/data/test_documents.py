import gzip
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from btlm.data.documents import Document, Problem, list_units, read_unit
from btlm.data.recipe import Read

LINES = [
    {"text": "first", "meta": {"redpajama_set_name": "Web"}},
    {"text": "second\nline", "id": 7, "source": "Books"},
    {"text": "third é"},
]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}
DOCUMENTS = [
    Document("first", "a.b{suffix}:1", "Web"),
    Document("second\nline", "7", "Books"),
    Document("third é", "a.b{suffix}:3", "a"),
]


def read(*inputs, **settings):
    options = Read(**settings)
    return [item for unit in list_units(inputs, options)[0] for item in read_unit(unit, options)]


def jsonl(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def problems(items):
    return [item for item in items if isinstance(item, Problem)]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.compress),
        (".jsonl.gz", lambda raw: gzip.compress(raw[:20]) + gzip.compress(raw[20:])),
        (".jsonl.zst", lambda raw: zstandard.compress(raw[:20]) + zstandard.compress(raw[20:])),
        (".jsonl", lambda raw: raw.rstrip(b"\n")),
        (".jsonl", lambda raw: raw.replace(b"\n", b"\r\n")),
    ],
)
def test_json_lines(tmp_path, suffix, compress):
    (tmp_path / f"a.b{suffix}").write_bytes(compress(jsonl(*LINES)))
    expected = [document._replace(id=document.id.format(suffix=suffix)) for document in DOCUMENTS]
    assert read(tmp_path / f"a.b{suffix}") == expected


def test_lines_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm.data.documents._CHUNK", 7)
    (tmp_path / "a.jsonl").write_bytes(jsonl(*LINES))
    assert [document.text for document in read(tmp_path / "a.jsonl")] == ["first", "second\nline", "third é"]


def test_parquet(tmp_path):
    columns = {"text": ["first", "second"], "meta": [{"redpajama_set_name": "Web", "other": 1}, None], "unused": [1, 2]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        Document("first", "a.parquet:1", "Web"),
        Document("second", "a.parquet:2", "a"),
    ]


def test_a_folder_of_text_files(tmp_path):
    folder = tmp_path / "novels"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.txt").write_text("first")
    (folder / "deep/c.txt").write_text("third")
    (folder / "notes.pdf").write_bytes(b"ignored")
    assert read(folder) == [
        Document("first", "novels/a.txt", "novels"),
        Document("second", "novels/b.txt", "novels"),
        Document("third", "novels/deep/c.txt", "deep"),
    ]
    assert read(folder / "a.txt") == [Document("first", "a.txt", "novels")]
    assert list_units([folder], Read())[1] == [str(folder / "notes.pdf")]


def test_hidden_files_are_skipped_and_counted(tmp_path):
    folder = tmp_path / ".corpus"  # which is given, and may be hidden
    hidden = ["._a.jsonl", ".a.jsonl.swp", ".ipynb_checkpoints/a.jsonl", "deep/.b.txt", ".git/deep/c.jsonl"]
    for name in ["a.jsonl", *hidden]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jsonl({"text": name}))
    assert [document.text for document in read(folder)] == ["a.jsonl"]
    _, others, skipped = list_units([folder], Read())
    assert (others, sorted(skipped)) == ([], sorted(str(folder / name) for name in hidden))
    # A hidden file is read where it is given itself.
    assert [document.text for document in read(folder / "._a.jsonl")] == ["._a.jsonl"]


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jsonl").write_bytes(jsonl({"text": "text"}))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/link").symlink_to(tmp_path / "elsewhere")
    assert [document.text for document in read(tmp_path / "corpus")] == ["text"]


def test_many_text_files_make_several_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm.data.documents._TEXT_FILES", 3)
    names = [f"{i}.txt" for i in range(7)]
    for name in names:
        (tmp_path / name).write_text(name)
    assert [len(unit.paths) for unit in list_units([tmp_path], Read())[0]] == [3, 3, 1]
    assert [document.text for document in read(tmp_path)] == names


def test_a_source_may_be_a_number_and_is_not_empty(tmp_path):
    sources: list[dict[str, Any]] = [
        {"source": 7},
        {"source": "", "meta": {"redpajama_set_name": "Web"}},
        {"source": ["x"]},
        {"source": None},
    ]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": "text"} | source for source in sources)))
    assert [document.source for document in read(tmp_path)] == ["7", "Web", "a", "a"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_the_longest_document(tmp_path, name):
    text = "é" + "ab" * 499  # 1,000 bytes of UTF-8
    (tmp_path / name).write_bytes(jsonl({"text": text}) if name == "a.jsonl" else text.encode())
    assert [document.text for document in read(tmp_path, max_document_bytes=1000)] == [text]
    (problem,) = read(tmp_path, max_document_bytes=999)
    assert problem.reason == "1,000 bytes of text, more than read.max_document_bytes"


def test_a_hugging_face_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for i in range(2):
        (tmp_path / f"set/data-{i}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / f"set/data-{i}.jsonl").write_bytes(
            jsonl({"text": f"text {i}", "meta": {"redpajama_set_name": "Web"}})
        )
    given = f"hf://{tmp_path}/set"
    assert len(list_units([given], Read())[0]) == 2
    assert [(document.text, document.source) for document in read(given)] == [("text 0", "Web"), ("text 1", "Web")]
    assert len({document.id for document in read(given)}) == 2
    (tmp_path / "set/data-0.jsonl").write_bytes(b'{"text": \n')
    *_, problem = sorted(read(given), key=lambda item: isinstance(item, Problem))
    assert problem.reason.startswith("the rest of the shard cannot be read")
    with pytest.raises(ValueError, match="not a data set that can be read"):
        read(f"hf://{tmp_path}/nowhere")


def test_fields_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"content": {"body": "text"}, "url": "u", "set": "s"}))
    settings = {"text_field": "content.body", "id_field": "url", "source_fields": ["none", "set"]}
    assert read(tmp_path, **settings) == [Document("text", "u", "s")]


def test_one_name_for_all_sources(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*LINES))
    assert {document.source for document in read(tmp_path, source="mine")} == {"mine"}


@pytest.mark.parametrize("name", ["a.json", "A.JSONL", "a.json.gz", "a.json.zst"])
def test_other_names_of_json_lines(tmp_path, name):
    (tmp_path / name).write_bytes(COMPRESS.get(name.rpartition(".")[2], bytes)(jsonl(*LINES)))
    assert len(read(tmp_path)) == 3


def test_blank_lines_and_a_byte_order_mark_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl({"text": "one"}, b"", b" \r", {"text": "two"}) + b"\n")
    assert [document.text for document in read(tmp_path)] == ["one", "two"]


def test_a_file_that_is_given_twice_is_read_once(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(*LINES))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert len(read("corpus", "corpus/", "./corpus/a.jsonl", folder, "link")) == 3


def test_of_two_names_of_a_file_the_first_counts(tmp_path):
    """It is a part of ids, so it must not depend on the order of a set, which differs between processes."""
    for i in range(8):
        (tmp_path / f"{i}-a.jsonl").write_bytes(jsonl({"text": "text"}))
        (tmp_path / f"{i}-b.jsonl").symlink_to(tmp_path / f"{i}-a.jsonl")
    given = [tmp_path / f"{i}-{name}.jsonl" for name in "ba" for i in range(8)]
    assert [document.id for document in read(*given)] == [f"{i}-a.jsonl:1" for i in range(8)]


def test_the_output_of_a_stage_is_no_folder_of_documents(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/a.jsonl").write_bytes(jsonl(*LINES))
    (tmp_path / "in/deep/begun.json").write_text("{}")
    with pytest.raises(ValueError, match="deep is the output of a data stage"):
        read(tmp_path / "in")


def test_what_is_well_compressed_is_read_in_pieces(tmp_path):
    """A line of 300 MB, compressed to 10 kB, is refused without being held in memory."""
    raw = b'{"text": "' + b"x" * 300_000_000 + b'"}\n' + jsonl({"text": "after"})
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    del raw
    tracemalloc.start()
    problem, after = read(tmp_path / "a.jsonl.zst", max_document_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert after.text == "after"
    assert problem.reason.startswith("a line of more than")
    assert peak < 30_000_000


def test_a_window_larger_than_usual(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    raw = zstandard.ZstdCompressor(compression_params=parameters).compress(jsonl(*LINES))
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    assert len(read(tmp_path)) == 3


def test_the_order_of_the_inputs_has_no_influence(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl({"text": name}))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert read(*paths) == read(*paths[::-1]) == read(*paths, *paths)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON in UTF-8"),
        (b'{"text": "\xff"}', "not JSON in UTF-8"),
        (b'{"text": "\\ud800"}', "not JSON in UTF-8"),
        (b'["text"]', "no JSON object"),
        (b"{}", "no text in the field 'text'"),
        (b'{"text": null}', "no text in the field 'text'"),
        (b'{"text": 3}', "no text in the field 'text'"),
        (b'{"text": "a\\u0000b"}', "a null byte in the text"),
        (b'{"text": "aaaaaaaaaa\\n"}', "one character repeated 10 times"),
        (json.dumps({"text": "ab" * 600}).encode(), "1,200 bytes of text, more than read.max_document_bytes"),
    ],
)
def test_a_bad_line_is_told_with_its_place_and_the_rest_is_read(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "before"}, line, {"text": "after"}))
    before, problem, after = read(tmp_path / "a.jsonl", max_document_bytes=1000)
    assert (before.text, after.text) == ("before", "after")
    assert (problem.file, problem.line) == ("a.jsonl", 2)
    assert problem.reason.startswith(reason)


def test_a_document_of_100_megabytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"word " * 20_000_000 + b'"}\n' + jsonl({"text": "after"}))
    problem, after = read(tmp_path / "a.jsonl")
    assert problem == Problem("a.jsonl", 1, "100,000,000 bytes of text, more than read.max_document_bytes")
    assert after.text == "after"


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm.data.documents._CHUNK", 100)
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "before"}, b"x" * 100_000, {"text": "after"}))
    before, problem, after = read(tmp_path / "a.jsonl", max_document_bytes=1000)
    assert (before.text, after.text) == ("before", "after")
    assert problem == Problem("a.jsonl", 2, "a line of more than 6,100 bytes")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_an_empty_file(tmp_path, name):
    compress = COMPRESS.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(compress(b""))
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    assert read(tmp_path / name) == [Problem(name, 0, "an empty file")]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_off(tmp_path, suffix, compress, share):
    rows = [{"text": f"{i} {i * 7919 % 1000003}"} for i in range(3000)]
    raw = compress(jsonl(*rows))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(raw[: int(len(raw) * share)])
    *documents, problem = read(tmp_path / f"a.jsonl{suffix}")
    assert [document.text for document in documents] == [row["text"] for row in rows[: len(documents)]]
    assert problem.line == len(documents) + 1
    assert problem.reason.startswith("the rest of the file is damaged or cut off")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_of_another_format(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is something else entirely " * 9)
    (problem,) = read(tmp_path / name)
    assert problem.reason.startswith("the rest of the file is damaged or cut off")


def test_text_that_is_no_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    assert read(tmp_path / "a.txt") == [Problem("a.txt", 2, "not UTF-8")]


def test_text_that_is_too_long(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 600)
    (problem,) = read(tmp_path / "a.txt", max_document_bytes=1000)
    assert problem.reason == "1,200 bytes of text, more than read.max_document_bytes"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", r"missing.jsonl does not exist; give files or folders of \.jsonl, "),
        ("Folders", r"Folders does not exist: did you mean .*folder\?$"),
        ("a.pdf", "is not one of .jsonl"),
        ("folder", "holds no file that ends in"),
    ],
)
def test_input_that_is_none(tmp_path, name, message):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        list_units([tmp_path / name], Read())


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_progress_adds_up_to_the_size_of_the_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rows = [{"text": f"document {i} {i * 7919 % 1000003}"} for i in range(3000)]
    compress = COMPRESS.get(suffix.rpartition(".")[2], bytes)
    path.write_bytes(compress(jsonl(*rows)))
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    (unit,) = list_units([path], Read())[0]
    steps: list[int] = []
    list(read_unit(unit, Read(), steps.append))
    assert sum(steps) == unit.bytes == path.stat().st_size
