"""`btlm perplexity`."""

from btlm.checkpoint.adapter import Adapted
from btlm.evaluate.options import Perplexity
from btlm.settings import hints

from .options import Parser, given, options_of


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm perplexity MODEL TEXT ... [options]",
        "Measure how well a model predicts texts: per token, per byte and per word, with the\n"
        "windows of lm-evaluation-harness. Copies of it are compared token by token.",
        """  btlm perplexity runs/mine/model book.txt
  btlm perplexity runs/mine/model test.jsonl.zst --compare mine-4bit,mine-8bit --output results.json""",
    )
    parser.add_model()
    parser.add_texts()
    parser.add_options(Perplexity)
    parser.add_options(Adapted)
    arguments = parser.parse(argv)
    options = options_of(Perplexity, arguments)

    from btlm.console import plain_warnings
    from btlm.evaluate.perplexity_command import run_perplexity

    with plain_warnings():
        run_perplexity(arguments.model, arguments.texts, options, **given(arguments, hints(Adapted)))
