import io
import logging

import pytest
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from transformers.utils import logging as transformers_logging

from btlm.console import first_of, gigabytes, one_line, plain_messages, plural, progress_bars, scaled, three_digits


def test_warnings_of_btlm_are_lines_and_transformers_is_silent(capsys):
    ours, theirs = logging.getLogger("btlm.model.x"), transformers_logging.get_logger("transformers.x")
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    levels = logging.getLogger("btlm").level, hub_logging.get_verbosity()
    with plain_messages():
        ours.warning("look %s", "here")
        ours.warning("look %s", "here")
        ours.info("continuing")
        ours.debug("detail")
        theirs.warning("chatter")
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        assert not transformers_logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == "btlm: warning: look here\nbtlm: continuing\n"
    assert transformers_logging.get_verbosity() == verbosity
    assert transformers_logging.is_progress_bar_enabled() == bars
    assert logging.getLogger("btlm").propagate
    assert not logging.getLogger("btlm").handlers
    assert (logging.getLogger("btlm").level, hub_logging.get_verbosity()) == levels


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("It broke.\n  Then more. And more"), "It broke"),
        (KeyError("weight_map"), "'weight_map' is missing"),
        (EOFError(), "EOFError"),
        (OSError("x" * 300), "x" * 200 + "..."),
    ],
)
def test_one_line(error, expected):
    assert one_line(error) == expected


@pytest.mark.parametrize(("count", "text"), [(0, "0 tokens"), (1, "1 token"), (2000, "2,000 tokens")])
def test_plural(count, text):
    assert plural(count, "token") == text


@pytest.mark.parametrize(("size", "text"), [(1_234_000, "1.2 MB"), (99_900_000, "99.9 MB"), (2_640_000_000, "2.64 GB")])
def test_gigabytes(size, text):
    assert gigabytes(size) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (3.0, "3.00"), (99.96, "100"), (999.6, "1,000"), (12345.6, "12,346")]
)
def test_three_digits(value, text):
    assert three_digits(value) == text


def test_three_digits_of_a_narrow_column():
    assert [three_digits(value, decimals=2) for value in (0.012, 0.3, 1.0, 40.0)] == ["0.01", "0.30", "1.00", "40.0"]


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 "), (1234, "1.23 k"), (999.7e6, "1,000 M"), (2.6e9, "2.60 G"), (4.2e15, "4.20 P")]
)
def test_scaled(value, text):
    assert scaled(value) == text


def test_first_of():
    assert first_of(["a", "b"]) == "a; b"
    assert first_of("abcde") == "a; b; c; and 2 more"


def test_only_a_terminal_has_bars():
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with progress_bars(console=console, transient=False) as progress:
            progress.update(progress.add_task("wash", total=4), completed=1)
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        assert ("wash" in shown, "25%" in shown, "eta" in shown) == (terminal,) * 3
