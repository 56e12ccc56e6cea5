"""`btlm generate`: a prompt from anywhere, its continuation to standard output, all else to standard error."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.locate import BUNDLED_MODEL
from btlm.checkpoint.open import Checkpoint
from btlm.console import note, one_line, plain_warnings
from btlm.devices import has_cuda
from btlm.engine.options import GenerationOptions
from btlm.errors import NotSupported, OptionError

from .options import Run
from .with_engine import run_engine


def run_generate(
    prompt: Sequence[str] = (),
    *,
    prompt_file: Path | str | None = None,
    model: Checkpoint | Path | str = BUNDLED_MODEL,
    options: GenerationOptions | None = None,
    base: Path | str | None = None,
    **run: Any,
) -> None:
    """Write a prompt and its continuation to standard output, as the tokens come.

    Args:
        prompt: Words to be joined by spaces; standard input is read where there are none, and for a single ``"-"``.
        prompt_file: Text file to take the prompt from instead. Of a file and of standard input, the line break at the
            very end is not part of the prompt.
        model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters.
        options: How to continue; greedily where not given.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.
        **run: The other fields of :class:`btlm.generate.options.Run`. With the engine ``"auto"``, Transformers
            continues what the engine does not support: beams, another dtype than the stored one, devices other than the
            processor, dynamic interpolation.

    Raises:
        ValueError: One line that says what cannot be used, and what to do.
    """
    options, chosen = options or GenerationOptions(), Run(**run)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without a character must not end the text
        sys.stdout.reconfigure(errors="replace")
    text = _read_prompt(list(prompt), prompt_file)
    checkpoint, reason = open_checkpoint(model, base), ""
    if chosen.engine != "transformers":
        try:
            factor = _engine_factor(options, chosen)
            with plain_warnings():
                run_engine(text, checkpoint, options, chosen, factor)
            return
        except NotSupported as error:
            if chosen.engine == "btlm":
                raise
            reason = f" ({one_line(error)})"
    given = [
        f"{{{name}}}"
        for name in ("cache_dtype", "draft", "kernels", "threads")
        if vars(chosen)[name] != vars(Run())[name]
    ]
    if given:
        raise OptionError(
            f"{' and '.join(given)} only matter to the engine, and this text is continued by Transformers{{}}; leave "
            "them out.",
            reason,
        )
    from .with_transformers import run_transformers  # imports torch

    run_transformers(text, checkpoint, options, chosen)


def _engine_factor(options: GenerationOptions, run: Run) -> float | None:
    """The factor of interpolation that was asked for; refuses what the engine cannot do with any checkpoint.

    Raises:
        NotSupported: Names it.
    """
    if options.num_beams > 1:
        raise NotSupported("The engine has no beams.")
    if run.dtype != "auto":
        raise NotSupported("The engine has no dtype but the stored one.")
    if run.device not in ("auto", "cpu") or (run.device == "auto" and has_cuda()):
        raise NotSupported("The engine has no device but the processor.")
    if run.context_scaling == "dynamic":
        raise NotSupported("The engine has no dynamic interpolation.")
    if run.context_scaling == "none":
        return None
    try:
        factor = float(run.context_scaling)
    except ValueError:
        factor = 0.0
    if not factor > 1:
        raise NotSupported(f"The engine has no context scaling {run.context_scaling}.")  # Transformers' loading refuses
    return factor


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
