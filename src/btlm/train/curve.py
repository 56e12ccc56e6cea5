"""Plot of a run: loss against tokens."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from btlm.plots import pyplot, save_figure

from .metrics import read_metrics


def plot_metrics(output: Path, picture: Path) -> None:
    """Plot training loss (with spikes marked) and held-out bits per byte against tokens; nothing without records.

    Args:
        output: Output folder of the run.
        picture: PNG file to write.
    """
    if not (records := read_metrics(output)):
        return
    plt = pyplot()
    tokens = np.array([record["tokens"] for record in records]) / 1e6
    loss = np.array([record["loss"] for record in records])
    evaluated = [record for record in records if "bits_per_byte" in record]
    panels = 2 if evaluated else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.8), layout="constrained", squeeze=False)
    window = 25
    averaged = len(loss) > window
    left = axes[0, 0]
    left.plot(tokens, loss, color="0.75", linewidth=0.8, marker="" if averaged else ".", label="each step")
    if averaged:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        left.plot(tokens[window // 2 :][: len(smooth)], smooth, color="C0", label=f"mean of {window} steps")
    if spikes := [record for record in records if "spike" in record]:
        places = [record["tokens"] / 1e6 for record in spikes]
        left.plot(places, [record["loss"] for record in spikes], "x", color="C3", label="spike")
    left.set_ylabel("training loss (nats per token)")
    # The loss of the first steps can be several times as high, and would flatten the rest of the curve.
    left.set_ylim(top=min(left.get_ylim()[1], 2 * np.median(loss)))
    left.legend(edgecolor="none", fontsize=8, loc="upper right")
    if evaluated:
        right = axes[0, 1]
        for source in evaluated[-1]["bits_per_byte"]:
            mean = source == "mean"
            right.plot(
                [record["tokens"] / 1e6 for record in evaluated],
                [record["bits_per_byte"][source] for record in evaluated],
                label=source.removeprefix("RedPajama"),
                color="black" if mean else None,
                linewidth=2 if mean else 1,
                marker=".",
            )
        right.set_ylabel("held-out loss (bits per byte)")
        right.legend(edgecolor="none", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    for before, after in pairwise(records):
        if before["sequence_length"] != after["sequence_length"]:
            boundary = before["tokens"] / 1e6
            for axis in axes.flat:
                axis.axvline(boundary, color="0.4", linestyle=":", linewidth=1)
            label = f"{after['sequence_length']:,} tokens per row"
            at = left.get_xaxis_transform()
            left.text(boundary, 0.6, label, transform=at, rotation=90, ha="right", va="center", color="0.4", size=8)
    for axis in axes.flat:
        axis.set(xlabel="tokens (millions)", xlim=(0, tokens[-1] * 1.05))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.93")
    save_figure(figure, picture)
