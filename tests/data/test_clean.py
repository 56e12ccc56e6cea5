import json
import unicodedata

import pytest

from btlm.data.clean import clean_documents
from btlm.data.parts import part_of, read_rows, read_table
from btlm.data.recipe import Clean, Execution, Read
from btlm.data.stage import open_run


def clean(tmp_path, rows, read=None, settings=None):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else row for row in rows))
    folder = tmp_path / "out/clean"
    with open_run(tmp_path / "out", Execution(workers=1)) as run:
        stage = clean_documents([tmp_path / "a.jsonl"], folder, read or Read(), settings or Clean(), run)
    tables = [read_table(folder / "documents" / name).to_pylist() for name, _, _ in stage["parts"]]
    return stage, [row for table in tables for row in table]


def test_text_is_normalized_before_it_is_measured(tmp_path):
    decomposed = unicodedata.normalize("NFD", "é" * 199 + "x")
    assert len(decomposed) == 399
    stage, documents = clean(tmp_path, [{"text": decomposed}, {"text": "é" * 199 + "-!"}, {"text": "keep " * 50}])
    assert [document["text"] for document in documents] == ["é" * 199 + "x", "keep " * 50]
    assert documents[0]["bytes"] == 399
    assert stage["sources"]["a"] == {
        "documents": 3,
        "bytes": 598 + 400 + 250,
        "clean_documents": 2,
        "clean_bytes": 399 + 250,
        "short_documents": 1,
        "short_bytes": 400,
    }


@pytest.mark.parametrize(("letters", "kept"), [(199, False), (200, True)])
def test_the_filter_counts_letters_without_punctuation_and_with_single_spaces(tmp_path, letters, kept):
    text = " .\n" * 300 + "a, " * 99 + "B" * (letters - 198) + " !" * 300
    _, documents = clean(tmp_path, [{"text": text}, {"text": "other " * 50}])
    assert (documents[0]["text"] == text) is kept


def test_parts_are_bounded_and_documents_are_numbered_by_their_place(tmp_path):
    rows = [{"text": f"document {i} " * 40} for i in range(50)]
    stage, documents = clean(tmp_path, rows, Read(part_bytes=4000))
    assert len(stage["parts"]) > 5
    assert all(number > 0 for _, number, _ in stage["parts"])
    assert all(size < 4000 + 600 for _, _, size in stage["parts"])
    assert [document["text"] for document in documents] == [row["text"] for row in rows]
    for document in documents:
        found = read_rows(tmp_path / "out/clean/documents" / part_of(document["document"]), document["document"])
        assert found["text"].to_pylist() == [document["text"]]


@pytest.mark.parametrize(
    ("limits", "read", "parts"),
    [
        ({}, Read(part_bytes=1), [1] * 7),
        ({"_PART_DOCUMENTS": 3}, Read(), [3, 3, 1]),
        ({"_PART_DOCUMENTS": 7}, Read(), [7]),
    ],
)
def test_documents_per_part(tmp_path, monkeypatch, limits, read, parts):
    for name, value in limits.items():
        monkeypatch.setattr(f"btlm.data.parts.{name}", value)
    stage, _ = clean(tmp_path, [{"text": f"{i} text " * 50} for i in range(7)], read)
    assert [number for _, number, _ in stage["parts"]] == parts


def test_more_parts_than_can_be_numbered_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm.data.parts._PART_BITS", 1)
    with pytest.raises(ValueError, match=r"A file has more than 2 parts; raise read.part_bytes"):
        clean(tmp_path, [{"text": f"{i} text " * 50} for i in range(3)], Read(part_bytes=1))


def test_bad_documents_are_counted_and_listed(tmp_path):
    stage, documents = clean(tmp_path, [{"text": "good " * 50}, "bad\n", {"text": None}])
    assert len(documents) == 1
    assert stage["sources"]["a"]["documents"] == 1
    listed = (tmp_path / "out/clean/problems/000000.jsonl").read_text().splitlines()
    assert [(json.loads(line)["file"], json.loads(line)["line"]) for line in listed] == [("a.jsonl", 2), ("a.jsonl", 3)]
    assert "a.jsonl, line 2: not JSON in UTF-8" in (tmp_path / "out/log.txt").read_text()


def test_what_is_skipped_is_said(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": "good " * 50}) + "\n")
    for name in (".b.jsonl", "._a.jsonl", "notes.pdf"):
        (folder / name).write_text("bad\n")
    with open_run(tmp_path / "out", Execution(workers=1)) as run:
        clean_documents([folder], tmp_path / "out/clean", Read(), Clean(), run)
    log = (tmp_path / "out/log.txt").read_text()
    assert f"Files of unknown kinds were skipped: 1, such as {folder}/notes.pdf" in log
    assert f"Files that are hidden were skipped: 2, such as {folder}/._a.jsonl" in log
    assert "bad documents" not in log


def test_too_many_bad_documents_end_the_stage_with_one_line(tmp_path):
    rows = ["bad\n"] * 5 + [{"text": "good " * 50}]  # the fourth is not read
    with pytest.raises(
        ValueError, match=r"^3 bad documents, more than read.max_bad_documents \(2\); the first: a.jsonl, line 1"
    ):
        clean(tmp_path, rows, Read(max_bad_documents=2))


def test_the_limit_counts_all_files_together(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("bad\nbad\n" + json.dumps({"text": "good " * 50}) + "\n")
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    folder = tmp_path / "out/clean"
    with open_run(tmp_path / "out", Execution(workers=1)) as run:
        with pytest.raises(ValueError, match="4 bad documents"):
            clean_documents(inputs, folder, Read(max_bad_documents=3), Clean(), run)
        assert not (folder / "stage.json").exists()
        # The result does not depend on the limit, so with a higher limit the same command continues.
        stage = clean_documents(inputs, folder, Read(max_bad_documents=4), Clean(), run)
    assert len(stage["parts"]) == 2


def test_more_sources_than_shards_can_tell_apart_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("btlm.data.clean.MAX_SOURCES", 2)
    rows = [{"text": f"{i} text " * 50, "source": str(i)} for i in range(3)]
    stage, _ = clean(tmp_path, rows[:2])
    assert len(stage["sources"]) == 2
    (tmp_path / "more").mkdir()
    with pytest.raises(ValueError, match="The documents have 3 sources, more than the 2 that shards can tell apart"):
        clean(tmp_path / "more", rows)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No document is left"):
        clean(tmp_path, [{"text": "short"}])
