"""A prompt to its continuation by the engine."""

import time

from btlm.checkpoint.open import Checkpoint
from btlm.console import note, warn
from btlm.engine.engine import Engine
from btlm.engine.options import GenerationOptions
from btlm.engine.supported import interpolation

from .report import GenerationReport
from .text import TextPieces, encode, longer_than_trained, write_text


def run_engine(
    prompt: str,
    checkpoint: Checkpoint,
    options: GenerationOptions,
    factor: float | None,
    cache_dtype: str,
    kernels: str,
    threads: int | None,
) -> None:
    """Write a prompt and its continuation to standard output; arguments as of ``run_generate``.

    Args:
        factor: Factor of position interpolation instead of the stored one.

    Raises:
        NotSupported: The engine cannot run the checkpoint; nothing was written.
        ValueError: One line that says what cannot be used, and what to do.
    """
    tokenizer = checkpoint.tokenizer
    ids = encode(tokenizer, prompt)
    length = len(ids) + options.max_new_tokens
    engine = Engine.open(
        checkpoint, cache_dtype=cache_dtype, context=length, kernels=kernels, threads=threads, factor=factor
    )
    architecture, used = engine.architecture, engine.network.kernels
    note(
        f"{checkpoint.title}, {architecture.num_parameters():,} parameters, {engine.network.weight_dtype} on cpu "
        f"({used.name}, {used.threads} {'thread' if used.threads == 1 else 'threads'})"
    )
    trained = architecture.n_positions
    if warning := longer_than_trained(trained, trained * interpolation(architecture), length):
        warn(warning)
    write_text(prompt)
    pieces = TextPieces(tokenizer, write_text)
    start = time.perf_counter()
    first = last = start
    text = engine.add(ids, options)
    try:
        while text.finished is None:
            written = engine.step()
            if written:
                last = time.perf_counter()
                first = last if first == start else first
            pieces.put([token.id for _, token in written if token.id not in engine.end_ids])
        pieces.end()
    finally:
        write_text("\n")
    note(
        str(
            GenerationReport(
                prompt_tokens=len(ids),
                new_tokens=text.new_tokens,
                first_token_s=first - start,
                total_s=last - start,
                end_of_text=text.finished == "stop",
                seed=text.sampler.seed,
            )
        )
    )
