"""`btlm generate`: a prompt from anywhere, its continuation to standard output, all else to standard error."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from btlm.checkpoint.locate import BUNDLED_MODEL
from btlm.checkpoint.open import Checkpoint
from btlm.console import note, one_line, plain_warnings
from btlm.devices import has_cuda
from btlm.engine.cache import CACHE_DTYPES
from btlm.engine.options import GenerationOptions
from btlm.errors import NotSupported, OptionError

from .options import Run
from .with_engine import run_engine

ENGINES = ("auto", "btlm", "transformers")


def run_generate(
    prompt: Sequence[str] = (),
    *,
    prompt_file: Path | str | None = None,
    model: Checkpoint | Path | str = BUNDLED_MODEL,
    options: GenerationOptions | None = None,
    dtype: str = Run.dtype,
    device: str = Run.device,
    context_scaling: float | str = Run.context_scaling,
    engine: str = Run.engine,
    cache_dtype: str = Run.cache_dtype,
    kernels: str = Run.kernels,
    threads: int | None = None,
) -> None:
    """Write a prompt and its continuation to standard output, as the tokens come.

    Args:
        prompt: Words to be joined by spaces; standard input is read where there are none, and for a single ``"-"``.
        prompt_file: Text file to take the prompt from instead. Of a file and of standard input, the line break at the
            very end is not part of the prompt.
        model: An open checkpoint, its folder, or its id on the Hugging Face Hub.
        options: How to continue; greedily where not given.
        dtype, device, context_scaling: See :func:`btlm.checkpoint.load_model`.
        engine: ``"btlm"``, ``"transformers"``, or ``"auto"``: Transformers for what the engine does not do (beams,
            another
            dtype than the stored one, devices other than the processor, dynamic interpolation, networks other than
            SwiGLU with ALiBi, pickled weights), else the engine.
        cache_dtype, kernels, threads: See :meth:`btlm.engine.Engine.open`.

    Raises:
        ValueError: One line that says what cannot be used, and what to do.
    """
    options = options or GenerationOptions()
    for name, value, known in (("engine", engine, ENGINES), ("cache dtype", cache_dtype, CACHE_DTYPES)):
        if value not in known:
            raise ValueError(f"The {name} {value!r} is unknown; choose one of {', '.join(known)}.")
    if threads is not None and not 1 <= threads <= 1024:
        raise OptionError("{threads} is {} and must be between 1 and 1,024.", threads)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without a character must not end the text
        sys.stdout.reconfigure(errors="replace")
    text = _read_prompt(list(prompt), prompt_file)
    checkpoint, reason = Checkpoint.open(model), ""
    if engine != "transformers":
        try:
            _check_engine(options, dtype, device, context_scaling)
            factor = None if context_scaling == "none" else _factor(context_scaling)
            with plain_warnings():
                run_engine(text, checkpoint, options, factor, cache_dtype, kernels, threads)
            return
        except NotSupported as error:
            if engine == "btlm":
                raise
            reason = f" ({one_line(error)})"
    ignored = {"cache_dtype": cache_dtype != "auto", "kernels": kernels != "auto", "threads": threads is not None}
    if given := [f"{{{name}}}" for name, is_given in ignored.items() if is_given]:
        raise OptionError(
            f"{' and '.join(given)} only matter to the engine, and this text is continued by Transformers{{}}; leave "
            "them out.",
            reason,
        )
    from .with_transformers import run_transformers  # imports torch

    run_transformers(text, checkpoint, options, dtype, device, context_scaling)


def _check_engine(options: GenerationOptions, dtype: str, device: str, context_scaling: float | str) -> None:
    """Refuse what the engine cannot do with any checkpoint.

    Raises:
        NotSupported: Names it.
    """
    if options.num_beams > 1:
        raise NotSupported("The engine has no beams.")
    if dtype != "auto":
        raise NotSupported("The engine has no dtype but the stored one.")
    if device not in ("auto", "cpu") or (device == "auto" and has_cuda()):
        raise NotSupported("The engine has no device but the processor.")
    if context_scaling == "dynamic":
        raise NotSupported("The engine has no dynamic interpolation.")
    if context_scaling != "none" and not _factor(context_scaling) > 1:
        raise NotSupported(f"The engine has no context scaling {context_scaling}.")  # Transformers' loading refuses it


def _factor(context_scaling: float | str) -> float:
    try:
        return float(context_scaling)
    except ValueError:
        return 0.0


def _read_prompt(words: list[str], prompt_file: Path | str | None) -> str:
    if prompt_file is not None:
        if words:
            raise OptionError(
                "The prompt is given twice, as {!r} and as {prompt_file}; give one of them.", " ".join(words)
            )
        try:
            text = Path(prompt_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"The prompt file {prompt_file} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"The prompt file {prompt_file} is not UTF-8 text (byte {error.start}).") from error
        source = f"The prompt file {prompt_file}"
    elif words and words != ["-"]:
        return _checked(" ".join(words), "The prompt")
    else:
        if sys.stdin.isatty():
            note("type the prompt, and end it with Ctrl-D")
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"The prompt on standard input is not UTF-8 text (byte {error.start}).") from error
        source = "Standard input"
    return _checked(text.removesuffix("\n"), source)


def _checked(text: str, source: str) -> str:
    if not text:
        raise ValueError(f"{source} is empty; give some text to continue.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of an argument or of standard input that are not UTF-8
        raise ValueError(f"{source} is not UTF-8 text (character {error.start}).") from error
    return text
