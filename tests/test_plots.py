import pytest

from btlm.plots import pyplot, save_figure


def test_a_figure_is_saved_whole_and_closed(tmp_path):
    figure, axis = pyplot().subplots()
    axis.plot([1, 2])
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert not pyplot().fignum_exists(figure.number)
    assert pyplot().get_backend().lower() == "agg"


def test_a_figure_that_cannot_be_saved_leaves_the_last_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"before")
    figure, _ = pyplot().subplots()
    with pytest.raises(ValueError, match=r"greater than 0|positive|not a valid"):
        save_figure(figure, tmp_path / "a.png", dpi=-1)
    pyplot().close(figure)
    assert (tmp_path / "a.png").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
