"""Figures that are drawn without a display and saved whole or not at all."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from btlm.files import whole_file


def need_matplotlib() -> None:
    """Check that Matplotlib is installed, before the work whose result it is to draw.

    Raises:
        ModuleNotFoundError: It is not.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


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
