"""`btlm eval-needle`."""

from btlm.checkpoint.adapter import Adapted
from btlm.evaluate.options import Needle
from btlm.settings import hints

from .options import Parser, given, options_of


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm eval-needle MODEL [options]",
        "Measure whether a model uses its context: a fact is hidden in a long text and asked for at\n"
        "its end, by depth and length. Controls show what chance looks like.",
        """  btlm eval-needle mine-4bit --plot needle.png --output results.json
  btlm eval-needle mine-4bit --lengths 2048,8192,16384 --depths 0,50,100 --text book.txt""",
    )
    parser.add_model()
    parser.add_options(Needle)
    parser.add_options(Adapted)
    arguments = parser.parse(argv)
    options = options_of(Needle, arguments)

    from btlm.console import plain_warnings
    from btlm.evaluate.needle_command import run_needle

    with plain_warnings():
        run_needle(arguments.model, options, **given(arguments, hints(Adapted)))
