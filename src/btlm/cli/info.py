"""`btlm info`."""

from btlm.checkpoint.adapter import Adapted
from btlm.settings import hints

from .options import Parser, given


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm info [MODEL] [--json]",
        "Show what a model is and what it costs: shape, muP, parameters, FLOPs, memory.\nIts weights are not loaded.",
        """  btlm info
  btlm info recipes/btlm-3b.yaml
  btlm info --json runs/tiny/model""",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint folder, folder of adapters, Hugging Face id, or recipe (.yaml) (default: the bundled model)",
    )
    parser.add_options(Adapted)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse(argv)

    from btlm.checkpoint.locate import BUNDLED_MODEL
    from btlm.plan.info import run_info

    run_info(arguments.model or BUNDLED_MODEL, as_json=arguments.json, **given(arguments, hints(Adapted)))
