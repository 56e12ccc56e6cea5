"""Messages and progress on standard error, so that standard output can be piped; numbers for people to read."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


# Lines


def note(text: str) -> None:
    """Print a message."""
    sys.stderr.write(f"btlm: {text}\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    """Print a warning, which the user should act on."""
    note(f"warning: {text}")


def one_line(error: BaseException) -> str:
    """The first sentence of another library's error message, for use inside a line."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text if len(text) <= 200 else f"{text[:200].rstrip()}..."


def first_of(items: Iterable[str], shown: int = 3) -> str:
    """The first items and the number of the others, for use inside a line."""
    items = list(items)
    rest = len(items) - shown
    return "; ".join(items[:shown]) + (f"; and {rest} more" if rest > 0 else "")


@contextmanager
def plain_messages() -> Iterator[None]:
    """In this context, :func:`warn` prints btlm's warnings, and Transformers shows only errors and downloads."""
    with quiet_transformers(), plain_warnings():
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """In this context, Transformers and the Hub's client show only errors and downloads."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    verbosity, of_the_hub = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # without a network it would tell of every attempt
    transformers_logging.disable_progress_bar()
    if downloads:  # the line above also disables the bars of the Hub's downloads
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(of_the_hub)
        if progress:
            transformers_logging.enable_progress_bar()


@contextmanager
def plain_warnings(shown: bool = True) -> Iterator[None]:
    """In this context, :func:`warn` prints btlm's warnings, each of them once, and :func:`note` what it tells besides.

    Args:
        shown: Whether to print them; else nothing does.
    """
    handler = _Lines() if shown else logging.NullHandler()
    ours = logging.getLogger("btlm")
    propagate, level = ours.propagate, ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagate


class _Lines(logging.Handler):
    """Prints log records as lines on standard error, which is looked up each time, since it may be redirected."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.seen:
            self.seen.add(text)
            (warn if record.levelno >= logging.WARNING else note)(text)


# Progress


def progress_bars(
    *details: "ProgressColumn",
    console: "Console | None" = None,
    transient: bool = True,
    remaining: bool = True,
    width: int = 40,
) -> "Progress":
    """Progress bars on standard error with details, elapsed and remaining time. Only a terminal shows them.

    Args:
        details: Columns after the bar; by default the percentage.
        console: Console on standard error, if there is one already.
        transient: Whether to remove the bars at the end.
        remaining: Whether to show the remaining time.
        width: Columns of the bars.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(width),
        *(details or [TextColumn("{task.percentage:>3.0f}%")]),
        TimeElapsedColumn(),
        *([TextColumn("eta"), TimeRemainingColumn()] if remaining else []),
    ]
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


# Numbers


def three_digits(value: float, decimals: int | None = None) -> str:
    """A number to three digits; from 1,000 on all its digits, and below 1 ``decimals`` decimals if given."""
    if decimals is not None and value < 1:
        return f"{value:.{decimals}f}"
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def scaled(value: float) -> str:
    """A number to three digits, a space and a decimal prefix, to be followed by a unit."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{three_digits(value / scale)} {prefix}"
    return f"{value:.0f} "


def plural(count: int, noun: str) -> str:
    """A count and what is counted: "1 token", "2,000 tokens"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def gigabytes(size: float) -> str:
    """A number of bytes as GB (10^9 bytes), or below 0.1 GB as MB (10^6 bytes)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
