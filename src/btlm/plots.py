"""Figures that are drawn without a display and saved whole or not at all."""

from pathlib import Path
from typing import Any

from btlm.files import whole_file


def pyplot() -> Any:
    """Matplotlib's ``pyplot``, set to draw only into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, picture: Path, dpi: int = 110) -> None:
    """Save a figure as a PNG, whole or not at all, and close it."""
    with whole_file(picture) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
    pyplot().close(figure)
