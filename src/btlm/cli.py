"""The command `btlm`: reads the command line, calls the stage that was asked for, and reports errors in one line."""

import dataclasses
import os
import sys
from argparse import ArgumentError, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from types import ModuleType

from jsonargparse import ArgumentParser, Namespace

from btlm import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments after the name of the program; those of the process by default.

    Returns:
        The exit status: 0, or 2 for what the user can put right, 130 after Ctrl-C, and 141 where the reader of the
        output went away.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            command, arguments = _parse(argv or ["--help"])
            _COMMANDS[command](arguments)
        finally:
            sys.stdout.flush()  # while a reader that went away can still be told from an error
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ArgumentError as error:
        return _fail(f"{error} (see --help)")
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; get it with pip install 'btlm[all]'")
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except (ValueError, MemoryError) as error:
        return _fail(error)
    return 0


def _fail(problem: object) -> int:
    sys.stderr.write(f"btlm: error: {' '.join(str(problem).split()) or type(problem).__name__}\n")
    return 2


# Commands. A stage is imported when it is asked for, so that help and mistakes do not wait for torch.


def _generate(arguments: Namespace) -> None:
    from btlm.infer.generate import GenerationOptions
    from btlm.infer.run import run_generate

    values = {name: value for name, value in vars(arguments).items() if value is not None}
    names = ("prompt", "prompt_file", "model", "dtype", "device", "context_scaling")
    run = {name: values.pop(name) for name in names if name in values}
    run_generate(options=GenerationOptions(**values), **run)


def _info(arguments: Namespace) -> None:
    from btlm.infer.info import run_info
    from btlm.infer.locate import BUNDLED_MODEL

    run_info(arguments.model or BUNDLED_MODEL, as_json=arguments.json)


def _quantize(arguments: Namespace) -> None:
    from btlm.infer.messages import plain_messages
    from btlm.infer.quantize import quantize

    with plain_messages():
        quantize(arguments.model, arguments.output)


def _train(arguments: Namespace) -> None:
    from btlm.train.run import run_training

    run_training(arguments.recipe, arguments.data, arguments.output, arguments.device)


def _data(arguments: Namespace) -> None:
    step = arguments.step
    given = arguments[step]
    if step == "inspect":
        from btlm.data.inspect import run_inspect

        run_inspect(given.folder, stage=given.stage, examples=given.examples, seed=given.seed)
        return
    from btlm.data import recipe, run

    settings = {name: cls(**given[name].as_dict()) for name, cls in _settings_of(step, recipe).items()}
    names = [field.name for field in dataclasses.fields(recipe.Execution)]
    execution = recipe.Execution(**{name: given[name] for name in names if given[name] is not None})
    if step == "prepare":
        run.run_prepare(given.input, given.output, recipe.DataRecipe(**settings), execution)
    else:
        getattr(run, f"run_{step}")(given.input, given.output, *settings.values(), execution)


def _settings_of(step: str, recipe: ModuleType) -> dict[str, type]:
    """The settings that a step of `data` takes, in the order of its parameters."""
    every = {"read": recipe.Read, "clean": recipe.Clean, "dedup": recipe.Dedup, "mix": recipe.Mix}
    return {name: cls for name, cls in every.items() if step in ("prepare", name) or name == "read"}


_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "generate": _generate,
    "info": _info,
    "quantize": _quantize,
    "train": _train,
    "data": _data,
}


# The command line


def _parse(argv: list[str]) -> tuple[str, Namespace]:
    """The command and its arguments. `data` is parsed by itself: jsonargparse loses errors of commands of commands."""
    if argv[0] == "data":
        return "data", _data_parser().parse_args(argv[1:] or ["--help"])
    arguments = _parser().parse_args(argv)
    return arguments.command, arguments[arguments.command]


def _parser() -> ArgumentParser:
    parser = _new_parser(
        "COMMAND ...", "Train, run and inspect language models of the BTLM family.", version=__version__
    )
    commands = parser.add_subcommands(dest="command", title="commands", metavar="COMMAND", description=None)
    commands.add_subcommand("generate", _generate_parser(), help="continue a prompt")
    commands.add_subcommand("info", _info_parser(), help="show the shape, muP and cost of a model or a recipe")
    commands.add_subcommand("quantize", _quantize_parser(), help="write a copy of a model in eight bits")
    commands.add_subcommand("train", _train_parser(), help="train a model by a recipe")
    commands.add_subcommand("data", _new_parser("data COMMAND ...", ""), help="turn documents into training data")
    return parser


def _generate_parser() -> ArgumentParser:
    parser = _new_parser(
        "generate [PROMPT ...] [options]",
        "Continue a prompt. The text goes to standard output as it comes, all else to\nstandard error.",
        epilog="""examples:
  btlm generate "Albert Einstein was known for"
  btlm generate --temperature 0.8 --top-p 0.95 --seed 1 "Once upon a time"
  btlm generate --model runs/tiny/model --num-beams 4 "The capital of France is"
  btlm generate --prompt-file report.txt --context-scaling dynamic > out.txt""",
    )
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="words, joined by spaces; standard input if none or -"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="take the prompt from a text file")
    parser.add_argument(
        "--max-new-tokens", type=_whole, metavar="N", help="end after N tokens if the text has not ended (default: 128)"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="MODEL", help="checkpoint folder or Hugging Face id (default: the bundled one)"
    )
    model.add_argument("--dtype", metavar="D", help="bfloat16, float16, float32 or auto, as stored (default)")
    model.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps ... or auto, the fastest here (default)")
    model.add_argument(
        "--context-scaling",
        metavar="S",
        help="for text longer than the training length: dynamic, a factor above 1, or none, as stored (default)",
    )

    choice = parser.add_argument_group("choice of tokens (default: always the most probable)")
    choice.add_argument("--temperature", type=_number, metavar="T", help="sample; below 1 safer, above 1 wilder")
    choice.add_argument(
        "--top-p", type=_number, metavar="P", help="sample from the top tokens with probability P in all"
    )
    choice.add_argument("--top-k", type=_whole, metavar="K", help="sample from the top K tokens")
    choice.add_argument("--seed", type=_whole, metavar="N", help="make the samples repeatable")
    choice.add_argument("--num-beams", type=_whole, metavar="N", help="search N beams; the text comes at the end")
    choice.add_argument("--no-repeat-ngram-size", type=_whole, metavar="N", help="write no N tokens in a row twice")
    return parser


def _info_parser() -> ArgumentParser:
    parser = _new_parser(
        "info [MODEL] [--json]",
        "Show what a model is and what it costs: shape, muP, parameters, FLOPs, memory.\nIts weights are not loaded.",
        epilog="""examples:
  btlm info
  btlm info recipes/btlm-3b.yaml
  btlm info --json runs/tiny/model""",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint folder, Hugging Face id, or recipe (.yaml) (default: the bundled model)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _quantize_parser() -> ArgumentParser:
    parser = _new_parser(
        "quantize MODEL --output FOLDER",
        "Write a copy of a model whose weights take eight bits, half the size of bf16.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hugging Face id")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="receives the copy; must not exist")
    return parser


def _train_parser() -> ArgumentParser:
    parser = _new_parser(
        "train RECIPE --data FOLDER --output FOLDER [options]",
        "Train a model by a recipe. The same command continues an interrupted run.",
        epilog="""example:
  btlm train recipes/btlm-tiny.yaml --data shards --output runs/tiny""",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("--data", metavar="FOLDER", required=True, help="token shards, see btlm data prepare")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="receives the model, metrics and loss curve")
    parser.add_argument("--device", metavar="D", default="cpu", help="device of torch (default: cpu)")
    return parser


def _data_parser() -> ArgumentParser:
    parser = _new_parser("data COMMAND ...", "Turn documents into training data, one stage at a time or all at once.")
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
    parser = _new_parser(
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
    execution.add_argument("--workers", type=_whole, metavar="N", help="tasks at a time (default: every core)")
    execution.add_argument(
        "--memory-gb", type=_number, metavar="GB", default=2.0, help="memory of a worker (default: 2)"
    )
    execution.add_argument("--slurm-partition", metavar="P", help="partition of the jobs")
    execution.add_argument("--slurm-time", metavar="T", default="24:00:00", help="time limit of a job (default: 24 h)")
    execution.add_argument("--slurm-setup", metavar="CMD", default="", help="shell command that a job starts with")
    execution.add_argument(
        "--force", action="store_true", help="start stages over whose settings or input have changed"
    )
    for name, cls in _settings_of(step, recipe).items():
        parser.add_class_arguments(cls, name)
    return parser


def _inspect_parser() -> ArgumentParser:
    parser = _new_parser(
        "data inspect FOLDER [options]",
        "Show examples of what the stages in a folder left out, and of clusters of\nduplicates.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="output of btlm data prepare or of one stage")
    parser.add_argument("--stage", metavar="S", help="clean, dedup, mix or tokenize (default: all there are)")
    parser.add_argument("--examples", type=_whole, metavar="N", default=3, help="of each kind (default: 3)")
    parser.add_argument("--seed", type=_whole, metavar="N", default=1, help="of the choice (default: 1)")
    return parser


def _new_parser(usage: str, description: str, epilog: str | None = None, version: str | None = None) -> ArgumentParser:
    return ArgumentParser(
        prog="btlm",
        usage=f"btlm {usage}",
        description=description,
        epilog=epilog,
        version=version,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
