import json
from collections import Counter
from itertools import islice, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from btlm.data.loader import Batch, TokenLoader, permute
from btlm.data.shards import TokenShards
from tests.data.tiny import write_documents


class Stage(NamedTuple):
    sequence_length: int
    batch_tokens: int
    tokens: int | None = None


def positions(folder: Path, total: int, seed: int = 0) -> TokenShards:
    """A corpus whose tokens are their own offsets in the stream, in documents and shards of random sizes."""
    rng = np.random.default_rng(seed)
    ends = np.unique([*rng.integers(1, total, total // 12), total])
    documents = [("a", ids) for ids in np.split(np.arange(total), ends[:-1])]
    cuts = np.sort(rng.integers(0, len(documents), 5)).tolist()
    shards = [documents[i:j] for i, j in zip([0, *cuts], [*cuts, len(documents)], strict=True)]
    return write_documents(folder, {"train": shards, "validation": [[("a", range(40))]]})


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """1007 tokens: 31 units of 32, and 15 tokens left over."""
    return positions(tmp_path_factory.mktemp("data") / "uneven", 1007)


def flat(batches: list[Batch]) -> NDArray[np.int64]:
    """All tokens in the order of the run."""
    return np.concatenate([batch.input_ids.reshape(-1) for batch in batches])


def read(loader: TokenLoader, tokens: int) -> list[Batch]:
    """Batches until ``tokens`` tokens have been read."""
    batches = []
    while loader.tokens < tokens:
        batches.append(next(loader))
    return batches


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert [batch.tokens for batch in actual] == [batch.tokens for batch in expected]
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.document_ids, other.document_ids)


# permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 1000, 1009, 70_001])
def test_a_permutation_takes_each_index_once(size: int) -> None:
    for key in [(0,), (1, 2, 3)]:
        assert np.sort(permute(np.arange(size), size, key)).tolist() == list(range(size))


@pytest.mark.parametrize("size", [1000, 10**12 + 39, 2**62])
def test_an_index_is_taken_alone_to_where_it_is_taken_with_others(size: int) -> None:
    indices = np.unique(np.random.default_rng(0).integers(0, size, 300))
    taken = permute(indices, size, (7,))
    assert taken.dtype == np.int64
    assert 0 <= taken.min() <= taken.max() < size
    assert len(set(taken.tolist())) == len(indices)
    assert [int(permute(np.array([i]), size, (7,))[0]) for i in indices] == taken.tolist()


def test_every_order_is_as_likely_as_another() -> None:
    orders = Counter(tuple(permute(np.arange(4), 4, (1, key)).tolist()) for key in range(2400))
    assert set(orders) == set(permutations(range(4)))
    # Each order occurs 100 +- 10 times. The sum has a chi-squared distribution with 23 degrees of freedom, which
    # exceeds 50 once in 1000 times.
    assert sum((count - 100) ** 2 / 100 for count in orders.values()) < 50


@pytest.mark.parametrize("size", [1000, 1024, 99_991])
def test_a_permutation_looks_random(size: int) -> None:
    indices = np.arange(size)
    one, other = permute(indices, size, (1,)), permute(indices, size, (2,))
    for taken in (one, other):
        assert (np.abs(np.diff(taken)) == 1).mean() < 0.01, "neighbours are separated; 2 / size of them stay by chance"
        assert abs(np.corrcoef(indices, taken)[0, 1]) < 0.1
        assert abs(np.corrcoef(taken[1:], taken[:-1])[0, 1]) < 0.1
    assert (one == other).mean() < 0.01


def test_golden_permutation() -> None:
    assert permute(np.arange(10), 10, (1, 2)).tolist() == [9, 0, 7, 2, 1, 4, 3, 6, 5, 8], (
        "The order of the data has changed; runs in progress will not continue as before."
    )


# Epochs

SCHEDULES: dict[str, list[Stage]] = {
    "one length": [Stage(32, 64)],
    "longer rows, in the middle of an epoch": [Stage(8, 32, 320), Stage(32, 64)],
    "shorter rows, in the middle of a unit": [Stage(32, 32, 96), Stage(8, 16, 16 * 9), Stage(4, 8)],
    "three lengths, over epochs": [Stage(4, 64, 1280), Stage(16, 32, 64), Stage(32, 96)],
    "batches larger than an epoch": [Stage(8, 32 * 80)],
}


@pytest.mark.parametrize("total", [1007, 992, 991, 63, 32])
@pytest.mark.parametrize("stages", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_every_token_once_in_an_epoch(tmp_path: Path, total: int, stages: list[Stage]) -> None:
    loader = TokenLoader(positions(tmp_path / "shards", total), stages, seed=3)
    unit = max(stage.sequence_length for stage in stages)
    size = total // unit * unit
    assert loader.epoch_tokens == size
    tokens = flat(read(loader, 5 * size))
    for epoch in range(5):
        # The stream is read cyclically, and the remainder of an epoch starts the next one.
        expected = np.arange(epoch * size, (epoch + 1) * size) % total
        assert len(set(expected.tolist())) == size
        np.testing.assert_array_equal(np.sort(tokens[epoch * size : (epoch + 1) * size]), np.sort(expected))


@pytest.mark.parametrize("stages", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_rows_are_full_and_whole_pieces_of_the_stream(uneven: TokenShards, stages: list[Stage]) -> None:
    begun = 0
    for batch in read(TokenLoader(uneven, stages, seed=3), 3000):
        stage = next(stage for stage in stages if stage.tokens is None or begun < sum_to(stages, stage))
        assert batch.input_ids.dtype == np.int64
        assert batch.input_ids.shape == (stage.batch_tokens // stage.sequence_length, stage.sequence_length)
        assert batch.sequence_length == stage.sequence_length
        assert batch.document_ids is None
        assert (np.diff(batch.input_ids) % 1007 == 1).all()
        begun += stage.batch_tokens
        assert batch.tokens == begun


def sum_to(stages: list[Stage], last: Stage) -> int:
    return sum(stage.tokens or 0 for stage in stages[: stages.index(last) + 1])


def test_the_schedule_ends_after_its_last_stage(uneven: TokenShards) -> None:
    loader = TokenLoader(uneven, [Stage(8, 32, 320), Stage(32, 64, 1280)], seed=3)
    assert [batch.tokens for batch in loader] == [*range(32, 321, 32), *range(384, 1601, 64)]
    assert list(loader) == []
    assert loader.tokens == 1600


# Order


def starts_of(shards: TokenShards, stages: list[Stage], tokens: int, seed: int = 3) -> list[int]:
    return [int(row[0]) for batch in read(TokenLoader(shards, stages, seed=seed), tokens) for row in batch.input_ids]


@pytest.mark.parametrize("length", [4, 32])
def test_seeds_and_epochs_have_orders_of_their_own(tmp_path: Path, length: int) -> None:
    shards = positions(tmp_path / "shards", 9600)
    stages, num_rows = [Stage(length, 960)], 9600 // length
    first, second = np.split(np.array(starts_of(shards, stages, 2 * 9600)), 2)
    other = np.array(starts_of(shards, stages, 9600, seed=4))
    again = starts_of(shards, stages, 9600)
    assert first.tolist() == again
    for a, b in ((first, second), (first, other), (second, other), (first, np.sort(first))):
        assert sorted(a) == sorted(b)
        assert (a == b).mean() < 0.02
    # By chance, 1 / num_rows of neighbouring rows are neighbours in the stream.
    assert (np.diff(first) == length).mean() < 5 / num_rows


def test_epochs_have_other_units_and_cut_them_otherwise(tmp_path: Path) -> None:
    shards = positions(tmp_path / "shards", 9600)
    halves = [Stage(length, 960, 4800) for length in (4, 32, 4, 32)]
    units = [set(half.tolist()) for half in np.split(flat(list(TokenLoader(shards, halves, seed=3))) // 32, 4)]
    assert [len(half) for half in units] == [150] * 4
    assert 50 < len(units[0] & units[2]) < 100, "half of the half, since the two epochs are independent"

    stages = [Stage(4, 960, 19200), Stage(32, 64)]
    unit_of = np.split(np.array(starts_of(shards, stages, 19200)) // 32, 2)
    places = [{tuple(np.flatnonzero(epoch == unit)) for unit in range(300)} for epoch in unit_of]
    assert not places[0] & places[1], "rows of a unit that are together in both epochs"

    halves = [Stage(4, 960, 4800), Stage(4, 960, 4800), Stage(32, 64)]
    unit_of = np.split(np.array(starts_of(shards, halves, 9600)) // 32, 2)
    places = [{tuple(np.flatnonzero(half == unit)) for unit in set(half.tolist())} for half in unit_of]
    assert not places[0] & places[1], "rows of a unit that are together in both stages of an epoch"


def test_both_orders_depend_on_the_seed(tmp_path: Path) -> None:
    shards = positions(tmp_path / "shards", 9600)
    halves = [Stage(4, 960, 4800), Stage(32, 64)]
    units = [set((np.array(starts_of(shards, halves, 4800, seed)) // 32).tolist()) for seed in (3, 4)]
    assert 50 < len(units[0] & units[1]) < 100, "half of the half, since the units have an order of their own"
    stages = [Stage(4, 960, 9600), Stage(32, 64)]
    unit_of = [np.array(starts_of(shards, stages, 9600, seed)) // 32 for seed in (3, 4)]
    places = [{tuple(np.flatnonzero(order == unit)) for unit in range(300)} for order in unit_of]
    assert not places[0] & places[1], "rows of a unit that are together under both seeds"


def test_a_batch_of_short_rows_does_not_hold_neighbours(tmp_path: Path) -> None:
    shards = positions(tmp_path / "shards", 9600)
    stages = [Stage(4, 64, 6400), Stage(32, 64)]
    starts = np.array(starts_of(shards, stages, 6400)).reshape(-1, 16)
    assert (np.abs(np.diff(np.sort(starts))) == 4).mean() < 0.05
    # The stage reads 75% of the units, from all parts of the stream.
    assert len(set((starts.reshape(-1) // 960).tolist())) == 10


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_order_does_not_depend_on_the_ranks(uneven: TokenShards, world_size: int) -> None:
    stages = [Stage(4, 32, 320), Stage(8, 64, 640), Stage(8, 128, 1280)]
    alone = list(TokenLoader(uneven, stages, seed=3, document_ids=True))
    ranks = [
        list(TokenLoader(uneven, stages, seed=3, rank=rank, world_size=world_size, document_ids=True))
        for rank in range(world_size)
    ]
    assert {len(batch.input_ids) for batch in ranks[0]} == {8 // world_size, 16 // world_size}
    together = [
        Batch(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.document_ids for part in parts if part.document_ids is not None]),
            parts[-1].tokens,
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(together, alone)


def test_the_split_is_the_one_asked_for(uneven: TokenShards) -> None:
    loader = TokenLoader(uneven, [Stage(8, 40, 40)], seed=3, split="validation")
    assert sorted(flat(list(loader)).tolist()) == list(range(40))


# Documents


@pytest.mark.parametrize("stages", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_documents_are_numbered_within_their_row(uneven: TokenShards, stages: list[Stage]) -> None:
    begins = set(uneven.document_starts("train", 0, 1007).tolist())
    assert 60 < len(begins) < 90
    counts = set()
    for batch in read(TokenLoader(uneven, stages, seed=3, document_ids=True), 3000):
        assert batch.document_ids is not None
        assert batch.document_ids.dtype == np.int32
        for row, ids in zip(batch.input_ids.tolist(), batch.document_ids.tolist(), strict=True):
            expected = [sum(token in begins for token in row[1 : i + 1]) for i in range(len(row))]
            assert ids == expected
            counts.add(ids[-1])
    assert {0, 1, 2} <= counts, "rows of one document and of several"


# The place

PLACES = [Stage(8, 32, 320), Stage(32, 64, 1280), Stage(16, 32)]


def test_seeking_is_reading_up_to_there(uneven: TokenShards) -> None:
    whole = list(islice(TokenLoader(uneven, PLACES, seed=3, document_ids=True), 60))
    loader = TokenLoader(uneven, PLACES, seed=3, document_ids=True)
    for index in [59, *range(59)]:
        loader.seek(whole[index - 1].tokens if index else 0)
        assert_same([next(loader)], whole[index : index + 1])


def test_any_place_is_reached_at_once(uneven: TokenShards) -> None:
    far = 10**15 // 32 * 32
    loader = TokenLoader(uneven, PLACES, seed=3)
    loader.seek(far)
    batch = next(loader)
    assert batch.tokens == far + 32
    assert (np.diff(batch.input_ids) % 1007 == 1).all()


@pytest.mark.parametrize("tokens", [-32, 8, 319, 336, 1601, 1599])
def test_a_place_within_a_batch_is_an_error(uneven: TokenShards, tokens: int) -> None:
    loader = TokenLoader(uneven, PLACES, seed=3)
    next(loader)
    with pytest.raises(ValueError, match=rf"^No batch ends after {tokens} tokens; give \d+ plus a multiple of \d\d\.$"):
        loader.seek(tokens)
    assert loader.tokens == 32


def test_a_place_after_the_end_is_an_error(uneven: TokenShards) -> None:
    loader = TokenLoader(uneven, PLACES[:2], seed=3)
    loader.seek(1600)
    assert list(loader) == []
    with pytest.raises(ValueError, match="No batch ends after 1664 tokens; give 320 plus a multiple of 64"):
        loader.seek(1664)


@pytest.mark.parametrize("tokens", [0, 32, 320, 960, 1024, 1600, 1632])
def test_a_state_goes_on_where_it_was_saved(uneven: TokenShards, tokens: int) -> None:
    """The states lie within a stage, between two stages, and around the end of the first epoch at 992 tokens."""
    first = TokenLoader(uneven, PLACES, seed=3)
    read(first, tokens)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["tokens"] == tokens
    assert len(json.dumps(state)) < 250
    resumed = TokenLoader(uneven, PLACES, seed=3)
    next(resumed)
    resumed.load_state_dict(state)
    assert_same(list(islice(resumed, 70)), list(islice(first, 70)))
    half = TokenLoader(uneven, PLACES, seed=3, rank=1, world_size=2)
    half.load_state_dict(state)
    assert half.tokens == tokens


@pytest.mark.parametrize("tokens", [640, 1600])
def test_stages_that_are_not_reached_may_change(uneven: TokenShards, tokens: int) -> None:
    first = TokenLoader(uneven, PLACES, seed=3)
    read(first, tokens)
    stages = [*PLACES[:2], Stage(8, 64, 640), Stage(32, 32)]
    resumed = TokenLoader(uneven, stages, seed=3)
    resumed.load_state_dict(first.state_dict())
    assert_same(read(resumed, 1600), read(first, 1600))
    next(resumed)
    with pytest.raises(
        ValueError, match=r"another order \(stages is \[\[8, 32, 320\], \[32, 64, 1280\], \[16, 32, None\]"
    ):
        first.load_state_dict(resumed.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed is 4, was 3"),
        ({"split": "validation"}, r"data is \w{64}, was \w{64}"),
        ({"stages": [Stage(8, 64, 320), *PLACES[1:]]}, r"stages is \[\[8, 64, 320\]\], was \[\[8, 32, 320\]\]"),
        ({"stages": [*PLACES[:2], Stage(64, 64)]}, "unit is 64, was 32"),
    ],
)
def test_a_state_of_another_run_is_refused(uneven: TokenShards, changes: dict[str, Any], message: str) -> None:
    saved = TokenLoader(uneven, PLACES, seed=3)
    read(saved, 64)
    values: dict[str, Any] = {"stages": PLACES, "seed": 3, "split": "train"} | changes
    other = TokenLoader(uneven, values.pop("stages"), **values)
    with pytest.raises(
        ValueError, match=rf"^The state is of other data or another order \({message}\); use those it had\.$"
    ):
        other.load_state_dict(saved.state_dict())
    assert other.tokens == 0


def test_a_state_of_other_shards_is_refused(uneven: TokenShards, tmp_path: Path) -> None:
    saved = TokenLoader(uneven, PLACES, seed=3)
    next(saved)
    same_tokens_in_other_documents = positions(tmp_path / "shards", 1007, seed=1)
    other = TokenLoader(same_tokens_in_other_documents, PLACES, seed=3)
    with pytest.raises(ValueError, match=r"another order \(data is \w{64}, was \w{64}\); use"):
        other.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"another order \(tokens is 0, was None; data is"):
        other.load_state_dict({})


# What is refused


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is empty; give at least one"),
        ([Stage(24, 48, 96), Stage(32, 64)], r"stages\[0\].sequence_length is 24; give a divisor of the longest, 32"),
        ([Stage(32, 48)], r"stages\[0\].batch_tokens is 48; give a multiple of 32, one row for each of 1 ranks"),
        ([Stage(8, 8, 48), Stage(32, 64)], r"stages\[1\] begins after 48 tokens; .* a multiple of 32"),
        ([Stage(8, 32), Stage(8, 32)], r"stages\[0\].tokens is None, and a stage follows"),
        ([Stage(8, 32, 80)], r"stages\[0\].tokens is 80; give a multiple of its batch_tokens, 32"),
        ([Stage(1024, 1024)], r"The train split has 1,007 tokens, fewer than one row of 1,024; give more documents"),
    ],
)
def test_a_schedule_that_cannot_be_read_is_an_error(uneven: TokenShards, stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TokenLoader(uneven, stages, seed=3)


def test_a_split_that_is_not_there_is_an_error(uneven: TokenShards) -> None:
    with pytest.raises(ValueError, match="The test split has 0 tokens, fewer than one row of 8"):
        TokenLoader(uneven, [Stage(8, 8)], seed=3, split="test")


def test_ranks_read_as_many_rows_as_each_other(uneven: TokenShards) -> None:
    with pytest.raises(ValueError, match="batch_tokens is 64; give a multiple of 24, one row for each of 3 ranks"):
        TokenLoader(uneven, [Stage(8, 64)], seed=3, world_size=3)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=rf"rank is {rank}; give a number from 0 to world_size - 1 \(1\)"):
            TokenLoader(uneven, [Stage(8, 64)], seed=3, rank=rank, world_size=2)
