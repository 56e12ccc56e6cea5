"""`btlm generate`: a prompt from anywhere, its continuation to standard output, all else to standard error."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from .generate import GenerationOptions, encode, generate_text, length_warning
from .load import load_model
from .locate import BUNDLED_MODEL
from .messages import note, plain_messages, warn


def run_generate(
    prompt: Sequence[str] = (),
    *,
    prompt_file: Path | str | None = None,
    model: Path | str = BUNDLED_MODEL,
    options: GenerationOptions | None = None,
    dtype: str = "auto",
    device: str = "auto",
    context_scaling: float | str = "none",
) -> None:
    """Write a prompt and its continuation to standard output, as the tokens come.

    Args:
        prompt: Words to be joined by spaces; standard input is read where there are none, and for a single ``"-"``.
        prompt_file: Text file to take the prompt from instead. Of a file and of standard input, the line break at the
            very end is not part of the prompt.
        model: Folder of a checkpoint, or its id on the Hugging Face Hub.
        options: How to continue; greedily where not given.
        dtype, device, context_scaling: See :func:`btlm.infer.load_model`.

    Raises:
        ValueError: One line that says what cannot be used, and what to do.
    """
    options = options or GenerationOptions()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without a character must not end the text
        sys.stdout.reconfigure(errors="replace")
    with plain_messages():
        text = _read_prompt(list(prompt), prompt_file)
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, context_scaling=context_scaling)
        config = loaded.config
        note(
            f"{Path(model).resolve().name if Path(model).is_dir() else model}, {config.num_parameters():,} parameters, "
            f"{str(loaded.dtype).removeprefix('torch.')} on {loaded.device}"
        )
        if warning := length_warning(config, encode(tokenizer, text).shape[1] + options.max_new_tokens):
            warn(warning)
        _write(text)
        try:
            report = generate_text(loaded, tokenizer, text, options, _write)
        finally:
            _write("\n")
        note(str(report))


def _read_prompt(words: list[str], prompt_file: Path | str | None) -> str:
    if prompt_file is not None:
        if words:
            raise ValueError(
                f"The prompt is given twice, as {' '.join(words)!r} and as --prompt-file; give one of them."
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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
