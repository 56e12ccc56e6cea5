"""Compares quantized copies of a model with the original on held-out text."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from btlm.checkpoint.open import Checkpoint
from btlm.data.shards import TokenShards
from btlm.data.tokenize import decode
from btlm.model.architecture_btlm import END_OF_TEXT_ID

from .held_out import engine_loss, transformers_loss

# Number of consecutive tokens that calibration takes from one place.
_PIECE = 4096

# Ways to run a checkpoint, by name.
ENGINES: dict[str, Callable[[Checkpoint | Path | str, TokenShards, int, int], dict[str, dict[str, float]]]] = {
    "transformers": transformers_loss,
    "engine": engine_loss,
    "engine, int4 cache": partial(engine_loss, cache_dtype="int4"),
}


class Quality(NamedTuple):
    """How well one checkpoint predicts held-out text, as the mean of the sources."""

    perplexity: float
    """Exponential of the nats per token."""
    change: float
    """Relative difference from the perplexity of the original in Transformers."""
    bits_per_byte: float


def compare_copies(
    original: Checkpoint | Path | str, copies: Iterable[Path], shards: TokenShards, context: int, tokens: int
) -> Iterator[dict[str, Quality]]:
    """Measure a model and then its quantized copies in each of :data:`ENGINES`.

    Args:
        original: The original: an open checkpoint, its folder, or its id on the Hugging Face Hub.
        copies: Folders of the copies. Each is taken from the iterable when it is measured, so that it can be made then.
        shards: Shards with held-out documents.
        context: Largest number of tokens per row; rows do not overlap.
        tokens: Largest number of held-out tokens per source.

    Yields:
        Quality by engine, first of the original, then of each copy.

    Raises:
        ValueError: The shards hold no held-out text, or a checkpoint cannot be used.
    """
    reference: float | None = None
    for folder in chain([original], copies):
        row = {}
        checkpoint = Checkpoint.open(folder)
        for name, measure in ENGINES.items():
            loss = measure(checkpoint, shards, context, tokens)
            if not loss:
                raise ValueError("The shards hold no held-out text; prepare them with a holdout (mix.holdout).")
            perplexity = math.exp(loss["nats_per_token"]["mean"])
            reference = perplexity if reference is None else reference
            row[name] = Quality(perplexity, perplexity / reference - 1, loss["bits_per_byte"]["mean"])
        yield row


def calibration_text(shards: TokenShards, tokens: int) -> str:
    """Training text from all parts of all sources in equal shares, for :func:`btlm.convert.quantize.quantize`.

    Args:
        shards: Shards with training documents.
        tokens: Approximate number of tokens, over all sources.
    """
    texts = []
    for source in shards.sources:
        stream = shards.source_tokens("train", source, 100 * tokens)
        pieces = max(1, tokens // len(shards.sources) // _PIECE)
        for start in np.linspace(0, max(0, len(stream) - _PIECE), pieces).astype(int):
            piece = stream[start : start + _PIECE]
            documents = np.split(piece, np.flatnonzero(piece == END_OF_TEXT_ID))
            texts += [decode(document[document != END_OF_TEXT_ID]).replace("\ufffd", "") for document in documents]
    return "\n\n".join(texts)
