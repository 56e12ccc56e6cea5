"""`btlm eval-positions`: the loss of a model by the position of a token, with and without position interpolation.

A window is end-of-text and then L tokens of one document, each of which is predicted from all tokens before it. With
dynamic interpolation, the slopes of ALiBi are divided by the factor of the window's length, L over the training length,
for all of its positions (per window length). The other reading, per position, has a factor for each position, which
costs a pass per position; at the last position of a window the two are the same.

Letters: W windows, L tokens of a window, B tokens of a bin.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from btlm.checkpoint.open import Checkpoint
from btlm.engine.engine import Engine
from btlm.errors import OptionError

from .perplexity import Text, ratio_of_totals, token_nats
from .results import Origin, Result

_Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scaling:
    """A position interpolation.

    Args:
        name: ``none``, ``dynamic``, or a factor, as the user gave it.
        factor: What the slopes are divided by; 1 without interpolation.
    """

    name: str
    factor: float

    def __str__(self) -> str:
        """How tables and plots call it."""
        return {"none": "none", "dynamic": f"dynamic ({self.factor:g})"}.get(self.name, f"factor {self.factor:g}")


@dataclass(frozen=True)
class Curve:
    """The loss by position with one interpolation.

    Args:
        scaling: The interpolation.
        nats: Negative log-likelihood of the tokens of each bin, ``[W, bins]``, fp64.
    """

    scaling: Scaling
    nats: _Matrix


@dataclass(frozen=True)
class Windows:
    """Pieces of documents of equal length.

    Args:
        ids: Tokens with end-of-text before the first, one list per window.
        bytes: Bytes of text of each bin, ``[W, bins]``, fp64.
        edges: First position of each bin, and the length.
        documents: Number of documents that the windows are from.
        of: Number of windows that the texts have.
    """

    ids: list[list[int]]
    bytes: _Matrix
    edges: list[int]
    documents: int
    of: int

    @property
    def tokens(self) -> _Matrix:
        """Number of tokens of each bin, ``[W, bins]``, fp64."""
        return np.tile(np.diff(self.edges).astype(np.float64), (len(self.ids), 1))

    @property
    def bins(self) -> list[tuple[int, int]]:
        """First and last position of each bin."""
        return [(first, end - 1) for first, end in pairwise(self.edges)]


def scalings_of(names: Sequence[str], length: int, trained: int) -> list[Scaling]:
    """Interpolations by their names.

    Args:
        names: ``none``, ``dynamic``, or a factor above 1.
        length: Tokens of a window.
        trained: Tokens of the longest texts that the model was trained on.

    Raises:
        OptionError: A name is none of these.
    """
    found = []
    for name in dict.fromkeys(names):
        if name == "none":
            factor = 1.0
        elif name == "dynamic":
            factor = max(1.0, length / trained)
        else:
            try:
                factor = float(name)
            except ValueError:
                factor = 0.0
            if not 1 < factor < math.inf:
                raise OptionError("{scalings} has {}; each is none, dynamic or a factor above 1.", name)
        found.append(Scaling(name, factor))
    return found


def cut_windows(
    texts: Iterable[Text], tokenizer: Tokenizer, *, before: int, length: int, number: int, bin_tokens: int
) -> Windows:
    """Windows of documents, without overlap, spread evenly over those that there are.

    Args:
        texts: Documents in tokens.
        tokenizer: Their tokenizer, whose tokens have one character per byte of text.
        before: Token before the first one of a window.
        length: Tokens of a window.
        number: Windows, at most.
        bin_tokens: Tokens of a bin; the last bin may have fewer.

    Raises:
        ValueError: No document is long enough; the message has the longest.
    """
    places, longest = [], 0
    for text in texts:
        longest = max(longest, len(text.ids))
        places += [(text, start) for start in range(0, len(text.ids) - length + 1, length)]
    if not places:
        raise ValueError(
            f"The longest text has {longest:,} tokens, and a window {length:,}; give a longer text or a shorter length."
        )
    chosen = np.linspace(0, len(places) - 1, min(number, len(places))).round().astype(int)
    edges = [*range(0, length, bin_tokens), length]
    sizes = np.array(
        [len(tokenizer.id_to_token(token) or "") for token in range(tokenizer.get_vocab_size())], np.float64
    )
    ids, counts = [], []
    for text, start in (places[i] for i in chosen):
        window = text.ids[start : start + length]
        ids.append([before, *window.tolist()])
        counts.append(np.add.reduceat(sizes[window], edges[:-1]))
    documents = len({id(places[i][0]) for i in chosen})
    return Windows(ids, np.array(counts), edges, documents, len(places))


def measure(
    checkpoint: Checkpoint,
    windows: Windows,
    scalings: Sequence[Scaling],
    *,
    on_tokens: Callable[[int], object] = int,
    **engine: Any,
) -> Iterator[Curve]:
    """The loss by position, one interpolation after the other; the memory is that of one window.

    Args:
        checkpoint: The model.
        windows: What it reads.
        scalings: Interpolations.
        on_tokens: Called with the number of tokens that were predicted since the last call.
        **engine: Arguments of :meth:`btlm.engine.Engine.open`.

    Raises:
        DoesNotFit, NotSupported: The engine cannot run the model.
        LogitsNotFinite: The model is damaged.
    """
    length = windows.edges[-1]
    known: dict[float, _Matrix] = {}
    for scaling in scalings:
        if scaling.factor not in known:
            opened = Engine.open(checkpoint, context=length, factor=scaling.factor, **engine)
            rows = []
            for ids in windows.ids:
                rows.append(np.add.reduceat(token_nats(opened, ids), windows.edges[:-1]))
                on_tokens(length)
            known[scaling.factor] = np.array(rows)
        yield Curve(scaling, known[scaling.factor])


def rows_of(curves: Sequence[Curve], windows: Windows, origin: Origin, settings: dict[str, Any]) -> list[Result]:
    """Rows for `results.json`: per interpolation and bin the loss per token and per byte, and the change by it.

    Args:
        curves: What was measured.
        windows: What was read.
        origin: The model and the machine.
        settings: What all numbers depend on.
    """
    plain = next((curve for curve in curves if curve.scaling.factor == 1), None)
    rows = []
    for curve in curves:
        scaling = {"scaling": curve.scaling.name, "factor": curve.scaling.factor}
        figures = {
            "nats_per_token": ("nats", *ratio_of_totals(curve.nats, windows.tokens)),
            "bits_per_byte": ("bits", *ratio_of_totals(curve.nats / math.log(2), windows.bytes)),
        }
        if plain is not None and curve is not plain:
            figures["nats_per_token_change"] = ("nats", *ratio_of_totals(curve.nats - plain.nats, windows.tokens))
        for metric, (unit, values, errors) in figures.items():
            for (first, last), value, error in zip(windows.bins, values, errors, strict=True):
                rows.append(
                    origin.result(
                        f"positions {first}-{last}",
                        metric,
                        float(value),
                        unit,
                        len(windows.ids),
                        standard_error=None if math.isnan(error) else float(error),
                        settings={**settings, **scaling, "positions": [first, last]},
                    )
                )
    return rows
