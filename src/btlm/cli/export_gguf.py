"""`btlm export-gguf`."""

from btlm.checkpoint.adapter import Adapted
from btlm.convert.options import GGUF
from btlm.settings import hints

from .options import Parser, given, options_of
from .stopping import sigterm_unwinds


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm export-gguf MODEL OUT.gguf [--type TYPE]",
        "Write a model for llama.cpp, in its architecture `jais`.",
        """  btlm export-gguf cerebras/btlm-3b-8k-base btlm-3b.gguf --type Q4_0""",
    )
    parser.add_model()
    parser.add_argument("output", metavar="OUT.gguf", help="file that receives the model; must not exist")
    parser.add_options(GGUF)
    parser.add_options(Adapted)
    arguments = parser.parse(argv)
    options = options_of(GGUF, arguments)

    from btlm.console import plain_messages
    from btlm.convert.gguf import export_gguf

    with plain_messages(), sigterm_unwinds():
        export_gguf(arguments.model, arguments.output, **vars(options), **given(arguments, hints(Adapted)))
