"""The command `btlm`: reads the command line, calls the stage that was asked for, and reports errors in one line."""

import dataclasses
import os
import signal
import sys
import threading
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import Namespace

from btlm import errors

from .arguments import parse as _parse
from .arguments import setting as _setting
from .data_arguments import settings_of as _settings_of

__all__ = ["main"]


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
    except errors.OptionError as error:
        return _fail(error.text(_flag))
    except errors.NotSupported as error:
        remedy = " Use --engine transformers." if command == "generate" else ""
        return _fail(f"{error}{remedy}")
    except (ValueError, MemoryError) as error:
        return _fail(error)
    return 0


def _flag(option: str) -> str:
    """The flag of an option of the library."""
    return f"--{option.replace('_', '-')}"


def _fail(problem: object) -> int:
    sys.stderr.write(f"btlm: error: {' '.join(str(problem).split()) or type(problem).__name__}\n")
    return 2


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that it takes its unfinished files away."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # there is somebody else who cares for it
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the clearing up
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# Commands. A stage is imported when it is asked for, so that help and mistakes do not wait for torch.


def _generate(arguments: Namespace) -> None:
    from btlm.engine.options import GenerationOptions
    from btlm.generate.continue_prompt import run_generate

    values = {name: value for name, value in vars(arguments).items() if value is not None}
    names = (
        *("prompt", "prompt_file", "model", "dtype", "device", "context_scaling"),
        *("engine", "cache_dtype", "kernels", "threads"),
    )
    run = {name: values.pop(name) for name in names if name in values}
    run_generate(options=GenerationOptions(**values), **run)


def _info(arguments: Namespace) -> None:
    from btlm.checkpoint.locate import BUNDLED_MODEL
    from btlm.plan.info import run_info

    run_info(arguments.model or BUNDLED_MODEL, as_json=arguments.json)


def _quantize(arguments: Namespace) -> None:
    from btlm.console import plain_messages
    from btlm.convert.quantize import quantize

    with plain_messages(), _sigterm_unwinds():
        quantize(
            arguments.model,
            arguments.output,
            bits=arguments.bits,
            group_size=arguments.group_size,
            table_bits=arguments.table_bits,
            calibration=arguments.calibrate,
        )


def _bench(arguments: Namespace) -> None:
    from btlm.evaluate.bench import run_bench

    names = ("dtypes", "contexts", "new_tokens", "cache_dtype", "threads", "output")
    with _sigterm_unwinds():
        run_bench(arguments.models, **{name: arguments[name] for name in names})


def _export_gguf(arguments: Namespace) -> None:
    from btlm.console import plain_messages
    from btlm.convert.gguf import export_gguf

    with plain_messages(), _sigterm_unwinds():
        export_gguf(arguments.model, arguments.output, type=arguments.type)


def _train(arguments: Namespace) -> None:
    changes = dict(_setting(text) for text in arguments.set or [])
    if arguments.plan:
        from btlm.plan.plan import run_plan

        run_plan(arguments.recipe, arguments.mfu, arguments.peak_tflops, arguments.devices, changes)
        return
    if missing := [f"--{name}" for name in ("data", "output") if getattr(arguments, name) is None]:
        raise ValueError(
            f"train needs {' and '.join(missing)}: the token shards and a folder for the run; or --plan, which needs "
            "neither."
        )
    from btlm.train.command import run_training

    run_training(arguments.recipe, arguments.data, arguments.output, arguments.device, changes)


def _coord_check(arguments: Namespace) -> None:
    from btlm.tune.coord_check import run_coord_check
    from btlm.tune.coord_models import CoordCheck

    names = ("steps", "seeds", "layers", "heads", "ablate")
    check = CoordCheck(widths=tuple(arguments.widths), **{name: arguments[name] for name in names})
    if not run_coord_check(arguments.recipe, check, arguments.data, arguments.output, arguments.device):
        raise SystemExit(1)


def _transfer(arguments: Namespace) -> None:
    from btlm.tune.transfer import SearchSpace, run_transfer

    names = ("lr", "initializer_range", "mup_embeddings_scale", "mup_output_alpha")
    space = SearchSpace(**{name: tuple(arguments[name]) for name in names if arguments[name] is not None})
    run_transfer(
        arguments.recipe,
        arguments.data,
        arguments.output,
        arguments.trials,
        workers=arguments.workers,
        target=arguments.target,
        space=space,
        seed=arguments.seed,
        device=arguments.device,
    )


def _data(arguments: Namespace) -> None:
    step = arguments.step
    given = arguments[step]
    if step == "inspect":
        from btlm.data.inspect import run_inspect

        run_inspect(given.folder, stage=given.stage, examples=given.examples, seed=given.seed)
        return
    from btlm.data import pipeline as run
    from btlm.data import recipe

    settings = {name: cls(**given[name].as_dict()) for name, cls in _settings_of(step, recipe).items()}
    names = [field.name for field in dataclasses.fields(recipe.Execution)]
    execution = recipe.Execution(**{name: given[name] for name in names if given[name] is not None})
    if step == "prepare":
        run.run_prepare(given.input, given.output, recipe.DataRecipe(**settings), execution)
    else:
        getattr(run, f"run_{step}")(given.input, given.output, *settings.values(), execution)


_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "generate": _generate,
    "info": _info,
    "quantize": _quantize,
    "export-gguf": _export_gguf,
    "bench": _bench,
    "train": _train,
    "coord-check": _coord_check,
    "transfer": _transfer,
    "data": _data,
}
