"""`btlm transfer`."""

from btlm.tune.options import Search, SearchSpace

from .options import Device, Parser, options_of

FLAGS = {"mup_embeddings_scale": "--embeddings-scale", "mup_output_alpha": "--output-alpha"}


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm transfer RECIPE --data FOLDER --output FOLDER --trials N [options]",
        "Tune hyperparameters on a narrow proxy, and write the recipe of a wide model.\nThe same command continues an "
        "interrupted search.",
        """  btlm transfer recipes/btlm-proxy-40m.yaml --data shards --output search \\
      --trials 64 --target recipes/btlm-3b.yaml""",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file of the proxy, with mup_base_width")
    parser.add_argument("--data", metavar="FOLDER", required=True, help="token shards with held-out text (required)")
    parser.add_argument(
        "--output", metavar="FOLDER", required=True, help="folder for the search, recipe.yaml and a plot (required)"
    )
    parser.add_options(Search)
    parser.add_options(Device)
    parser.add_options(SearchSpace, "search space (lowest and highest value, drawn log-uniformly)", flags=FLAGS)
    arguments = parser.parse(argv)
    search, space = options_of(Search, arguments), options_of(SearchSpace, arguments, FLAGS)
    device = options_of(Device, arguments).device

    from btlm.tune.transfer import run_transfer

    run_transfer(arguments.recipe, arguments.data, arguments.output, **vars(search), space=space, device=device)
