"""The two plots of `btlm bench`, like figures 1 and 2 of BTLM's model card: memory by format, memory beside speed."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from btlm.plots import pyplot, save_figure

PHONE = 3.0  # GB: the memory of small devices that figure 1 of the card marks
_FORMATS = {"4bit": "4 bits", "8bit": "8 bits", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def plot_memory(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Plot one bar per measurement: weights, full cache, and the rest of the peak memory.

    Args:
        rows: Measurements that :func:`btlm.evaluate.bench.run_bench` returned.
        picture: PNG file to write.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 1.3 + 0.3 * len(rows) + 0.15 * len(_groups(rows))), layout="constrained")
    places, labels = _places(rows), [f"{row['context']:,}" for row in rows]
    peaks = [row["peak_bytes"] / 1e9 for row in rows]
    # A token table that is not also the head is hardly read, so at most the peak memory is shown as weights.
    weights = [min(row["weight_bytes"] / 1e9, peak) for row, peak in zip(rows, peaks, strict=True)]
    cache = [min(row["cache_bytes"] / 1e9, peak - w) for row, peak, w in zip(rows, peaks, weights, strict=True)]
    rest = [peak - w - c for peak, w, c in zip(peaks, weights, cache, strict=True)]
    left = [0.0] * len(rows)
    for name, part, color in (("weights", weights, "C0"), ("cache", cache, "#9dc3e6"), ("all else", rest, "0.8")):
        axis.barh(places, part, 0.8, left=left, color=color, label=name)
        left = [a + b for a, b in zip(left, part, strict=True)]
    for place, peak in zip(places, peaks, strict=True):
        text = axis.annotate(f"{peak:.2f}", (peak, place), (4, 0), "data", "offset points", va="center", size=8)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    if marked := _marks_phone(peaks):
        axis.axvline(PHONE, color="C3", linestyle="--", linewidth=1)
        top = axis.get_xaxis_transform()
        axis.text(PHONE, 1.0, f"{PHONE:g} GB", transform=top, color="C3", size=8, ha="center", va="bottom")
    axis.set_yticks(places, labels, size=8)
    axis.tick_params(axis="y", length=0)
    for (model, dtype), members in _groups(rows).items():
        middle = sum(places[i] for i in members) / len(members)
        label = ("\n" if len(members) > 1 else " ").join((_short(model), _FORMATS[dtype]))
        at = axis.get_yaxis_transform()
        axis.annotate(label, (0, middle), (-42, 0), at, "offset points", ha="right", va="center", size=9)
    axis.set(xlabel="peak resident memory (GB), by tokens of context", xlim=(0, max([*peaks, PHONE * marked]) * 1.12))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="0.93")
    axis.set_axisbelow(True)
    axis.margins(y=0.02)
    axis.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, picture)


def plot_speed(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Plot peak memory and decoding speed side by side, grouped by context; a color per model, a shade per dtype.

    Args:
        rows, picture: As for :func:`plot_memory`.
    """
    plt = pyplot()
    from matplotlib.patheffects import withStroke

    contexts = sorted({row["context"] for row in rows})
    groups = _groups(rows)
    width = 0.84 / len(groups)
    figure, axes = plt.subplots(
        1, 2, figsize=(max(7.5, 2.5 + 0.6 * len(contexts) * len(groups)), 3.8), layout="constrained"
    )
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, ((model, dtype), members) in enumerate(groups.items()):
        same = [name for name in groups if name[0] == model]
        color = _shade(f"C{models.index(model) % 10}", same.index((model, dtype)) / max(1, len(same)))
        offset = (number - (len(groups) - 1) / 2) * width
        for axis, key, scale in ((axes[0], "peak_bytes", 1e9), (axes[1], "decode_tokens_per_s", 1.0)):
            places = [contexts.index(rows[i]["context"]) + offset for i in members]
            values = [rows[i][key] / scale for i in members]
            bars = axis.bar(places, values, 0.92 * width, color=color, label=f"{_short(model)}, {_FORMATS[dtype]}")
            shown = [f"{value:.2f}" if value < 1 else f"{value:.1f}" for value in values]
            for label in axis.bar_label(bars, shown, size=7, padding=1):
                label.set_path_effects([withStroke(linewidth=2, foreground="white")])  # over the line at 3 GB
    for axis, title in ((axes[0], "peak resident memory (GB)"), (axes[1], "decoding (tokens/s)")):
        axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        axis.tick_params(axis="x", length=0)
        axis.set(xlabel="tokens of context", title=title)
        axis.title.set_size(10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.93")
        axis.set_axisbelow(True)
        axis.margins(y=0.1)
    if _marks_phone(row["peak_bytes"] / 1e9 for row in rows):
        axes[0].axhline(PHONE, color="C3", linestyle="--", linewidth=1)
        edge = axes[0].get_yaxis_transform()
        axes[0].text(1.0, PHONE, f" {PHONE:g} GB", transform=edge, color="C3", size=8, va="center", ha="left")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    save_figure(figure, picture)


def _marks_phone(peaks: Iterable[float]) -> bool:
    """Whether the line at :data:`PHONE` leaves the bars of these peaks, in GB, more than a third of the plot."""
    return max(peaks) > PHONE / 3


def _groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Indices of the rows, by model and dtype."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row["model"], row["dtype"]), []).append(i)
    return groups


def _places(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Positions of the bars, with gaps between models and dtypes."""
    return [i + 0.5 * g for g, members in enumerate(_groups(rows).values()) for i in members]


def _shade(color: str, share: float) -> tuple[float, ...]:
    """A color lightened towards white by four fifths of ``share``, which is from 0 to 1."""
    from matplotlib.colors import to_rgb

    return tuple(part + (1 - part) * share * 0.8 for part in to_rgb(color))


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:21]}..."
