"""`btlm perplexity`: how well models predict texts, and how far quantized copies are from their original.

Windows are those of lm-evaluation-harness' rolling log-likelihood: end-of-text comes before the first token of a
document, every token is predicted once, and the last window of a document is a full one where there is text enough.

Letters: W windows, T tokens of a window, S of them that it scores, V vocabulary.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from btlm.checkpoint.open import Checkpoint
from btlm.data.documents import Document, Problem, list_units, read_unit
from btlm.data.recipe import Read
from btlm.engine.engine import Engine
from btlm.engine.network import LOGIT_ROWS
from btlm.engine.sampling import log_probabilities

from .results import Origin, Result


class Text(NamedTuple):
    """A document in tokens.

    Args:
        name: Name of the document.
        ids: Tokens, ``[T]``, int32, at least one.
        bytes, words: Sizes of it; words are what white space separates, as in lm-evaluation-harness.
        sha256: Digest of its UTF-8, in hexadecimal.
    """

    name: str
    ids: npt.NDArray[np.int32]
    bytes: int
    words: int
    sha256: str


class Window(NamedTuple):
    """A piece of a document that is read at once.

    Args:
        ids: Tokens, ``[T + 1]``; the first has no prediction, and the last is not read.
        scored: Number of tokens at the end that are predicted here.
    """

    ids: list[int]
    scored: int


def windows(ids: Sequence[int], before: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that predict each token of a document once.

    Args:
        ids: Tokens of the document, at least one.
        before: Token before the first one.
        context: Tokens that the model reads at a time, at most.
        stride: Tokens that a window predicts, at most; the fewer, the more context each of them has.
    """
    text, done = [before, *ids], 0
    while done < len(ids):
        number = min(len(ids) - done, context if done == 0 else stride)
        end = done + number
        yield Window(text[max(0, end - context) : end + 1], number)
        done = end


@dataclass
class Sums:
    """What one model makes of one document.

    Args:
        name: Name of the document.
        tokens, bytes, words: Sizes of it; see :class:`Text`.

    Attributes:
        nats: Negative log-likelihood.
        divergence: Kullback-Leibler divergence from the original to this model, in nats, summed over the tokens.
        same: Number of tokens for which the most probable token is that of the original.
    """

    name: str
    tokens: int
    bytes: int
    words: int
    nats: float = 0.0
    divergence: float = 0.0
    same: int = 0


@dataclass
class Scored:
    """What one model makes of all documents."""

    title: str
    origin: Origin
    sums: list[Sums] = field(default_factory=list)

    def results(self, settings: dict[str, Any], original: "Scored | None", *, partial: bool) -> list[Result]:
        """Rows for `results.json`, over all documents.

        Args:
            settings: What the numbers depend on.
            original: What the original makes of the same documents, if this is a copy.
            partial: Whether documents were left out.
        """
        rows = []
        for metric, unit, value, error in self._figures(original):
            more = {"standard_error": error, "settings": settings, "partial": partial}
            rows.append(self.origin.result("perplexity", metric, value, unit, self.total("tokens"), **more))
        return rows

    def total(self, name: str) -> Any:
        """Sum of an attribute over the documents."""
        return sum(getattr(one, name) for one in self.sums)

    def _figures(self, original: "Scored | None") -> Iterator[tuple[str, str, float, float | None]]:
        per_token, error = ratio(self.sums, "nats", "tokens")
        yield "nats_per_token", "nats", per_token, error
        yield "perplexity", "", math.exp(per_token), None if error is None else error * math.exp(per_token)
        per_byte, error = ratio(self.sums, "nats", "bytes")
        yield "bits_per_byte", "bits", per_byte / math.log(2), None if error is None else error / math.log(2)
        yield "byte_perplexity", "", math.exp(per_byte), None if error is None else error * math.exp(per_byte)
        per_word, error = ratio(self.sums, "nats", "words")
        if per_word < 700:  # beyond, fp64 has no number for it
            yield "word_perplexity", "", math.exp(per_word), None if error is None else error * math.exp(per_word)
        yield "tokens_per_byte", "tokens", self.total("tokens") / self.total("bytes"), None
        if original is not None:
            yield "perplexity_change", "", math.exp(per_token - ratio(original.sums, "nats", "tokens")[0]) - 1, None
            yield "kl_per_token", "nats", *ratio(self.sums, "divergence", "tokens")
            yield "same_first_token", "", *ratio(self.sums, "same", "tokens")


def ratio(sums: Sequence[Sums], above: str, below: str) -> tuple[float, float | None]:
    """A ratio of two totals over documents and its standard error by linearization; ``None`` for one document.

    Documents are what varies independently, not tokens.
    """
    over, under = (np.array([[getattr(one, name)] for one in sums], np.float64) for name in (above, below))
    (value,), (error,) = ratio_of_totals(over, under)
    return float(value), None if math.isnan(error) else float(error)


def ratio_of_totals(
    above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Ratios of two totals over observations and their standard errors by linearization, NaN for one observation.

    Args:
        above, below: What is added up, fp64 ``[observations, ratios]``.

    Returns:
        Both ``[ratios]``.
    """
    number, total = len(above), below.sum(axis=0)
    value = above.sum(axis=0) / total
    if number < 2:
        return value, np.full_like(value, math.nan)
    variance = number / (number - 1) * ((above - value * below) ** 2).sum(axis=0)
    return value, np.sqrt(variance) / total


def read_texts(texts: Iterable[Path | str], text_field: str) -> Iterator[Document]:
    """Documents of text files, each of which is one, and of JSON lines and Parquet.

    Raises:
        ValueError: There is no such file, or a document cannot be read; the message has file and line.
    """
    read = Read(text_field=text_field)
    for unit in list_units(texts, read)[0]:
        for document in read_unit(unit, read):
            match document:
                case Document():
                    yield document
                case Problem(file, line, reason):
                    raise ValueError(f"{file}, line {line}: {reason}")


def in_tokens(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Text]:
    """Documents in tokens; those without a token are left out."""
    for document in documents:
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        if ids:
            content = document.text.encode("utf-8", "replace")
            words = len(re.split(r"\s+", document.text))
            yield Text(document.id, np.array(ids, np.int32), len(content), words, hashlib.sha256(content).hexdigest())


def begin_of_text(model: Checkpoint) -> int:
    """The token that comes before the first one of a document, end-of-text.

    Raises:
        ValueError: The model has none.
    """
    if not model.end_ids:
        raise ValueError(
            f"{model.name} has no end of text, which comes before the first token of each document; set eos_token_id "
            "in its config.json."
        )
    return min(model.end_ids)


def texts_digest(texts: Iterable[Text]) -> str:
    """SHA-256 of texts: of their digests in their order."""
    return hashlib.sha256("".join(text.sha256 for text in texts).encode()).hexdigest()


def score(
    model: Checkpoint,
    copies: Sequence[Checkpoint],
    texts: Sequence[Text],
    *,
    context: int,
    stride: int,
    on_tokens: Callable[[int], object] = int,
    **engine: Any,
) -> list[Scored]:
    """Predict every token of texts with a model and, in the same windows, with copies of it.

    Args:
        model: The model.
        copies: Others with the same tokens, which are compared with it.
        texts: In tokens of the model.
        context, stride: See :func:`windows`.
        on_tokens: Called with the number of tokens that were predicted since the last call.
        **engine: Arguments of :meth:`btlm.engine.Engine.open`.

    Returns:
        What the model and each copy make of them, in this order.

    Raises:
        DoesNotFit, NotSupported: The engine cannot run one of them.
        LogitsNotFinite: A model is damaged.
        ValueError: A copy has other tokens, the model has no end of text, or there are no texts.
    """
    models = [model, *copies]
    for copy in copies:
        if copy.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise ValueError(f"The tokens of {copy.name} are not those of {model.name}; they cannot be compared.")
    if not texts:
        raise ValueError("The texts hold no token; give others.")
    before = begin_of_text(model)
    engines = [Engine.open(one, context=context, **engine) for one in models]
    scored = [Scored(one.title, Origin.of(one)) for one in models]
    for text in texts:
        sums = [Sums(text.name, len(text.ids), text.bytes, text.words) for _ in models]
        for one, of in zip(scored, sums, strict=True):
            one.sums.append(of)
        for window in windows(text.ids.tolist(), before, context, stride):
            _score_window(engines, window, sums)
            on_tokens(window.scored)
    return scored


def _score_window(engines: Sequence[Engine], window: Window, sums: Sequence[Sums]) -> None:
    ids = np.array(window.ids, np.int64)
    length, first = len(ids) - 1, len(ids) - 1 - window.scored  # the first position whose prediction counts
    for engine in engines:
        engine.cache.begin(0, length)
    try:
        for start, end in _pieces(first, length, engines[0].network.max_tokens):
            rows = np.arange(end - start if start >= first else 0)
            segment = np.array([[0, 0, start, end - start]], np.int64)
            reference: npt.NDArray[np.float64] | None = None
            for engine, of in zip(engines, sums, strict=True):
                logits = engine.network.forward(ids[start:end], segment, engine.cache, rows)
                if not len(rows):
                    continue
                of.nats -= float(log_probabilities(logits, ids[start + 1 : end + 1].tolist()).sum(dtype=np.float64))
                if len(engines) == 1:
                    continue
                logs = _log_softmax(logits)
                if reference is None:
                    reference = logs
                of.divergence += float((np.exp(reference) * (reference - logs)).sum())
                of.same += int((logs.argmax(axis=1) == reference.argmax(axis=1)).sum())
    finally:
        for engine in engines:
            engine.cache.end(0, 0)


def token_nats(engine: Engine, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Negative log-likelihood in nats of each token of a window but the first, fp64 ``[T]``.

    A few rows of logits are held at a time, and the last token is not read, so that a window may have one token more
    than the engine's context.

    Args:
        engine: An engine without requests.
        ids: ``T + 1`` tokens, at most one more than the context.

    Raises:
        LogitsNotFinite: The model is damaged.
    """
    tokens, length = np.array(ids, np.int64), len(ids) - 1
    nats = np.empty(length)
    engine.cache.begin(0, length)
    try:
        for start, end in _pieces(0, length, LOGIT_ROWS):
            segment = np.array([[0, 0, start, end - start]], np.int64)
            logits = engine.network.forward(tokens[start:end], segment, engine.cache, np.arange(end - start))
            nats[start:end] = -log_probabilities(logits, tokens[start + 1 : end + 1].tolist())
    finally:
        engine.cache.end(0, 0)
    return nats


def _pieces(first: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """Pieces of a window: large ones for what only is read, small ones where logits are wanted."""
    start = 0
    while start < length:
        end = min(first, start + most) if start < first else min(length, start + LOGIT_ROWS)
        yield start, end
        start = end


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """fp64 ``[S, V]``."""
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
