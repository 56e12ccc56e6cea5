import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from btlm.engine.options import GenerationOptions
from btlm.engine.sampling import Sampler, best_tokens, log_probabilities, nucleus, repeated, softmax
from btlm.errors import NothingAllowed, OptionError

VOCAB = 12


def distribution(options, logits, ids=(0,), draws=3000):
    """Number of times that each token is drawn."""
    sampler = Sampler(options)
    return np.bincount([sampler.choose(logits, ids) for _ in range(draws)], minlength=len(logits))


def theirs(logits, *processors, ids=(0,)):
    """Probabilities after Transformers' logits processors."""
    scores = torch.tensor(logits)[None]
    for processor in processors:
        scores = processor(torch.tensor([list(ids)]), scores)
    return scores[0].double().softmax(-1).numpy()


@pytest.fixture
def logits():
    return np.random.default_rng(3).standard_normal(VOCAB).astype(np.float32) * 1.5


@pytest.mark.parametrize(
    ("given", "processors"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 2.0}, [TemperatureLogitsWarper(2.0)]),
        ({"top_k": 4}, [TopKLogitsWarper(4)]),
        *(({"top_k": top_k}, [TopKLogitsWarper(VOCAB)]) for top_k in (VOCAB, VOCAB + 1, VOCAB + 5)),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"top_p": 1.0}, []),
        ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        (
            {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(6), TopPLogitsWarper(0.8)],
        ),
        (
            {"temperature": 0.8, "repetition_penalty": 3.0},
            [RepetitionPenaltyLogitsProcessor(3.0), TemperatureLogitsWarper(0.8)],
        ),
        (
            {"temperature": 1.0, "no_repeat_ngram_size": 2, "top_k": 5},
            [NoRepeatNGramLogitsProcessor(2), TopKLogitsWarper(5)],
        ),
        (
            {"temperature": 1.0, "logit_bias": {3: 2.0, 4: -1.5}, "repetition_penalty": 1.5},
            [SequenceBiasLogitsProcessor([[[3], 2.0], [[4], -1.5]]), RepetitionPenaltyLogitsProcessor(1.5)],
        ),
    ],
)
def test_draws_follow_the_distribution_of_transformers(given, processors, logits):
    ids = [1, 4, 7, 4, 2, 1, 4]
    expected = theirs(logits, *processors, ids=ids)
    draws = 3000
    counts = distribution(GenerationOptions(seed=5, **given), logits, ids, draws)
    assert counts[expected == 0].sum() == 0
    likely = expected * draws >= 5
    chi_square = ((counts - expected * draws)[likely] ** 2 / (expected * draws)[likely]).sum()
    # There are at most twelve cells. With 11 degrees of freedom, chi-square exceeds 31.3 once in a thousand.
    assert chi_square < 31.3


@pytest.mark.parametrize("presence", [0.0, 0.7, -2.0])
@pytest.mark.parametrize("frequency", [0.0, 0.4, -1.0])
def test_penalties_are_those_of_the_openai_interface(presence, frequency, logits):
    """logit - count * frequency_penalty - (count > 0) * presence_penalty, where only written tokens are counted."""
    prompt, written = [1, 1, 1, 2], [5, 6, 5, 5, 1]
    expected = [
        logit - written.count(token) * frequency - (token in written) * presence for token, logit in enumerate(logits)
    ]
    options = GenerationOptions(presence_penalty=presence, frequency_penalty=frequency)
    for token in range(VOCAB):  # the largest one after the others were forbidden
        allowed = np.arange(VOCAB) <= token
        choice = Sampler(options, len(prompt)).choose(logits, [*prompt, *written], allowed)
        assert choice == max(range(token + 1), key=expected.__getitem__)


@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.5])
def test_repetition_penalty_of_greedy_choices(penalty, logits):
    ids = [int(logits.argmax()), int(logits.argmin()), int(logits.argmax())]
    before = logits.copy()
    sampler = Sampler(GenerationOptions(repetition_penalty=penalty))
    expected = theirs(logits, RepetitionPenaltyLogitsProcessor(penalty), ids=ids).argmax()
    assert sampler.choose(logits, ids) == expected
    assert np.array_equal(logits, before)  # log-probabilities are computed from them later
    assert (sampler.choose(logits, ids) == ids[0]) is (penalty <= 1)


def test_the_penalty_lowers_negative_logits_too():
    logits = np.array([-1.0, -2.0, -9.0], np.float32)
    assert Sampler(GenerationOptions(repetition_penalty=3.0)).choose(logits, [0]) == 1
    assert Sampler(GenerationOptions(repetition_penalty=0.3)).choose(logits, [1]) == 1


@pytest.mark.parametrize("given", [{"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1, "temperature": 1.0}])
def test_bans_do_not_change_the_logits(given, logits):
    before = logits.copy()
    Sampler(GenerationOptions(**given)).choose(logits, [1, 2])
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("points", "token"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0], 1),
        ([0.0, 0.5, 0.0, 0.25, 0.0], 3),
        ([0.0, 1 - 2**-53, 0.0, 0.9, 0.0], 3),
        ([0.0, 1 - 2**-53, 0.0, 1 - 2**-53, 0.0], 1),
    ],
)
def test_a_token_without_probability_is_never_drawn(points, token):
    """The banned tokens have the smallest numbers there are."""

    class Draws:
        def random(self, size):
            assert size == len(points)
            return np.array(points)

    sampler = Sampler(GenerationOptions(temperature=1.0))
    sampler._random = Draws()  # type: ignore[assignment]
    assert sampler.choose(np.array([-np.inf, 1.0, -np.inf, 1.0, -np.inf], np.float32), [0]) == token


@pytest.mark.parametrize("rules", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.95}, {"top_k": 40}])
def test_two_models_that_draw_with_one_seed_mostly_agree(rules):
    """A draft needs it. Of distributions p and q whose distance D is half of the sum of |p - q|, draws can be equal
    with a probability of 1 - D at most. By races it is (1 - D) / (1 + D) at least; one number for the place in the
    cumulated distribution would give 0.39 to 0.52 here."""
    random = np.random.default_rng(8)
    first = (random.standard_normal((2000, 300)) * 2.5).astype(np.float32)
    second = first + (random.standard_normal(first.shape) * 0.5).astype(np.float32)
    one, other = (Sampler(GenerationOptions(seed=5, **rules)) for _ in range(2))
    same = np.mean([one.choose(a, [0]) == other.choose(b, [0]) for a, b in zip(first, second, strict=True)])
    distances = np.array([np.abs(softmax(a) - softmax(b)).sum() / 2 for a, b in zip(first, second, strict=True)])
    assert same > np.mean((1 - distances) / (1 + distances))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_repeated_n_grams_are_those_of_transformers(size):
    rng = np.random.default_rng(size)
    for length in range(1, 30):
        ids = rng.integers(0, 3, length).tolist()
        scores = NoRepeatNGramLogitsProcessor(size)(torch.tensor([ids]), torch.zeros(1, 3))
        assert repeated(ids, size).tolist() == torch.isinf(scores[0]).nonzero()[:, 0].tolist(), ids


def test_all_tokens_banned_still_gives_one(logits):
    assert 0 <= Sampler(GenerationOptions(no_repeat_ngram_size=1)).choose(logits, list(range(VOCAB))) < VOCAB


def test_the_seed_repeats_the_draws(logits):
    first, second = (Sampler(GenerationOptions(temperature=1.0, seed=seed)) for seed in (7, 7))
    draws = [[sampler.choose(logits, [0]) for _ in range(30)] for sampler in (first, second)]
    assert draws[0] == draws[1]
    drawn = Sampler(GenerationOptions(temperature=1.0))
    assert drawn.seed is not None
    again = Sampler(GenerationOptions(temperature=1.0, seed=drawn.seed))
    assert [drawn.choose(logits, [0]) for _ in range(30)] == [again.choose(logits, [0]) for _ in range(30)]
    assert Sampler(GenerationOptions()).seed is None


def test_log_probabilities_and_softmax(logits):
    for scores in (logits, logits + 1000, logits * 50):
        exact = torch.tensor(scores).double().log_softmax(-1).numpy()
        ours = log_probabilities(np.tile(scores, (VOCAB, 1)), range(VOCAB))
        assert np.allclose(ours, exact, rtol=1e-5, atol=1e-5)
        assert np.allclose(softmax(scores), np.exp(exact), atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300, 5e-324])
def test_the_smallest_temperatures_are_greedy(logits, temperature):
    sampler = Sampler(GenerationOptions(temperature=temperature, seed=0))
    assert {sampler.choose(logits, [0]) for _ in range(20)} == {int(logits.argmax())}


def test_temperature_0_is_greedy(logits):
    sampler = Sampler(GenerationOptions(temperature=0))
    assert {sampler.choose(logits, [0]) for _ in range(20)} == {int(logits.argmax())}
    assert sampler.seed is None


def test_a_tie_is_kept_by_top_k():
    counts = distribution(GenerationOptions(top_k=1, seed=0), np.array([1.0, 2.0, 2.0, 0.0], np.float32), draws=100)
    assert counts[[0, 3]].sum() == 0
    assert min(counts[1:3]) > 20


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.9, 4)])
def test_top_p_keeps_no_more_than_it_takes(top_p, kept):
    """Four tokens of probability 1/4, which sum exactly: at the border the token that reaches top-p is the last."""
    counts = distribution(GenerationOptions(top_p=top_p, seed=0), np.zeros(4, np.float32), draws=200)
    assert (counts > 0).sum() == kept
    assert (TopPLogitsWarper(top_p)(torch.zeros(1, 1), torch.zeros(1, 4)) > -np.inf).sum() == kept


def sort_all(probabilities, top_p):
    """Top-p as it is defined: all tokens are sorted."""
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return order[before < top_p]


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.5, 2.0, 8.0, 60.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 0.999999, 1 - 1e-15])
def test_top_p_is_that_of_sorting_all_tokens(spread, top_p):
    random = np.random.default_rng(5)
    for size in (1, 2, 3000):
        logits = (random.standard_normal(size) * spread).astype(np.float32)
        for scores in (logits, logits.round(1), np.where(random.random(size) < 0.3, logits.max(), logits)):  # with ties
            probabilities = softmax(scores)
            assert np.array_equal(nucleus(probabilities, top_p), sort_all(probabilities, top_p))


def test_the_border_of_top_p_is_that_of_sorting_all_tokens():
    """What a token is compared with is a rounded sum; at the sums themselves every rounding counts."""
    probabilities = softmax(np.random.default_rng(6).standard_normal(400) * 3)
    for top_p in np.cumsum(np.sort(probabilities)[::-1])[:-1]:
        assert np.array_equal(nucleus(probabilities, top_p), sort_all(probabilities, top_p))


@pytest.mark.parametrize("given", [{"temperature": 0.8}, {"temperature": 1.7}, {"top_k": 50}, {}])
def test_top_p_draws_the_tokens_of_sorting_all(given, monkeypatch):
    logits = (np.random.default_rng(7).standard_normal((200, 2000)) * 2.5).astype(np.float32)

    def drawn():
        sampler = Sampler(GenerationOptions(top_p=0.95, seed=4, **given))
        return [sampler.choose(row, [0]) for row in logits]

    fast = drawn()
    monkeypatch.setattr("btlm.engine.sampling.nucleus", sort_all)
    assert fast == drawn()
    assert len(set(fast)) > 20


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0.001, "top_p": 0.5},
        {"repetition_penalty": 1000.0, "top_p": 1e-320},
        {"logit_bias": {3: 100.0, 4: -100.0}, "temperature": 1e-320, "top_p": 0.5},
        {"presence_penalty": -100.0, "frequency_penalty": 100.0, "temperature": 1e300},
        {"temperature": 5e-324, "top_k": 2**62},
    ],
)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_the_most_extreme_options_choose_a_token(options, scale, logits):
    sampler = Sampler(GenerationOptions(seed=1, **options), 1)
    with np.errstate(all="ignore"):
        assert all(0 <= sampler.choose(logits * np.float32(scale), [0, 3, 3, 4]) < VOCAB for _ in range(20))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e5},
        {"logit_bias": {1: 1e39}},
        {"presence_penalty": 1e39},
    ],
)
def test_options_that_no_logit_survives_are_refused(options):
    with pytest.raises(OptionError, match="from"):
        GenerationOptions(**options)


def test_best_tokens(logits):
    exact = torch.tensor(logits).double().log_softmax(-1)
    (three,) = best_tokens(logits[None], 3)
    values, ids = exact.topk(3)
    assert [token for token, _ in three] == ids.tolist()
    assert np.allclose([score for _, score in three], values)
    ties = np.array([[1.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    assert [[token for token, _ in row] for row in best_tokens(ties, 2)] == [[1, 2], [0, 1]]
    assert len(best_tokens(ties, 9)[0]) == 5


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "seed": 1}, {"top_p": 0.5, "seed": 1}, {"top_k": 2, "seed": 1}]
)
def test_only_what_is_allowed_is_chosen(logits, options):
    allowed = np.zeros(VOCAB, bool)
    allowed[np.argsort(logits)[:3]] = True  # the least probable ones
    sampler = Sampler(GenerationOptions(**options))
    assert {sampler.choose(logits, [0], allowed) for _ in range(30)} <= set(np.flatnonzero(allowed).tolist())
    with pytest.raises(NothingAllowed):
        sampler.choose(logits, [0], np.zeros(VOCAB, bool))


def test_rules_that_exclude_each_other(logits):
    sampler = Sampler(GenerationOptions(no_repeat_ngram_size=1))
    allowed = np.zeros(VOCAB, bool)
    allowed[5] = True
    assert sampler.choose(logits, [0], allowed) == 5
    with pytest.raises(NothingAllowed):
        sampler.choose(logits, [0, 5], allowed)
