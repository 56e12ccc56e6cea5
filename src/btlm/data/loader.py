"""Batches from token shards: packed and shuffled rows, of lengths that follow a schedule. No token is lost or repeated.

The stream of a split has ``T`` tokens and is read cyclically in units of ``U`` tokens, the longest row of the schedule.
Unit ``k`` begins at token ``k * U``, and an epoch is the next ``T // U`` units. An epoch reads no token twice; the
remainder, of fewer than ``U`` tokens, starts the next epoch. The units of an epoch come in random order, and shorter
rows are cut from them. The rows that one stage of the schedule reads within an epoch are then shuffled, so that a batch
does not hold neighbouring rows.

Both orders are permutations that can be computed for a single index. A position in the data is therefore one number,
the number of tokens read so far, and any rank can jump to any position.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import isqrt
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .minhash import mix_bits
from .shards import TokenShards

_ENDLESS = 2**62


class ScheduleStage(Protocol):
    """One stage of a training schedule, such as :class:`btlm.train.recipe.Stage`."""

    @property
    def sequence_length(self) -> int:
        """Tokens per row."""

    @property
    def batch_tokens(self) -> int:
        """Tokens per batch, over all ranks."""

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole stage; ``None`` if it has no end."""


class Batch(NamedTuple):
    """The rows of one rank.

    Args:
        input_ids: int64 ``[rows, sequence_length]``.
        document_ids: int32 ``[rows, sequence_length]``: number of the document within the row, from 0; ``None`` if not
            requested.
        tokens: Number of tokens that all ranks have read after this batch.
    """

    input_ids: NDArray[np.int64]
    document_ids: NDArray[np.int32] | None
    tokens: int

    @property
    def sequence_length(self) -> int:
        """Tokens per row."""
        return int(self.input_ids.shape[1])


class TokenLoader(Iterator[Batch]):
    """Iterator of batches over the stages of a schedule.

    The order of the rows depends on the shards, the seed and the schedule, not on the number of ranks: rank ``r`` reads
    the ``r``-th equal part of each batch.

    Args:
        shards: Shards to read.
        stages: Stages in their order; only the last may be endless.
        seed: Seed of the order of rows.
        split: Split of the shards to read.
        rank: Rank of this process.
        world_size: Number of ranks.
        document_ids: Whether batches have document ids, with which attention stays within documents.

    Raises:
        ValueError: The stages do not divide into batches and rows, a batch does not divide over the ranks, or the split
            has fewer tokens than the longest row.
    """

    def __init__(
        self,
        shards: TokenShards,
        stages: Sequence[ScheduleStage],
        *,
        seed: int,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        document_ids: bool = False,
    ) -> None:
        _check(stages, rank, world_size)
        self._shards, self._split, self._seed = shards, split, seed
        self._rank, self._world_size, self._document_ids = rank, world_size, document_ids
        self._stages = [(stage.sequence_length, stage.batch_tokens, stage.tokens) for stage in stages]
        self._ends = list(accumulate(_ENDLESS if tokens is None else tokens for _, _, tokens in self._stages))
        self._unit = max(length for length, _, _ in self._stages)
        self._num_units = shards.num_tokens(split) // self._unit
        if not self._num_units:
            raise ValueError(
                f"The {split} split has {shards.num_tokens(split):,} tokens, fewer than one row of {self._unit:,}; "
                "give more documents or a shorter sequence_length."
            )
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Number of tokens that all ranks have read so far."""
        return self._tokens

    @property
    def epoch_tokens(self) -> int:
        """Tokens per epoch: the tokens of the split, rounded down to whole units."""
        return self._num_units * self._unit

    def __next__(self) -> Batch:
        index = self._stage_at(self._tokens)
        if index == len(self._stages):
            raise StopIteration
        length, batch_tokens, _ = self._stages[index]
        num_rows = batch_tokens // length // self._world_size
        rows = np.arange(self._rank * num_rows, (self._rank + 1) * num_rows)
        offsets = self._offsets(self._tokens + rows * length, index)
        self._tokens += batch_tokens
        input_ids = self._shards.rows(self._split, offsets, length).astype(np.int64)
        return Batch(input_ids, self._ids_of_documents(offsets, length) if self._document_ids else None, self._tokens)

    def seek(self, tokens: int) -> None:
        """Jump to the position where all ranks have read ``tokens`` tokens.

        Raises:
            ValueError: No batch ends at this position.
        """
        stage = min(self._stage_at(tokens), len(self._stages) - 1)
        start, step = self._start_of(stage), self._stages[stage][1]
        if not 0 <= tokens <= self._ends[-1] or (tokens - start) % step:
            raise ValueError(f"No batch ends after {tokens} tokens; give {start} plus a multiple of {step}.")
        self._tokens = tokens

    def state_dict(self) -> dict[str, Any]:
        """The position, and everything that the order of the rows before it depends on, as a few numbers and names."""
        return self._state_at(self._tokens)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, on any number of ranks. Stages that the state has not reached may differ.

        Raises:
            ValueError: The state belongs to other data or to another order of rows.
        """
        own = self._state_at(state.get("tokens", 0))
        if other := [f"{key} is {own[key]}, was {state.get(key)}" for key in own if own[key] != state.get(key)]:
            raise ValueError(f"The state is of other data or another order ({'; '.join(other)}); use those it had.")
        self.seek(own["tokens"])

    def _state_at(self, tokens: int) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "data": self._shards.fingerprint(self._split),
            "seed": self._seed,
            "unit": self._unit,
            "stages": [list(stage) for i, stage in enumerate(self._stages) if self._start_of(i) < tokens],
        }

    def _stage_at(self, tokens: int) -> int:
        return sum(end <= tokens for end in self._ends)

    def _start_of(self, stage: int) -> int:
        return self._ends[stage - 1] if stage else 0

    def _offsets(self, places: NDArray[np.int64], stage: int) -> NDArray[np.int64]:
        """Offsets in the stream of the rows at given positions of the run, both int64 ``[rows]``."""
        length = self._stages[stage][0]
        offsets = np.empty_like(places)
        epochs = places // self.epoch_tokens
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            start = max(self._start_of(stage), epoch * self.epoch_tokens)
            stop = min(self._ends[stage], (epoch + 1) * self.epoch_tokens)
            rows = permute((places[here] - start) // length, (stop - start) // length, (self._seed, epoch, stage))
            units, within = np.divmod(start + rows * length - epoch * self.epoch_tokens, self._unit)
            units = epoch * self._num_units + permute(units, self._num_units, (self._seed, epoch))
            offsets[here] = (units * self._unit + within) % self._shards.num_tokens(self._split)
        return offsets

    def _ids_of_documents(self, offsets: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        starts = np.zeros((len(offsets), length), dtype=np.int32)
        for row, offset in zip(starts, offsets.tolist(), strict=True):
            row[self._shards.document_starts(self._split, offset, length)] = 1
        starts[:, 0] = 0  # The first document of a row has number 0, even if it began before the row.
        return starts.cumsum(axis=1, dtype=np.int32)


def permute(indices: NDArray[np.int64], size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Map indices by a pseudo-random permutation of ``range(size)``.

    A generalized Feistel cipher on pairs ``(left, right)``, slightly more than ``size`` of them; results outside the
    range are enciphered again (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        indices: int64 ``[n]``, each below ``size``.
        size: Size of the range, from 1 to 2**62.
        key: Numbers that choose the permutation.

    Returns:
        The permuted indices, int64 ``[n]``.
    """
    keys = np.frombuffer(hashlib.sha512(" ".join(map(str, key)).encode()).digest(), dtype="<u8")
    lefts = np.uint64(isqrt(size - 1) + 1)
    rights = np.uint64(-(-size // int(lefts)))
    values = indices.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = np.divmod(values[outside], rights)
        for left_key, right_key in keys.reshape(-1, 2):
            left = (left + _hash(right ^ left_key)) % lefts
            right = (right + _hash(left ^ right_key)) % rights
        values[outside] = left * rights + right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of 63 bits: one bit less, so that a sum does not overflow."""
    return mix_bits(values) >> np.uint64(1)


def _check(stages: Sequence[ScheduleStage], rank: int, world_size: int) -> None:
    if not stages:
        raise ValueError("stages is empty; give at least one.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; give a number from 0 to world_size - 1 ({world_size - 1}).")
    longest = max(stage.sequence_length for stage in stages)
    start = 0
    for i, stage in enumerate(stages):
        name, length, batch = f"stages[{i}]", stage.sequence_length, stage.batch_tokens
        row = length * world_size
        if longest % length:
            raise ValueError(f"{name}.sequence_length is {length}; give a divisor of the longest, {longest}.")
        if batch % row:
            raise ValueError(
                f"{name}.batch_tokens is {batch}; give a multiple of {row}, one row for each of {world_size} ranks."
            )
        if start % length:
            raise ValueError(f"{name} begins after {start} tokens; it has to begin after a multiple of {length}.")
        if stage.tokens is None and i + 1 < len(stages):
            raise ValueError(f"{name}.tokens is None, and a stage follows; give its tokens.")
        if stage.tokens is not None and stage.tokens % batch:
            raise ValueError(f"{name}.tokens is {stage.tokens}; give a multiple of its batch_tokens, {batch}.")
        start += stage.tokens or 0
