"""The command `btlm generate` on the engine."""

from btlm.checkpoint.open import Checkpoint
from btlm.console import note, plural, warn
from btlm.engine.engine import Engine
from btlm.engine.options import GenerationOptions
from btlm.engine.supported import interpolation

from .options import Run
from .text import encode, longer_than_trained, write_text
from .text_generator import TextGenerator


def run_engine(prompt: str, checkpoint: Checkpoint, options: GenerationOptions, run: Run, factor: float | None) -> None:
    """Write a prompt and its continuation to standard output; arguments as of ``run_generate``.

    Args:
        factor: Factor of position interpolation instead of the stored one.

    Raises:
        NotSupported: The engine cannot run the checkpoint; nothing was written.
        ValueError: One line that says what cannot be used, and what to do.
    """
    length = len(encode(checkpoint.tokenizer, prompt)) + options.max_new_tokens
    engine = Engine.open(
        checkpoint,
        cache_dtype=run.cache_dtype,
        context=length,
        draft=run.draft,
        kernels=run.kernels,
        threads=run.threads,
        factor=factor,
    )
    architecture, used = engine.architecture, engine.network.kernels
    note(
        f"{checkpoint.title}, {architecture.num_parameters():,} parameters, {engine.network.weight_dtype} on cpu "
        f"({used.name}, {plural(used.threads, 'thread')})"
    )
    if warning := longer_than_trained(architecture.n_positions * interpolation(architecture), length):
        warn(warning)
    write_text("" if run.no_echo else prompt)
    stream = TextGenerator(engine, checkpoint.tokenizer).stream(prompt, options)
    try:
        for piece in stream:
            write_text(piece)
    finally:
        write_text("\n")
    note(str(stream.report))
