"""What the commands tell the user: one line each, on standard error, so that standard output can be piped."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def note(text: str) -> None:
    """Tell something."""
    sys.stderr.write(f"btlm: {text}\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    """Tell something that the user should act on."""
    note(f"warning: {text}")


def one_line(error: BaseException) -> str:
    """The first sentence of an error that others wrote for a log, for use inside a line."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text if len(text) <= 200 else f"{text[:200].rstrip()}..."


def first_of(items: Iterable[str], shown: int = 3) -> str:
    """Some items and the number of the others, for use inside a line."""
    items = list(items)
    rest = len(items) - shown
    return "; ".join(items[:shown]) + (f"; and {rest} more" if rest > 0 else "")


@contextmanager
def plain_messages() -> Iterator[None]:
    """While it is open, warnings of btlm are lines of :func:`warn`, and Transformers reports errors
    only, without progress bars but those of downloads."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if downloads:  # of the Hub; the line above means the bars of both libraries
        enable_progress_bars()
    try:
        with plain_warnings():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


@contextmanager
def plain_warnings() -> Iterator[None]:
    """While it is open, warnings of btlm are lines of :func:`warn`, each of them once."""
    handler = _Lines()
    ours = logging.getLogger("btlm")
    propagate = ours.propagate
    ours.addHandler(handler)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.propagate = propagate


class _Lines(logging.Handler):
    """Looks standard error up for every line: it may have been redirected since."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.seen:
            self.seen.add(text)
            warn(text)
