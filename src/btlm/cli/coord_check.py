"""`btlm coord-check`."""

from btlm.tune.options import CoordCheck

from .options import Device, Parser, options_of


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm coord-check [RECIPE] [options]",
        "Check that the sizes of activations and of their changes scale with the width as\n"
        "muP predicts. The exit status is 1 if one does not.",
        """  btlm coord-check --output coord
  btlm coord-check recipes/btlm-3b.yaml --data shards
  btlm coord-check --widths 64,128,256 --ablate matrix-lr""",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file (default: BTLM's values)")
    parser.add_argument("--data", metavar="FOLDER", help="token shards to take the batch from (default: random tokens)")
    parser.add_argument("--output", metavar="FOLDER", help="folder for coord-check.png and coord-check.json")
    parser.add_options(Device)
    parser.add_options(CoordCheck, "models")
    arguments = parser.parse(argv)
    check, device = options_of(CoordCheck, arguments), options_of(Device, arguments).device

    from btlm.tune.coord_check import run_coord_check

    if not run_coord_check(arguments.recipe, check, arguments.data, arguments.output, device):
        raise SystemExit(1)
