"""`btlm data` and its commands."""

import shlex
import sys
from pathlib import Path

from btlm.console import note
from btlm.data.recipe import DataRecipe, Execution, Inspection, load_data_recipe
from btlm.settings import hints, plain, to_yaml

from .options import Parser, choose, options_of

COMMANDS = {
    "prepare": "run all stages: clean, dedup, mix, tokenize",
    "clean": "normalize, and leave out short documents",
    "dedup": "leave out near-duplicates",
    "mix": "hold out, weight and shuffle documents",
    "tokenize": "turn documents into token shards",
    "inspect": "show examples of what each stage did",
}
EXAMPLES = {
    "prepare": """  btlm data prepare corpus/ --output data
  btlm data prepare hf://cerebras/SlimPajama-627B --output data --executor ray
  btlm data prepare corpus/ --output data --recipe btlm-tiny
  btlm data prepare more/ --output data2 --against data""",
    "clean": "  btlm data clean corpus/ --output clean --clean.min_characters 500",
    "dedup": """  btlm data dedup clean --output dedup
  btlm data dedup web.parquet --output dedup --dedup.threshold 0.7""",
    "mix": "  btlm data mix dedup --output mix --mix.weights 'Books: 2' --mix.holdout 0.01",
    "tokenize": "  btlm data tokenize mix --output shards",
}
# What can be done with the output of a command that does not write token shards.
NEXT = {
    "clean": "btlm data dedup {} --output deduplicated",
    "dedup": "btlm data mix {} --output mixed",
    "mix": "btlm data tokenize {} --output shards",
}
# Settings that a command has.
SECTIONS = {
    "prepare": ("read", "clean", "dedup", "mix"),
    "clean": ("read", "clean"),
    "dedup": ("read", "dedup"),
    "mix": ("read", "mix"),
    "tokenize": ("read",),
}


def run(argv: list[str]) -> None:
    """Run a command of `btlm data`."""
    description = "Turn documents into training data, one stage at a time or all at once."
    choose(argv, "btlm data", description, COMMANDS, _run)


def _run(command: str, argv: list[str]) -> None:
    if command == "inspect":
        _inspect(argv)
        return
    text = COMMANDS[command]
    parser = Parser(
        f"btlm data {command} INPUT ... --output FOLDER [options]",
        f"{text[0].upper()}{text[1:]}.\nThe same command continues an interrupted run.",
        EXAMPLES[command],
    )
    parser.add_argument(
        "input",
        nargs="*",
        metavar="INPUT",
        help=".jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt files, folders of them, or hf://DATA_SET"
        + ("" if command in ("prepare", "clean") else "; or the output of another stage"),
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder for the result, reports and a log (required)")
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="YAML file with any of the settings below, or the name of one that comes with btlm: btlm-tiny or "
        "slimpajama; flags change its values",
    )
    parser.add_argument(
        "--print-config",
        "--print_config",
        action="store_true",
        help="print the settings as a recipe, and do nothing else",
    )
    parser.add_options(Execution, "execution (does not change the result)")
    sections = {name: cls for name, cls in hints(DataRecipe).items() if name in SECTIONS[command]}
    for name, cls in sections.items():
        parser.add_options(cls, name, prefix=name, flags={"against": "--against"})
    arguments = parser.parse(argv)
    keys = hints(Execution)
    changes = {key: value for key, value in vars(arguments).items() if "." in key or key in keys}
    recipe, execution = load_data_recipe(arguments.recipe, changes, SECTIONS[command])
    if arguments.print_config:
        sys.stdout.write(to_yaml(plain(execution) | {name: getattr(recipe, name) for name in sections}))
        return
    if missing := [name for name, value in (("INPUT", arguments.input), ("--output", arguments.output)) if not value]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")

    from btlm.data import pipeline

    settings = [recipe] if command == "prepare" else [getattr(recipe, name) for name in sections]
    output = arguments.output
    getattr(pipeline, f"run_{command}")(arguments.input, output, *settings, execution)
    shards = str(Path(output, "shards")) if command == "prepare" else output
    following = NEXT.get(command, f"btlm train btlm-tiny --data {shlex.quote(shards)} --output runs/tiny")
    note(f"wrote {shards}; next: {following.format(shlex.quote(output))}")


def _inspect(argv: list[str]) -> None:
    parser = Parser(
        "btlm data inspect FOLDER [options]",
        "Show examples of what the stages in a folder left out, and of clusters of\nduplicates.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="output of btlm data prepare or of one stage")
    parser.add_options(Inspection)
    arguments = parser.parse(argv)
    options = options_of(Inspection, arguments)

    from btlm.data.inspect import run_inspect

    run_inspect(arguments.folder, options)
