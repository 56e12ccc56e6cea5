"""Random sequences of what callers do with an engine, against every request computed alone and from nothing."""

import importlib.util
from collections import Counter
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from btlm.checkpoint import Checkpoint
from btlm.engine import Engine, GenerationOptions, Request
from btlm.engine.cache import KVCache, common_prefix
from btlm.engine.network import Network
from btlm.engine.request import Token
from btlm.engine.sampling import Sampler, log_probabilities
from btlm.engine.scheduler import Scheduler
from btlm.errors import EngineFull, NothingAllowed, RequestCancelled
from btlm.kernels import load_kernels, num_pages
from btlm.kernels.arrays import DTYPES
from tests.checkpoint.tiny import save_tiny

HAS_NATIVE = importlib.util.find_spec("btlm.kernels._native") is not None
native = pytest.mark.skipif(not HAS_NATIVE, reason="btlm was installed without a compiler")

STEP_TOKENS = (2, 3, 8, 64)
MOST_STEPS = 5000  # of one engine; the longest sequences take some 1,000
TEXTS = ([*b"to be or not to be, that is to be or not to be: the words again, the"], [1, 2] * 34, [3] * 68)
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 1},
    {"top_p": 0.6, "temperature": 1.2, "seed": 2},
    {"top_k": 4, "seed": 3, "repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {3: -2.0, 98: 1.5}},
]


class Alone:
    """Computes requests one by one: for each token the whole prefix anew, in an empty cache."""

    def __init__(self, network: Network, cache_dtype: str) -> None:
        self.network = network
        self.cache_dtype = cache_dtype
        self.known: dict[Any, Any] = {}

    def logits(self, ids, rows):
        cache = KVCache(self.network.kernels, self.network.architecture, self.cache_dtype, 1, len(ids))
        cache.begin(0, len(ids))
        segments = np.array([[0, 0, 0, len(ids)]])
        return self.network.forward(np.array(ids), segments, cache, np.array(rows))

    def tokens(self, prompt, options):
        key = (tuple(prompt), repr(options))
        if key not in self.known:
            ids, sampler, written = list(prompt), Sampler(options, len(prompt)), []
            for _ in range(options.max_new_tokens):
                row = self.logits(ids, [len(ids) - 1])[0]
                ids.append(sampler.choose(row, ids))
                (score,) = log_probabilities(row[None], ids[-1:]).tolist()
                written.append((ids[-1], score))
            self.known[key] = written
        return self.known[key]

    def scores(self, ids):
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = log_probabilities(self.logits(ids[:-1], range(len(ids) - 1)), ids[1:])
        return self.known[key]


class Prophet:
    """Guesses the tokens that will be written, each fifth of them wrongly, and goes on behind the end."""

    def __init__(self, following, prompt_tokens: int, wrong: bool) -> None:
        self.following = [(token + (wrong and i % 5 == 4)) % 257 for i, token in enumerate(following)] + [0] * 20
        self.prompt_tokens = prompt_tokens

    def guess(self, ids):
        return self.following[len(ids) - self.prompt_tokens :][:16]

    def learn(self, guessed, accepted):
        pass


class FixedPace:
    """Depends on no clock."""

    def __init__(self, prompt_tokens: int | None) -> None:
        self.prompt_tokens = prompt_tokens

    def learn(self, *step):
        pass


class Interrupted(Exception):
    pass


seeds = st.integers(0, 2**32 - 1)  # drawing every value from hypothesis is slow, and gives less variety


class Callers(RuleBasedStateMachine):
    """Callers of one engine, and what each request has to write."""

    def __init__(self, networks: dict[int, Network], drafts: dict[int, Network], alone: dict[str, Alone]) -> None:
        super().__init__()
        self.networks = networks
        self.drafts = drafts
        self.references = alone
        self.requests: list[Request] = []
        self.running: list[Request] = []
        self.expected: dict[Request, list[tuple[int, float]]] = {}
        self.reason: dict[Request, str] = {}

    @initialize(seed=seeds)
    def open(self, seed):
        choose = Random(seed)
        self.dtype, step_tokens = choose.choice(sorted(DTYPES)), choose.choice(STEP_TOKENS)
        self.alone, network = self.references[self.dtype], self.networks[step_tokens]
        self.num_requests = choose.choice((1, 2, 2, 3, 4, 4))
        context = choose.choice((12, 40, 65, 130))
        cache_tokens = choose.choice((None, None, context, choose.randint(context, self.num_requests * context)))
        self.engine = Engine(
            network,
            cache_dtype=self.dtype,
            context=context,
            num_requests=self.num_requests,
            cache_tokens=cache_tokens,
            draft=choose.choice((None, self.drafts[step_tokens])),
        )
        draft = self.engine.draft
        if draft is not None:  # the durations of steps must not decide how much is guessed
            draft.costs.best = lambda share, most, writing: choose.randint(0, most)  # type: ignore[method-assign]
        self.engine._scheduler = Scheduler(self.engine.cache, step_tokens, choose.choice((3, 64)), draft=draft)
        pace: Any = FixedPace(choose.choice((None, 1, 5)))
        self.engine._scheduler.pace = pace
        self.limit_steps()

    def limit_steps(self):
        """A request that the scheduler forgets fails the test, and does not let it wait forever."""
        step, left = self.engine.step, iter(range(MOST_STEPS))

        def limited():
            assert next(left, None) is not None, f"not finished after {MOST_STEPS} steps: {self.running}"
            return step()

        self.engine.step = limited  # type: ignore[method-assign]

    # Requests

    def prompt(self, choose, new_tokens=1):
        """The beginning of a fixed text or of an earlier request, and other tokens after it; it fits the context."""
        text = choose.choice([*TEXTS, *(request.ids for request in self.requests[-6:])])
        ids = [*text[: choose.randint(1, 65)], *(choose.randrange(4) for _ in range(choose.randrange(4)))]
        return ids[: self.engine.context + 1 - new_tokens]

    @rule(seed=seeds)
    def add(self, seed):
        choose = Random(seed)
        for _ in range(choose.randint(1, 3)):
            self.add_one(choose)
        self.step(choose.randrange(6), fails=False)

    def add_one(self, choose):
        new_tokens = choose.randint(0, 12)
        ids = self.prompt(choose, new_tokens or 1)
        new_tokens = new_tokens or self.engine.context + 1 - len(ids)  # to the last place
        kind = choose.choice(("write", "write", "write", "write", "score", "score and write", "too long"))
        if kind == "too long":
            with pytest.raises(ValueError, match="exceed the context"):
                self.engine.add(ids, GenerationOptions(max_new_tokens=self.engine.context + 2 - len(ids)))
            return
        if kind == "score":  # together with other requests
            prompt = [*ids, 7][: self.engine.context]
            if len(prompt) > 1 and (request := self.try_to_add(prompt, 0, choose.randrange(1, len(prompt)))):
                self.begin(request, [], "length")
            return
        rules, stop_at = choose.choice(RULES), choose.randint(-12, 10)
        guesses = choose.choice((0, 3, "right", "right", "nearly right"))
        lookup_tokens = guesses if isinstance(guesses, int) else 16
        options = GenerationOptions(max_new_tokens=new_tokens, lookup_tokens=lookup_tokens, **rules)
        whole = expected = self.alone.tokens(ids, options)
        stop_ids, reason = frozenset[int](), "length"
        if 0 <= stop_at < len(expected):
            stop_ids, reason = frozenset({expected[stop_at][0]}), "stop"
            first = next(i for i, (token, _) in enumerate(expected) if token in stop_ids)
            expected = expected[: first + 1]
        held = [common_prefix(ids, other.ids[: other.cached]) for other in self.running]
        score_from = choose.randint(1, len(ids)) if kind == "score and write" and len(ids) > 1 else None
        score_from = score_from if score_from != len(ids) else None
        request = self.try_to_add(ids, new_tokens, score_from, options, stop_ids)
        if request is None:
            return
        most = len(ids) - 1 if score_from is None else score_from - 1
        assert min(max(held, default=0), most) // 64 * 64 <= request.reused_tokens <= most
        if isinstance(guesses, str):
            prophet: Any = Prophet([token for token, _ in whole], len(ids), guesses == "nearly right")
            request.lookup = prophet
        self.begin(request, expected, reason)

    def try_to_add(self, ids, new_tokens, score_from, options=None, stop_ids=None):
        """A request, or None if the engine is full, which it must not be without a reason."""
        free, room = self.engine.cache.free_pages, self.engine.has_room
        try:
            if new_tokens:
                return self.engine.add(ids, options, stop_ids=stop_ids, score_from=score_from)
            return self.engine.add_score(ids, score_from)
        except EngineFull:
            assert not self.fits(max(1, len(ids) + new_tokens - 1))
            assert (self.engine.cache.free_pages, self.engine.has_room) == (free, room)
            return None

    def fits(self, places):
        """Whether a request fits even if it shares nothing."""
        pages = sum(num_pages(request.places) for request in self.running) + num_pages(places)
        return len(self.running) < self.num_requests and pages <= self.engine.cache.num_pages

    def begin(self, request, expected, reason):
        self.requests.append(request)
        self.running.append(request)
        self.expected[request], self.reason[request] = expected, reason

    @precondition(lambda self: self.requests)
    @rule(seed=seeds)
    def remove(self, seed):
        """A client goes; it may have gone before, and its request may have ended."""
        choose = Random(seed)
        request = choose.choice(self.requests)
        for _ in range(choose.randint(1, 2)):
            self.engine.remove(request)
        if request in self.running:
            self.running.remove(request)

    # Steps

    def end(self):
        """Forget the requests that have ended."""
        self.running = [request for request in self.running if request.finished is None]

    @rule(times=st.integers(1, 10), fails=st.booleans())
    def step(self, times, fails):
        if fails:
            with self.failing(0):
                self.engine.step()
        for _ in range(times):
            writing = [request for request in self.running if request.new_tokens]
            before = {request: (len(request.tokens), request.cached) for request in self.running}
            written = self.engine.step()
            for request, (had, _) in before.items():
                assert [token for other, token in written if other is request] == request.tokens[had:]
            assert len(written) == sum(len(request.tokens) - had for request, (had, _) in before.items())
            assert not before or any(request.cached > cached for request, (_, cached) in before.items())
            if len(writing) <= self.engine.network.max_tokens:  # neither prompts nor guesses of others hold them up
                assert all(len(request.tokens) > before[request][0] for request in writing)
            self.end()

    @contextmanager
    def failing(self, calls):
        """The forward pass writes to the cache, then fails."""
        real, network = self.engine.network.forward, self.engine.network
        left = calls

        def forward(*arguments):
            nonlocal left
            logits = real(*arguments)
            left -= 1
            if left < 0:
                raise Interrupted
            return logits

        network.forward = forward  # type: ignore[method-assign]
        try:
            yield
        except Interrupted:
            pass
        finally:
            del network.forward

    @rule(seed=seeds)
    def score(self, seed):
        choose = Random(seed)
        ids = [*self.prompt(choose)[:-1], 7, 7]
        if len(self.running) == self.num_requests:
            with pytest.raises(EngineFull):
                self.engine.score(ids)
        elif not self.fits(len(ids) - 1):
            return
        elif choose.random() < 0.3:
            with self.failing(choose.randrange(2)):
                self.engine.score(ids)
        else:
            score_from = choose.randrange(1, len(ids))
            assert np.array_equal(self.engine.score(ids, score_from), self.alone.scores(ids)[score_from - 1 :])
        self.end()  # the others go on meanwhile

    @precondition(lambda self: len(self.running) < self.num_requests)
    @rule(seed=seeds)
    def generate_batch(self, seed):
        """A reader of several streams, who may leave before they end; other requests go on meanwhile."""
        choose = Random(seed)
        new_tokens, read = choose.randint(1, 5), choose.randint(1, 20)
        ids = [self.prompt(choose, new_tokens) for _ in range(choose.randint(1, 4))]
        if not all(self.fits(len(one) + new_tokens - 1) for one in ids):
            return
        options = GenerationOptions(max_new_tokens=new_tokens, **choose.choice(RULES))
        streams: list[list[Any]] = [[] for _ in ids]
        batch = self.engine.generate_batch(ids, options, stop_ids=frozenset())
        for index, token in batch:
            streams[index].append(token)
            if sum(map(len, streams)) == read:
                break
        else:
            assert all(len(stream) == new_tokens for stream in streams)
        batch.close()  # type: ignore[attr-defined]
        for one, stream in zip(ids, streams, strict=True):
            assert [token[:2] for token in stream] == self.alone.tokens(one, options)[: len(stream)]
        self.end()

    # What always holds

    @invariant()
    def what_is_written_is_what_each_writes_alone(self):
        for request in self.requests:
            expected = self.expected[request]
            assert [token[:2] for token in request.tokens] == expected[: len(request.tokens)]
            assert request.ids[request.prompt_tokens :] == [token.id for token in request.tokens]
            if request.score_from is not None:
                prompt = request.ids[: request.prompt_tokens]
                whole = self.alone.scores(prompt)[request.score_from - 1 :].tolist()
                scored = list(zip(prompt[request.score_from :], whole, strict=True))
                assert [token[:2] for token in request.scores] == scored[: len(request.scores)]
                assert request.finished in (None, "error") or len(request.scores) == len(whole)
            if request.finished == "error":
                assert isinstance(request.error, RequestCancelled)
            elif request.finished:
                assert (len(request.tokens), request.finished) == (len(expected), self.reason[request])

    @invariant()
    def there_is_room_for_what_is_not_under_way(self):
        if hasattr(self, "engine"):
            assert self.engine.has_room == (len(self.running) < self.num_requests)
            cache, scheduler = self.engine.cache, self.engine._scheduler
            texts = [cache.pages(slot) for slot in scheduler._slots.values()] + [text.pages for text in scheduler._left]
            holders = Counter(page for pages in texts for page in pages)
            assert cache.num_pages - cache.free_pages == len(holders)
            assert all(cache.holders(page) == number for page, number in holders.items())

    def teardown(self):
        for _ in range(600):
            if not self.running:
                return
            self.step(1, False)
            self.what_is_written_is_what_each_writes_alone()
        raise AssertionError(f"not finished: {self.running}")


# Faults that only show in what is reused, or in rare cases


SHORT = GenerationOptions(max_new_tokens=9)


@pytest.fixture
def open_engine(checkpoint):
    opened = Checkpoint.open(checkpoint)
    network = Network(load_kernels("torch", 1), opened.architecture, opened.tensors, max_tokens=16)
    return lambda **given: Engine(network, cache_dtype="float32", context=64, **given)


def one_token(engine, ids, **options):
    """A request until it has written one token."""
    request = engine.add(ids, GenerationOptions(max_new_tokens=1, **options), stop_ids=frozenset())
    while request.finished is None:
        engine.step()
    return request


def test_a_shared_prefix_is_copied_and_not_overwritten(open_engine):
    engine = open_engine(num_requests=3)
    text = list(range(40, 80))
    one_token(engine, text)
    # Another text with the same beginning takes a slot of its own: all of the first is still there.
    assert one_token(engine, [*text[:20], 1, 2]).reused_tokens == 20
    assert one_token(engine, [*text, 3]).reused_tokens == 40
    # One that goes on from all of it takes over its slot.
    assert one_token(engine, [*text, 3, 4]).reused_tokens == 41
    assert one_token(engine, [*text[:20], 1, 2, 5]).reused_tokens == 22


def test_the_slot_that_was_given_away_longest_ago_is_the_next(open_engine):
    engine = open_engine(num_requests=2)
    for ids in ([1] * 9, [2] * 9, [1] * 10, [3] * 9):  # the third goes on in the slot of the first
        one_token(engine, ids)
    assert [engine.add([token] * 9, SHORT).reused_tokens for token in (1, 2)] == [8, 0]


def test_scored_tokens_per_step_are_bounded(open_engine):
    engine = open_engine(num_requests=3)
    scheduler = Scheduler(engine.cache, 16, 5)
    for length in (4, 30):
        scheduler.add(Request([*range(length)], SHORT, frozenset(), 0, score_from=1))
    scheduler.add(Request([*range(50, 59)], SHORT, frozenset(), 9))
    assert [(part.read, part.scored) for part in scheduler.plan().parts] == [(3, 3), (9, 0), (2, 2)]


def test_a_slot_forgets_what_its_last_request_left(open_engine):
    engine = open_engine()
    one_token(engine, [1, 2, 3, 4, 5, 6])
    engine.remove(engine.add([9, 9, 9], SHORT))  # leaves before a step: neither its tokens nor those before are there
    assert engine.add([1, 2, 3, 4, 5, 6], SHORT).reused_tokens == 0


def test_a_failed_score_leaves_no_tokens_that_are_not_computed(open_engine, monkeypatch):
    engine = open_engine()
    one_token(engine, list(range(30)))
    forward, calls = engine.network.forward, []

    def fail_in_the_second_step(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(engine.network, "forward", fail_in_the_second_step)
    with pytest.raises(KeyboardInterrupt):
        engine.score(list(range(100, 140)))
    assert engine.has_room
    assert one_token(engine, list(range(100, 140))).reused_tokens == 16  # those of the first step


def test_removing_an_ended_request_frees_no_other(open_engine):
    engine = open_engine()
    first = one_token(engine, [1, 2])
    second = engine.add([3, 4], SHORT)
    engine.remove(first)
    engine.remove(first)
    assert not engine.has_room
    engine.remove(second)
    assert engine.has_room


def test_a_long_prompt_holds_nobody_up(open_engine):
    engine = open_engine(num_requests=3)
    long = engine.add(range(50), SHORT, stop_ids=frozenset())
    short = [engine.add([token], SHORT, stop_ids=frozenset()) for token in (1, 2)]
    for step in range(1, 4):
        engine.step()
        assert [request.new_tokens for request in short] == [step, step]
        assert long.cached == 14 * step  # and it gets the rest of the step


def test_guesses_of_one_request_hold_up_no_other(open_engine):
    engine = open_engine(num_requests=2)
    options = GenerationOptions(max_new_tokens=30, lookup_tokens=16)
    requests = [engine.add([token], options, stop_ids=frozenset()) for token in (1, 2)]
    for request in requests:
        prophet: Any = Prophet([0] * 40, 1, wrong=False)
        request.lookup = prophet
    for step in range(1, 5):
        engine.step()
        assert all(request.new_tokens >= step for request in requests)


@pytest.mark.parametrize(("others", "guesses"), [(0, True), (1, True), (2, False)])
def test_guesses_end_where_more_requests_fill_the_step(open_engine, others, guesses):
    engine = open_engine(num_requests=3)
    request = engine.add([1, 2, 1], GenerationOptions(max_new_tokens=20, lookup_tokens=3), stop_ids=frozenset())
    prophet: Any = Prophet([0] * 20, 3, wrong=False)
    request.lookup = prophet
    for token in range(others):
        engine.add([token], GenerationOptions(max_new_tokens=20, lookup_tokens=0), stop_ids=frozenset())
    engine.step()
    assert any(part.guess for part in engine._scheduler.plan().parts) is guesses


@pytest.mark.parametrize("context", [1, 63, 64])
def test_no_guess_is_written_past_the_context(open_engine, context):
    """Guesses that go on behind the end are cut: the last token of a request has no place in the cache."""
    engine = open_engine()
    engine = Engine(engine.network, cache_dtype="float32", context=context)
    new_tokens = min(8, context)
    ids = [7] * (context + 1 - new_tokens)
    options = GenerationOptions(max_new_tokens=new_tokens, lookup_tokens=0)
    expected = [token.id for token in engine.generate(ids, options, stop_ids=frozenset())]
    request = engine.add(ids, options, stop_ids=frozenset())
    prophet: Any = Prophet(expected, len(ids), wrong=False)
    request.lookup = prophet
    while request.finished is None:
        engine.step()
        assert request.cached <= context
    assert [token.id for token in request.tokens] == expected


# Any sequence of calls


@native
@pytest.mark.parametrize("examples", [pytest.param(20, id="few"), pytest.param(600, id="many", marks=pytest.mark.slow)])
def test_requests_write_what_each_writes_alone(checkpoint, tmp_path, examples):
    kernels, opened = load_kernels("native", 1), Checkpoint.open(checkpoint)
    small = Checkpoint.open(save_tiny(tmp_path, n_layer=1, n_positions=100))  # texts can be longer
    networks, drafts = (
        {n: Network(kernels, one.architecture, one.tensors, max_tokens=n) for n in STEP_TOKENS}
        for one in (opened, small)
    )
    whole = Network(kernels, opened.architecture, opened.tensors)
    alone = {dtype: Alone(whole, dtype) for dtype in DTYPES}
    run_state_machine_as_test(
        lambda: Callers(networks, drafts, alone),  # type: ignore[arg-type]  # any callable that makes a machine
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            derandomize=True,
            phases=[Phase.generate],  # failures replay from the printed seeds, and to shrink them takes minutes
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Requests that share what they begin with


WITHOUT_GUESSES = GenerationOptions(max_new_tokens=9, lookup_tokens=0)


def ids_of(tokens):
    return [token.id for token in tokens]


def finish(engine, *requests):
    """Step until all have ended; returns the number of tokens that were computed."""
    read, forward = 0, engine.network.forward

    def counting(ids, *arguments):
        nonlocal read
        read += len(ids)
        return forward(ids, *arguments)

    engine.network.forward = counting
    try:
        while any(request.finished is None for request in requests):
            engine.step()
    finally:
        del engine.network.forward
    return read


def test_requests_of_one_prompt_compute_it_once(open_engine):
    engine = open_engine(num_requests=4)
    prompt = list(range(40))
    options = [GenerationOptions(max_new_tokens=3, temperature=1.0, seed=seed, lookup_tokens=0) for seed in range(4)]
    requests = [engine.add(prompt, each, stop_ids=frozenset()) for each in options]
    assert finish(engine, *requests) == 40 + 3 * 1 + 4 * 2
    assert [request.reused_tokens for request in requests] == [0, 39, 39, 39]
    for request, each in zip(requests, options, strict=True):
        alone = open_engine()
        assert ids_of(alone.generate(prompt, each, stop_ids=frozenset())) == ids_of(request.tokens)


def test_requests_wait_only_for_what_they_share(open_engine):
    engine = open_engine(num_requests=3)
    first = engine.add(range(50), SHORT, stop_ids=frozenset())
    second = engine.add([*range(30), 99], SHORT, stop_ids=frozenset())
    engine.step()  # reads 16 tokens of the first
    third = engine.add([*range(20), 98], SHORT, stop_ids=frozenset())
    assert (second.cached, third.cached) == (0, 16)
    finish(engine, first, second, third)
    assert (second.reused_tokens, third.reused_tokens) == (30, 20)


def test_who_waits_goes_on_when_the_other_leaves(open_engine):
    engine = open_engine(num_requests=3)
    first, second, third = (
        engine.add([*range(40), token], WITHOUT_GUESSES, stop_ids=frozenset()) for token in (1, 2, 3)
    )
    engine.step()
    engine.remove(first)
    assert finish(engine, second, third) == 41 - 16 + 1 + 2 * 8
    assert (second.reused_tokens, third.reused_tokens) == (16, 40)


def test_a_score_computes_what_it_scores_and_no_more(open_engine):
    engine = open_engine(num_requests=3)
    question = list(range(30))
    answers = [[5, 6, 7], [8, 9], [5, 6, 10]]
    requests = [engine.add_score([*question, *answer], 30) for answer in answers]
    # Of each text after the first: the last token of the question, and the answer without its last token.
    assert finish(engine, *requests) == 32 + 2 + 3
    for request, answer in zip(requests, answers, strict=True):
        assert [token.id for token in request.scores] == answer
        whole = open_engine().score([*question, *answer])
        assert np.allclose([token.logprob for token in request.scores], whole[29:], atol=1e-5)
        assert np.allclose(engine.score([*question, *answer], 31), whole[30:], atol=1e-5)  # torch adds in another order


@pytest.mark.parametrize("score_from", [0, -1, 3, 9])
def test_scores_from_tokens_that_are_not_there(open_engine, score_from):
    with pytest.raises(ValueError, match=f"Scores from token {score_from} on are not possible"):
        open_engine().add_score([1, 2, 3], score_from)


# The memory of the cache


def test_short_requests_do_not_pay_for_long_ones(checkpoint):
    opened = Checkpoint.open(checkpoint)
    network = Network(load_kernels("torch", 1), opened.architecture, opened.tensors, max_tokens=64)
    engine = Engine(network, cache_dtype="float32", context=640, num_requests=20, cache_tokens=640)
    short = [engine.add([token, 7], SHORT, stop_ids=frozenset()) for token in range(10)]  # one page each
    with pytest.raises(EngineFull, match=r"needs places for 10 tokens in the cache, 64 more than"):
        engine.add([11, 7], SHORT)
    assert engine.has_room
    engine.remove(short[0])
    added = engine.add([11, 7], SHORT, stop_ids=frozenset())
    finish(engine, added, *short[1:])
    long = engine.add([5] * 632, SHORT, stop_ids=frozenset())  # drops what the others left
    finish(engine, long)
    assert long.new_tokens == 9


def test_more_requests_than_memory_wait_in_a_batch(checkpoint):
    opened = Checkpoint.open(checkpoint)
    network = Network(load_kernels("torch", 1), opened.architecture, opened.tensors, max_tokens=64)
    engine = Engine(network, cache_dtype="float32", context=100, num_requests=8, cache_tokens=130)
    prompts = [[token] * 60 for token in range(5)]
    options = GenerationOptions(max_new_tokens=20)
    streams: list[list[Any]] = [[] for _ in prompts]
    for index, token in engine.generate_batch(prompts, options, stop_ids=frozenset()):
        streams[index].append(token)
    alone = Engine(network, cache_dtype="float32", context=100)
    expected = [ids_of(alone.generate(prompt, options, stop_ids=frozenset())) for prompt in prompts]
    assert [ids_of(stream) for stream in streams] == expected


def test_a_cache_smaller_than_a_request(open_engine):
    with pytest.raises(ValueError, match="A cache of 63 tokens is too small for one request of 64"):
        open_engine(cache_tokens=63)


# What callers can ask for


def test_alternatives(open_engine):
    engine = open_engine()
    options = GenerationOptions(max_new_tokens=4)
    request = engine.add(range(9), options, stop_ids=frozenset(), score_from=1, num_alternatives=3)
    finish(engine, request)
    assert [token.id for token in request.scores] == list(range(1, 9))
    for token in request.tokens:
        assert token.best
        assert token.alternatives[0] == token[:2]
    for token in [*request.scores, *request.tokens]:
        assert len(token.alternatives) == 3
        assert sorted(token.alternatives, key=lambda pair: -pair[1]) == list(token.alternatives)
        assert token.best == (token.logprob == token.alternatives[0][1])


def test_a_mask_decides_what_may_come_next(open_engine):
    engine = open_engine(num_requests=2)
    seen: list[Any] = []

    def only(written):
        seen.append(list(written))
        allowed = np.zeros(257, bool)
        allowed[100 + len(written)] = True
        return None if len(written) == 2 else allowed

    free = engine.add([1, 2, 3], SHORT, stop_ids=frozenset())
    bound = engine.add([1, 2, 3], GenerationOptions(max_new_tokens=4), stop_ids=frozenset(), mask=only)
    finish(engine, free, bound)
    ids = [token.id for token in bound.tokens]
    assert (ids[0], ids[1], ids[3]) == (100, 101, 103)
    assert seen == [ids[:i] for i in range(4)]
    assert ids_of(free.tokens) == ids_of(open_engine().generate([1, 2, 3], SHORT, stop_ids=frozenset()))
    assert not bound.tokens[0].best  # what the model says does not depend on the mask


def test_a_mask_that_forbids_everything_ends_only_its_request(open_engine):
    engine = open_engine(num_requests=2)
    free = engine.add([1, 2, 3], SHORT, stop_ids=frozenset())
    bound = engine.add([4, 5], SHORT, stop_ids=frozenset(), mask=lambda written: np.full(257, len(written) < 2))
    finish(engine, free, bound)
    assert (bound.finished, bound.new_tokens) == ("error", 2)
    assert isinstance(bound.error, NothingAllowed)
    assert ids_of(free.tokens) == ids_of(open_engine().generate([1, 2, 3], SHORT, stop_ids=frozenset()))


def test_a_cancelled_request_ends_its_readers_and_disturbs_no_other(open_engine):
    engine = open_engine(num_requests=3)
    free = engine.add([1, 2, 3], SHORT, stop_ids=frozenset())
    read, scored = engine.add([4, 5], SHORT, stop_ids=frozenset()), engine.add_score([6, 7, 8])
    engine.remove(scored)
    tokens = engine.follow(read)
    first = next(tokens)
    engine.remove(read)
    with pytest.raises(RequestCancelled, match=r"^The request was cancelled after 1 token\.$"):
        next(tokens)
    assert (read.finished, read.tokens[0]) == ("error", first)
    assert isinstance(scored.error, RequestCancelled)
    finish(engine, free)
    engine.remove(free)  # it has ended
    assert free.error is None
    assert ids_of(engine.follow(free)) == ids_of(open_engine().generate([1, 2, 3], SHORT, stop_ids=frozenset()))


def test_times_of_a_request(open_engine, monkeypatch):
    clock = iter(range(10, 1000, 10))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    engine = open_engine()
    request = engine.add(range(20), GenerationOptions(max_new_tokens=3), stop_ids=frozenset())
    assert (request.started, request.written, request.tokens_per_s) == (None, None, None)
    finish(engine, request)
    # Three readings of the clock per step: begin and end of the forward pass, and the time of what it writes.
    assert request.started is not None
    assert request.written is not None
    assert request.added < request.started < request.written[0] < request.written[1]
    assert request.tokens_per_s == pytest.approx(2 / (request.written[1] - request.written[0]))


def test_prompts_that_are_nearly_read_take_no_place_of_those_that_write(open_engine):
    engine = open_engine(num_requests=5)
    scheduler = Scheduler(engine.cache, 2, 5)
    waiting = [Request([token], SHORT, frozenset(), 9) for token in range(3)]
    writing = [Request([token, token], SHORT, frozenset(), 9) for token in range(10, 12)]
    for request in (*waiting, *writing):
        scheduler.add(request)
    for request in writing:
        request.tokens.append(Token(1, 0.0))
        request.cached = 1
    assert [part.request for part in scheduler.plan().parts] == writing


def test_a_long_prompt_is_read_in_pieces_that_let_others_write(open_engine):
    engine = open_engine(num_requests=2)
    stream = engine.add([1, 2], GenerationOptions(max_new_tokens=30, lookup_tokens=0), stop_ids=frozenset())
    engine.step()
    pace: Any = FixedPace(3)
    engine._scheduler.pace = pace
    long = engine.add(range(100, 130), SHORT, stop_ids=frozenset())
    for step in range(1, 5):
        engine.step()
        assert (long.cached, stream.new_tokens) == (3 * step, 1 + step)
    engine.remove(stream)
    engine.step()
    assert long.cached == 12 + 16  # nobody waits any more
