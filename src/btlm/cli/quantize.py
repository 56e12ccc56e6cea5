"""`btlm quantize`."""

from btlm.checkpoint.adapter import Adapted
from btlm.convert.options import QuantizeOptions
from btlm.settings import hints

from .options import Parser, given, options_of
from .stopping import sigterm_unwinds

FLAGS = {"calibration": "--calibrate"}


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm quantize MODEL OUT [options]",
        "Write a copy of a model whose weights take four bits (or eight), read tensor by\ntensor.",
        """  btlm quantize cerebras/btlm-3b-8k-base btlm-3b-4bit
  btlm quantize runs/mine/model mine-4bit --calibrate some-text.txt
  btlm quantize runs/mine/model mine-8bit --bits 8""",
    )
    parser.add_model()
    parser.add_argument("output", metavar="OUT", help="folder that receives the copy; must not exist")
    parser.add_options(QuantizeOptions, flags=FLAGS)
    parser.add_options(Adapted)
    arguments = parser.parse(argv)
    options = options_of(QuantizeOptions, arguments, FLAGS)

    from btlm.console import plain_messages
    from btlm.convert.quantize import quantize

    with plain_messages(), sigterm_unwinds():
        quantize(arguments.model, arguments.output, **vars(options), **given(arguments, hints(Adapted)))
