"""`btlm eval`."""

from btlm.checkpoint.adapter import Adapted
from btlm.evaluate.options import Eval
from btlm.settings import hints

from .options import Parser, given, options_of


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm eval MODEL [options]",
        "Ask a model the questions of benchmarks, by lm-evaluation-harness on the engine, and show the\n"
        "scores beside published ones.",
        """  btlm eval runs/mine/model --suite table1 --output results.json
  btlm eval runs/mine/model --suite piqa,mmlu --data questions --limit 100""",
    )
    parser.add_model()
    parser.add_options(Eval)
    parser.add_options(Adapted)
    arguments = parser.parse(argv)
    options = options_of(Eval, arguments)

    from btlm.console import plain_messages
    from btlm.evaluate.eval_command import run_eval

    with plain_messages():
        run_eval(arguments.model, options, **given(arguments, hints(Adapted)))
