"""Runs a command line: calls the command that was asked for, and reports errors in one line."""

import importlib
import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from btlm import __version__
from btlm.errors import NotSupported, OptionError

from .options import choose, flag_of

# A command is a module of this package, imported when it is asked for.
COMMANDS = {
    "generate": "continue a prompt",
    "serve": "answer HTTP requests of OpenAI's clients",
    "info": "show the shape, muP and cost of a model or a recipe",
    "merge": "write a model with its adapters merged in",
    "quantize": "write a copy of a model in four or eight bits",
    "export-gguf": "write a model for llama.cpp",
    "eval": "ask a model the questions of benchmarks",
    "eval-positions": "measure the loss by position, beyond the training length",
    "eval-needle": "measure whether a model finds facts in its context",
    "perplexity": "measure how well models predict texts",
    "report": "put results on one page",
    "bench": "measure memory and speed of models",
    "train": "train a model by a recipe",
    "coord-check": "check muP: sizes against width",
    "transfer": "tune on a narrow proxy for a wide model",
    "data": "turn documents into training data",
}


_LONGEST = 1000  # characters of an error: values of damaged files may be far longer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments after the name of the program; those of the process by default.

    Returns:
        The exit status: 0, or 2 for what the user can put right, 130 after Ctrl-C, and 141 where the reader of the
        output went away. SIGTERM raises ``SystemExit`` with 143 in commands that have files to take away.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            description = (
                "Train, run and inspect language models of the BTLM family. Options that take a\n"
                "list have commas between its items: --contexts 512,2048."
            )
            choose(argv, "btlm", description, COMMANDS, _run, __version__)
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
        return _fail(f"{error.name} is not installed; get it with pip install '.[all]' in a clone of btlm")
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except OptionError as error:
        return _fail(error.text(flag_of))
    except NotSupported as error:
        return _fail(f"{error}{' Use --engine transformers.' if argv[:1] == ['generate'] else ''}")
    except (ValueError, MemoryError) as error:
        return _fail(error)
    return 0


def _run(command: str, argv: list[str]) -> None:
    importlib.import_module(f".{command.replace('-', '_')}", __package__).run(argv)


def _fail(problem: object) -> int:
    text = " ".join(str(problem).split()) or type(problem).__name__
    sys.stderr.write(f"btlm: error: {text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'}\n")
    return 2
