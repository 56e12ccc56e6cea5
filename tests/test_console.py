import logging

import pytest
from transformers.utils import logging as transformers_logging

from btlm.console import one_line, plain_messages


def test_warnings_of_btlm_are_lines_and_transformers_is_silent(capsys):
    ours, theirs = logging.getLogger("btlm.model.x"), transformers_logging.get_logger("transformers.x")
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with plain_messages():
        ours.warning("look %s", "here")
        ours.info("detail")
        theirs.warning("chatter")
        assert not transformers_logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == "btlm: warning: look here\n"
    assert transformers_logging.get_verbosity() == verbosity
    assert transformers_logging.is_progress_bar_enabled() == bars
    assert logging.getLogger("btlm").propagate
    assert not logging.getLogger("btlm").handlers


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
