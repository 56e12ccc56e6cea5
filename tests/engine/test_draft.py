"""Drafts: the text is that of the model alone, whatever is guessed."""

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest

from btlm.checkpoint import Checkpoint
from btlm.engine import Engine, GenerationOptions
from btlm.engine.draft import DraftCosts, DraftGuesses
from btlm.engine.network import Network
from btlm.errors import DraftTooLarge, DraftVocabulary, NothingAllowed
from btlm.kernels import load_kernels
from tests.checkpoint.tiny import save_tiny

PROMPTS = [[*range(40, 70)], [*range(40, 60), 1, 2], [5]]
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2},
    {"frequency_penalty": 0.2, "presence_penalty": 0.3, "temperature": 0.8, "seed": 6},
]
N = 24


@pytest.fixture(scope="module")
def networks(checkpoint, tmp_path_factory):
    """The model and a smaller one."""
    small = save_tiny(tmp_path_factory.mktemp("draft"), n_layer=1)
    kernels = load_kernels("auto", 1)
    opened = [Checkpoint.open(folder) for folder in (checkpoint, small)]
    return [Network(kernels, one.architecture, one.tensors, max_tokens=16) for one in opened]


def same(tokens, expected):
    """Whether these are the tokens; on native kernels, with the same bits."""
    (ids, scores), (wanted, exact) = (zip(*(token[:2] for token in one), strict=True) for one in (tokens, expected))
    native = load_kernels("auto", 1).name != "torch"
    return ids == wanted and (scores == exact if native else np.allclose(scores, exact, atol=1e-4))


def options_of(rules, **more):
    return GenerationOptions(max_new_tokens=N, lookup_tokens=0, **rules, **more)


@pytest.fixture
def open_engine(networks):
    def open_with(draft=True, **given):
        return Engine(networks[0], cache_dtype="float32", context=60, draft=networks[1] if draft else None, **given)

    return open_with


@pytest.fixture
def alone(open_engine):
    """What the model writes alone, by prompt and rules."""

    def write(prompt, rules):
        stream = open_engine(draft=False).generate(prompt, options_of(rules), stop_ids=frozenset())
        return [(token.id, token.logprob) for token in stream]

    return write


def impose(engine, texts, right):
    """Guesses that are right as often as ``right`` tells, an endless sequence."""
    calls = iter(right)

    def choose(before, guess):
        text = next(text for text, prompt in zip(texts, PROMPTS, strict=True) if before[: len(prompt)] == prompt)
        true = text[len(before)] if len(before) < len(text) else 0
        return true if next(calls) else (true + 1) % 257

    engine.draft.choose = choose
    # Every guess pays, whatever the clock says.
    engine.draft.costs.best = lambda share, most, writing: most


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("share", ["its own", "none", "all", "some"])
def test_the_text_is_that_of_the_model_alone(open_engine, alone, rules, share):
    engine = open_engine(num_requests=3)
    expected = [alone(prompt, rules) for prompt in PROMPTS]
    texts = [[*prompt, *(token for token, _ in text)] for prompt, text in zip(PROMPTS, expected, strict=True)]
    if share == "its own":
        engine.draft.costs.best = lambda share, most, writing: most
    else:
        right = {"none": [False], "all": [True], "some": [True, True, False, True, False]}[share]
        impose(engine, texts, itertools.cycle(right))
    running = [engine.add(prompt, options_of(rules), stop_ids=frozenset()) for prompt in PROMPTS]
    steps = 0
    while any(request.finished is None for request in running):
        engine.step()
        steps += 1
    assert all(same(request.tokens, text) for request, text in zip(running, expected, strict=True))
    assert all(request.draft.guessed > 0 for request in running)
    if share == "all":
        assert all(request.draft.accepted == request.draft.guessed for request in running)
        assert steps < N
    if share == "none":
        assert all(request.draft.accepted == 0 for request in running)


def test_the_draft_of_a_model_is_right_where_it_is_the_model(open_engine, networks, alone):
    """The draft reads what the model reads, with the request's own draws: as its own draft, a model is always right."""
    for rules in RULES[:2]:
        engine = open_engine(num_requests=3)
        engine.draft.network = networks[0]
        engine.draft._cache = engine.cache.beside(networks[0].kernels, networks[0].architecture, "float32")
        engine.draft.costs.best = lambda share, most, writing: min(most, 3)
        one_before = engine.add(PROMPTS[1], options_of(rules), stop_ids=frozenset())
        for _ in range(3):
            engine.step()
        engine.remove(one_before)  # cancelled; what it leaves is reused, also by the draft
        running = [engine.add(prompt, options_of(rules), stop_ids=frozenset()) for prompt in PROMPTS]
        assert running[1].reused_tokens == len(PROMPTS[1]) - 1
        while any(request.finished is None for request in running):
            engine.step()
        for request, prompt in zip(running, PROMPTS, strict=True):
            assert same(request.tokens, alone(prompt, rules))
            assert request.draft.guessed == request.draft.accepted >= N * 2 // 4


@pytest.mark.parametrize("rules", RULES[:3])
def test_the_draft_guesses_what_a_mask_allows(open_engine, networks, rules):
    """Every third token is bound to one id that is hardly probable, and after 20 nothing is allowed."""

    def mask(written):
        if len(written) == 20:
            return np.zeros(257, bool)
        return np.arange(257) == 200 + len(written) if len(written) % 3 == 2 else None

    def write(engine):
        request = engine.add(PROMPTS[0], options_of(rules), stop_ids=frozenset(), mask=mask)
        while request.finished is None:
            engine.step()
        assert isinstance(request.error, NothingAllowed)
        return request

    engine = open_engine()
    engine.draft.network = networks[0]
    engine.draft._cache = engine.cache.beside(networks[0].kernels, networks[0].architecture, "float32")
    engine.draft.costs.best = lambda share, most, writing: min(most, 3)
    drafted, alone = write(engine), write(open_engine(draft=False))
    assert drafted.ids == alone.ids
    assert drafted.new_tokens == 20
    assert drafted.draft.guessed == drafted.draft.accepted >= 12


@pytest.mark.parametrize("rules", RULES[:2])
def test_the_draft_forgets_its_wrong_guesses(open_engine, networks, alone, rules):
    engine = open_engine()
    engine.draft.network = networks[0]
    engine.draft._cache = engine.cache.beside(networks[0].kernels, networks[0].architecture, "float32")
    engine.draft.costs.best = lambda share, most, writing: min(most, 4)
    text = [*PROMPTS[0], *(token for token, _ in alone(PROMPTS[0], rules))]
    right, calls = [], itertools.count()

    def choose(before, guess):
        if before == text[: len(before)]:
            right.append(guess == text[len(before)])
        return (guess + 1) % 257 if next(calls) % 3 == 1 else guess

    engine.draft.choose = choose
    request = engine.add(PROMPTS[0], options_of(rules), stop_ids=frozenset())
    forward, failures = engine.network.forward, iter([0, 0, 1, 0, 1])

    def fail(*arguments):
        if next(failures, 0):
            raise KeyboardInterrupt
        return forward(*arguments)

    engine.network.forward = fail
    try:
        while request.finished is None:
            with contextlib.suppress(KeyboardInterrupt):  # a step that fails leaves guesses behind, too
                engine.step()
    finally:
        del engine.network.forward
    assert request.ids == text
    assert len(right) > 10
    assert all(right)


def test_a_request_that_leaves_disturbs_no_other(open_engine, alone):
    engine = open_engine(num_requests=3)
    engine.draft.costs.best = lambda share, most, writing: most
    leaving, staying = (engine.add(prompt, options_of({}), stop_ids=frozenset()) for prompt in PROMPTS[:2])
    while leaving.new_tokens < 5:
        engine.step()
    engine.remove(leaving)
    late = engine.add(PROMPTS[0], options_of({}), stop_ids=frozenset())
    while staying.finished is None or late.finished is None:
        engine.step()
    for request, prompt in ((staying, PROMPTS[1]), (late, PROMPTS[0])):
        assert same(request.tokens, alone(prompt, {}))


def test_a_draft_that_is_not_finite_only_stops_guessing(open_engine, alone, monkeypatch):
    engine = open_engine()
    engine.draft.costs.best = lambda share, most, writing: most
    monkeypatch.setattr(
        engine.draft.network,
        "_ln_f",
        engine.draft.network._ln_f.__class__(np.full(32, np.nan, np.float32), np.zeros(32, np.float32)),
    )
    request = engine.add(PROMPTS[0], options_of({}), stop_ids=frozenset())
    while request.finished is None:
        engine.step()
    assert request.draft.guessed == 0
    assert same(request.tokens, alone(PROMPTS[0], {}))


def test_without_guesses_of_the_draft_the_text_itself_is_looked_up(open_engine):
    engine = open_engine()
    options = GenerationOptions(max_new_tokens=20, draft_tokens=0)
    request = engine.add([7, 8, 9] * 6, options, stop_ids=frozenset())
    while request.finished is None:
        engine.step()
    assert (request.draft.guessed, request.draft.read) == (0, 0)
    assert request.lookup.guessed > 0


# How much is guessed


def costs(step, per_token, each):
    learned = DraftCosts()
    for tokens in (1, 4, 2, 8) * 20:
        learned.learn_step(tokens, step + per_token * (tokens - 1))
        learned.learn_pass(each)
    return learned


def test_the_number_of_guesses_follows_what_they_cost_and_how_often_they_are_right():
    cheap = costs(1.0, 0.02, 0.05)
    numbers = [cheap.best(share, 16, 1) for share in (0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert numbers == sorted(numbers)
    assert numbers[:2] == [0, 0]
    assert 0 < numbers[2] < numbers[4] < numbers[5] < numbers[6] == 16
    assert costs(1.0, 0.2, 0.3).best(0.45, 16, 1) == 0  # a guess costs half a step
    assert cheap.best(0.7, 16, 1) > cheap.best(0.7, 16, 16)  # requests that share a step pay less for it
    assert cheap.best(0.9, 3, 1) == 3
    assert DraftCosts().best(0.5, 16, 1) == 2


def test_a_draft_that_is_never_right_is_hardly_asked():
    draft, known, guessed = DraftGuesses(8), costs(1.0, 0.02, 0.05), []
    for _ in range(300):
        guessed.append(draft.number(known, 16, 1))
        draft.learn(guessed[-1], 0)
    assert sum(guessed[:20]) > 3
    assert sum(guessed[100:]) < 200 * 0.04
    assert max(guessed[100:]) == 1
    for _ in range(150):  # it is right from now on
        guessed.append(draft.number(known, 16, 1))
        draft.learn(guessed[-1], guessed[-1])
    assert guessed[-1] == 8


def test_a_draft_that_is_right_is_asked_for_more():
    draft, known = DraftGuesses(8), costs(1.0, 0.02, 0.05)
    for _ in range(20):
        number = draft.number(known, 16, 1)
        draft.learn(number, number)
    assert (draft.number(known, 16, 1), draft.number(known, 5, 1), draft.number(known, 0, 1)) == (8, 5, 0)
    assert draft.guessed == draft.accepted


# Drafts that cannot be used


def test_a_draft_larger_than_its_model(checkpoint, tmp_path):
    large = save_tiny(tmp_path, n_layer=3)
    with pytest.raises(DraftTooLarge, match="The draft has 32,024 parameters and the model 24,112"):
        Engine.open(checkpoint, draft=large, context=20)
    with pytest.raises(DraftTooLarge, match="must be smaller"):
        Engine.open(checkpoint, draft=checkpoint, context=20)


def test_a_draft_of_another_vocabulary(checkpoint, tmp_path):
    other = save_tiny(tmp_path, n_layer=1, vocab_size=300)
    with pytest.raises(DraftVocabulary, match="a vocabulary of 300 tokens and the model one of 257"):
        Engine.open(checkpoint, draft=other, context=20)


def test_a_draft_of_other_tokens(checkpoint, tmp_path):
    other = save_tiny(tmp_path, n_layer=1)
    tokenizer = (other / "tokenizer.json").read_text(encoding="utf-8")
    swapped = tokenizer.replace('"a": 64', '"a": 65').replace('"b": 65', '"b": 64', 1)
    (other / "tokenizer.json").write_text(swapped, encoding="utf-8")
    if swapped == tokenizer:
        pytest.fail("the tokenizer has another form")
    with pytest.raises(DraftVocabulary, match=r"The tokens of the draft .* are not those of"):
        Engine.open(checkpoint, draft=other, context=20)
