import json
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest

from btlm.train.curve import plot_metrics


def write_metrics(output: Path, num: int, *, evaluated: bool = True, stages: bool = True) -> None:
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, num + 1):
        level = 3.5 + 7 * (1 + step / 15) ** -0.7
        records.append(
            {
                "step": step,
                "tokens": 8192 * step,
                "sequence_length": 8192 if stages and step > 0.75 * num else 2048,
                "loss": level + rng.normal() * 0.15,
            }
        )
        if evaluated and (step % 70 == 0 or step == num):
            held_out = {
                name: level * factor
                for name, factor in (
                    ("RedPajamaArXiv", 0.5),
                    ("RedPajamaBook", 0.4),
                    ("RedPajamaCommonCrawl", 0.37),
                    ("RedPajamaGithub", 0.45),
                    ("RedPajamaStackExchange", 0.48),
                    ("RedPajamaWikipedia", 0.42),
                )
            }
            records[-1]["bits_per_byte"] = {**held_out, "mean": sum(held_out.values()) / 6}
    (output / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("num", "evaluated", "stages"), [(560, True, True), (560, False, True), (30, True, False), (1, True, False)]
)
def test_plot(tmp_path: Path, num: int, evaluated: bool, stages: bool) -> None:
    write_metrics(tmp_path, num, evaluated=evaluated, stages=stages)
    plot_metrics(tmp_path, tmp_path / "loss.png")
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    height, width = picture.shape[:2]
    assert height > 300
    assert width > (2.5 if evaluated else 1.3) * height, "one panel for training loss, and one for held-out loss"
    for panel in np.array_split(picture[..., :3].mean(-1), 2 if evaluated else 1, axis=1):
        assert (panel < 0.9).mean() > 0.01, "something is drawn in it"


def test_plot_shows_where_the_rows_become_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[tuple[float, str]] = []
    original = matplotlib.axes.Axes.text

    def text(self: matplotlib.axes.Axes, x: float, y: float, s: str, **kwargs: Any) -> Any:
        texts.append((x, s))
        return original(self, x, y, s, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "text", text)
    write_metrics(tmp_path, 560)
    plot_metrics(tmp_path, tmp_path / "loss.png")
    assert texts == [(420 * 8192 / 1e6, "8,192 tokens per row")]


def test_plot_marks_spikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[tuple[list[float], list[float]]] = []
    original = matplotlib.axes.Axes.plot

    def plot(self: matplotlib.axes.Axes, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("label") == "spike":
            marked.append((args[0], args[1]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", plot)
    write_metrics(tmp_path, 30)
    plot_metrics(tmp_path, tmp_path / "loss.png")
    assert marked == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        record = {"step": 31, "tokens": 31 * 8192, "sequence_length": 8192, "loss": 12.5, "spike": 7.0}
        file.write(json.dumps(record) + "\n")
    plot_metrics(tmp_path, tmp_path / "loss.png")
    assert marked == [([31 * 8192 / 1e6], [12.5])]


def test_no_records_make_no_picture(tmp_path: Path) -> None:
    plot_metrics(tmp_path, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []
