"""`btlm bench`."""

from btlm.checkpoint.adapter import Adapted
from btlm.evaluate.options import Bench
from btlm.settings import hints

from .options import Parser, given, options_of
from .stopping import sigterm_unwinds


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm bench [MODEL ...] [options]",
        "Measure memory and speed of models by dtype and context; print a table and draw\ntwo plots.",
        """  btlm bench --output bench
  btlm bench btlm-3b llama-7b --dtypes 4bit --contexts 512,8192
  btlm bench runs/mine/model mine-4bit --contexts 2048""",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=["btlm-3b"],
        help="checkpoint folder, folder of adapters, or shape to fill with random weights: btlm-3b, llama-7b "
        "(default: btlm-3b)",
    )
    parser.add_options(Bench)
    parser.add_options(Adapted)
    arguments = parser.parse(argv)
    options = options_of(Bench, arguments)

    from btlm.evaluate.bench import run_bench

    with sigterm_unwinds():
        run_bench(arguments.models, **vars(options), **given(arguments, hints(Adapted)))
