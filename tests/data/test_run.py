import json
from pathlib import Path

import pytest

from btlm.data import TokenShards
from btlm.data.run import tokenize


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    records = [{"text": f"Page {i}.", "meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}} for i in range(1200)]
    (folder / "web.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "novel.txt").write_text("It was a dark and stormy night.")
    return folder


def test_tokenize_writes_shards_and_prints_what_they_hold(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenize([corpus / "web.jsonl", str(corpus / "novel.txt")], tmp_path / "shards", holdout=0.25)
    shards = TokenShards(tmp_path / "shards")
    assert shards.sources == ["RedPajamaCommonCrawl", "novel"]
    assert shards.manifest["holdout"] == 0.25
    captured = capsys.readouterr()
    assert captured.out == ""
    rows = [line.replace("│", " ").split() for line in captured.err.splitlines()]
    for source, splits in shards.manifest["sources"].items():
        for split, counts in splits.items():
            numbers = [f"{counts[key]:,}" for key in ("documents", "bytes", "tokens")]
            assert [source, split, *numbers] in rows
    assert ["RedPajamaCommonCrawl", "train", "900"] in [row[:3] for row in rows]


def test_a_folder_is_an_input(tmp_path: Path, corpus: Path) -> None:
    tokenize([corpus], tmp_path / "shards")
    assert TokenShards(tmp_path / "shards").sources == ["RedPajamaCommonCrawl", "novel"]


@pytest.mark.parametrize("holdout", [-0.1, 1, 1.5, float("nan")])
def test_an_impossible_share_is_an_error(tmp_path: Path, corpus: Path, holdout: float) -> None:
    with pytest.raises(ValueError, match=r"holdout is .*; give a share"):
        tokenize([corpus], tmp_path / "shards", holdout=holdout)
    assert not (tmp_path / "shards").exists()


def test_problems_of_the_input_and_the_output_reach_the_user(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.txt does not exist"):
        tokenize([corpus / "nothing.txt"], tmp_path / "shards")
    with pytest.raises(ValueError, match=r"corpus exists; give a new folder"):
        tokenize([corpus], corpus)
