"""Arguments of `btlm data`."""

from types import ModuleType

from jsonargparse import ArgumentParser

from .parser import new_parser, number, whole


def data_parser() -> ArgumentParser:
    """All commands of `btlm data`."""
    parser = new_parser("data COMMAND ...", "Turn documents into training data, one stage at a time or all at once.")
    steps = parser.add_subcommands(dest="step", title="commands", metavar="COMMAND", description=None)
    for step, (description, _) in _DATA_STEPS.items():
        steps.add_subcommand(step, _data_step_parser(step), help=description)
    steps.add_subcommand("inspect", _inspect_parser(), help="show examples of what each stage did")
    return parser


_DATA_STEPS = {
    "prepare": (
        "run all stages: clean, dedup, mix, tokenize",
        """
  btlm data prepare corpus/ --output data
  btlm data prepare hf://cerebras/SlimPajama-627B --output data --executor ray
  btlm data prepare corpus/ --output data --recipe recipes/data/btlm-tiny.yaml""",
    ),
    "clean": (
        "normalize, and leave out short documents",
        """
  btlm data clean corpus/ --output clean --clean.min_characters 500""",
    ),
    "dedup": (
        "leave out near-duplicates",
        """
  btlm data dedup clean --output dedup
  btlm data dedup web.parquet --output dedup --dedup.threshold 0.7""",
    ),
    "mix": (
        "hold out, weight and shuffle documents",
        """
  btlm data mix dedup --output mix --mix.weights '{Books: 2}' --mix.holdout 0.01""",
    ),
    "tokenize": (
        "turn documents into token shards",
        """
  btlm data tokenize mix --output shards""",
    ),
}


def _data_step_parser(step: str) -> ArgumentParser:
    from btlm.data import recipe

    description, examples = _DATA_STEPS[step]
    parser = new_parser(
        f"data {step} INPUT ... --output FOLDER [options]",
        f"{description[0].upper()}{description[1:]}.\nThe same command continues an interrupted run.",
        epilog=f"examples:{examples}",
    )
    parser.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help=".jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt files, folders of them, or hf://DATA_SET"
        + ("" if step in ("prepare", "clean") else "; or the output of another stage"),
    )
    parser.add_argument("--output", metavar="FOLDER", required=True, help="receives the result, reports and a log")
    parser.add_argument("--recipe", action="config", metavar="FILE", help="YAML with any of the settings below")
    execution = parser.add_argument_group("execution (does not change the result)")
    execution.add_argument("--executor", metavar="E", default="local", help="local processes (default), slurm or ray")
    execution.add_argument("--workers", type=whole, metavar="N", help="tasks at a time (default: every core)")
    execution.add_argument(
        "--memory-gb", type=number, metavar="GB", default=2.0, help="memory of a worker (default: 2)"
    )
    execution.add_argument("--slurm-partition", metavar="P", help="partition of the jobs")
    execution.add_argument("--slurm-time", metavar="T", default="24:00:00", help="time limit of a job (default: 24 h)")
    execution.add_argument("--slurm-setup", metavar="CMD", default="", help="shell command that a job starts with")
    execution.add_argument(
        "--force", action="store_true", help="start stages over whose settings or input have changed"
    )
    for name, cls in settings_of(step, recipe).items():
        parser.add_class_arguments(cls, name)
    return parser


def _inspect_parser() -> ArgumentParser:
    parser = new_parser(
        "data inspect FOLDER [options]",
        "Show examples of what the stages in a folder left out, and of clusters of\nduplicates.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="output of btlm data prepare or of one stage")
    parser.add_argument("--stage", metavar="S", help="clean, dedup, mix or tokenize (default: all there are)")
    parser.add_argument("--examples", type=whole, metavar="N", default=3, help="of each kind (default: 3)")
    parser.add_argument("--seed", type=whole, metavar="N", default=1, help="of the choice (default: 1)")
    return parser


def settings_of(step: str, recipe: ModuleType) -> dict[str, type]:
    """The settings that a step of `data` takes, in the order of its parameters."""
    every = {"read": recipe.Read, "clean": recipe.Clean, "dedup": recipe.Dedup, "mix": recipe.Mix}
    return {name: cls for name, cls in every.items() if step in ("prepare", name) or name == "read"}
