"""`btlm eval-positions`."""

from btlm.checkpoint.adapter import Adapted
from btlm.evaluate.options import Positions
from btlm.settings import hints

from .options import Parser, given, options_of


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm eval-positions MODEL TEXT ... [options]",
        "Measure the loss of a model by the position of a token, up to several times its training\n"
        "length, without interpolation, with a fixed factor and with dynamic interpolation, which\n"
        "takes the factor of the window's length for all of its positions: one pass per window and\n"
        "interpolation. A factor for each position would cost a pass per position.",
        """  btlm eval-positions runs/mine/model books.jsonl.zst --plot positions.png
  btlm eval-positions mine-4bit book.txt --length 32768 --scalings none,dynamic --output results.json""",
    )
    parser.add_model()
    parser.add_texts()
    parser.add_options(Positions)
    parser.add_options(Adapted)
    arguments = parser.parse(argv)
    options = options_of(Positions, arguments)

    from btlm.console import plain_warnings
    from btlm.evaluate.positions_command import run_positions

    with plain_warnings():
        run_positions(arguments.model, arguments.texts, options, **given(arguments, hints(Adapted)))
