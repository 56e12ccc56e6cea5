import pytest

from btlm.evaluate.journal import Journal


def test_answers_are_there_again(tmp_path):
    path = tmp_path / "more" / "journal"
    with Journal(path) as journal:
        journal["a"] = [-1.25, True]
        journal["b"] = "text\nof two lines"
    with Journal(path) as journal:
        assert journal["a"] == [-1.25, True]
        assert journal["b"] == "text\nof two lines"
        assert "c" not in journal
        assert len(journal) == 2


def test_a_torn_line_is_cut_off_and_a_damaged_one_left_out(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        for key in "abcd":
            journal[key] = f"answer to {key}"
    whole = path.read_bytes()
    for end in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:end])
        with Journal(path) as journal:
            known = whole[:end].count(b"\n")
            assert len(journal) == known
            journal["e"] = "new"
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:known]) + b'["e", "new"]\n'
    path.write_bytes(b"\xff\n[1]\n" + whole)
    with Journal(path) as journal:
        assert len(journal) == 4


def test_an_answer_is_in_the_file_at_once(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal["a"] = 1
        assert (tmp_path / "journal").read_bytes() == b'["a", 1]\n'


def test_without_a_file_answers_are_in_memory():
    journal = Journal()
    journal["a"] = 1
    assert journal["a"] == 1
    with pytest.raises(KeyError):
        journal["b"]
