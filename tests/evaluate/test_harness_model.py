"""The engine's answers against those of lm-evaluation-harness' own class for Transformers."""

from types import SimpleNamespace

import pytest
import torch

from btlm.checkpoint import BUNDLED_MODEL, load_model
from btlm.errors import NotSupported
from btlm.evaluate.harness_model import EngineLM
from btlm.evaluate.journal import Journal
from tests.checkpoint.tiny import END, save_tiny
from tests.evaluate.quiz import question

CONTEXT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"n_embd": 128, "n_inner": 150, "n_positions": CONTEXT, "initializer_range": 0.1}
    return save_tiny(tmp_path_factory.mktemp("model"), **sizes)


@pytest.fixture(scope="module")
def ours(folder):
    return EngineLM(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=5)


@pytest.fixture(scope="module")
def bundled_model():
    return EngineLM(BUNDLED_MODEL)


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def quiz(number, shots=0):
    examples = "".join(
        f"Question: {one['question']}\nAnswer: {one['choices'][0]}\n\n" for one in map(question, range(shots))
    )
    return [
        (f"{examples}Question: {one['question']}\nAnswer:", f" {choice}")
        for one in map(question, range(50, 50 + number))
        for choice in one["choices"]
    ]


PAIRS = [
    ("The end  ", "of it"),  # spaces at the end belong to the continuation
    ("The end", "  of it"),
    ("Ein Stück ", "漢字"),
    ("", "no context"),
    ("", "<|endoftext|>begins with the prefix"),
    ("One text.<|endoftext|>Another", " one"),
    ("A long one. " * 40, "yes"),
    ("short", "x" * CONTEXT),
    ("a" * (CONTEXT - 1), "bc"),
]


def test_log_likelihoods_are_those_of_the_harness(ours, theirs):
    requests = asked(*PAIRS, *quiz(8), *quiz(4, shots=2))
    answers, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    for (nats, best), (their_nats, their_best) in zip(answers, expected, strict=True):
        assert nats == pytest.approx(their_nats, abs=1e-3)
        assert best == their_best


def test_what_greedy_decoding_writes_is_told(ours, folder):
    model, _ = load_model(folder, dtype="float32")
    ids = torch.tensor([list(b"What comes")])
    ids = torch.tensor([ours.tok_encode("What comes")])
    for _ in range(3):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    context, written = ids[0, :-3].tolist(), ids[0, -3:].tolist()
    right = ours._loglikelihood_tokens([(None, context, written)])[0]
    wrong = ours._loglikelihood_tokens([(None, context, [*written[:2], (written[2] + 1) % END])])[0]
    assert (right[1], wrong[1]) == (True, False)
    assert right[0] > wrong[0]


def test_rolling_log_likelihoods_are_those_of_the_harness(ours, theirs):
    long = " ".join(f"{i * i} is the square of {i}." for i in range(40))
    requests = asked((long,), ("x",), ("",), (long[: CONTEXT + 1],), (long[:CONTEXT],))
    assert ours.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), abs=2e-3)


def test_continuations_are_those_of_the_harness(ours, theirs):
    prompts = ["Hello there", "Once upon a time " * 30, "One", "Two three"]
    texts = ours.generate_until(asked(*((prompt, {"until": [], "max_gen_toks": 24}) for prompt in prompts)))
    # Stops that the texts have: one token, several, the beginning, and one that is not there.
    stops = [texts[0][3:4], texts[1][5:8], texts[2][:2], "never"]
    requests = asked(
        *((prompt, {"until": stops, "max_gen_toks": 24}) for prompt in prompts),
        *(
            (prompt, {"until": stop, "max_gen_toks": 24, "do_sample": False})
            for prompt, stop in zip(prompts, stops, strict=True)
        ),
        ("One", {"until": ["never"], "max_gen_toks": 5, "temperature": 0.0}),
    )
    written = ours.generate_until(requests)
    assert written == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(map(len, written))) > 2


def test_texts_are_cut_where_their_tokens_are_those_of_the_parts(bundled_model):
    tokenizer = bundled_model._tokenizer
    for text in (
        "One.\n\nTwo.\n\n\nThree",
        "\n\nA\n\n  B \n\n",
        " \n\n \n\nx",
        "a\n\n<|endoftext|>\n\nb",
        "é\n\n漢字\n\n'll 12\n\n34",
        "",
    ):
        assert bundled_model.tok_encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert bundled_model._encode.cache_info().currsize > 10


def test_samples_follow_from_the_request_and_its_repetition(folder):
    arguments = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    first, second = (EngineLM(folder).generate_until(asked(*[("One", arguments)] * 3)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


def test_shared_beginnings_are_computed_once_and_nothing_is_asked_twice(folder, monkeypatch):
    model = EngineLM(folder)
    read: list[int] = []
    forward = model.engine.network.forward

    def counting(ids, *more):
        read.append(len(ids))
        return forward(ids, *more)

    monkeypatch.setattr(model.engine.network, "forward", counting)
    pairs = quiz(8, shots=3)
    shared = len(pairs[0][0]) - len(pairs[0][0].rpartition("Question")[2])
    answers = model.loglikelihood(asked(*pairs))
    own = sum(len(context) - shared + len(continuation) for context, continuation in pairs)
    assert sum(read) < shared + own
    assert model.num_asked == len(pairs)
    assert model.loglikelihood(asked(*pairs[::-1])) == answers[::-1]
    assert model.num_asked == len(pairs)


def test_known_answers_are_those_of_the_same_model_and_request(folder, tmp_path):
    other = save_tiny(tmp_path / "other", n_positions=CONTEXT, initializer_range=0.2)
    pairs, more = quiz(2), [("One", {"until": ["a"], "max_gen_toks": 9})]
    journal = Journal(tmp_path / "journal")
    first = EngineLM(folder, journal=journal)
    answers = first.loglikelihood(asked(*pairs)), first.generate_until(asked(*more))
    assert first.num_asked == 7
    again = EngineLM(folder, journal=Journal(tmp_path / "journal"))
    assert (again.loglikelihood(asked(*pairs)), again.generate_until(asked(*more))) == answers
    assert again.num_asked == 0
    again.generate_until(
        asked(("One", {"until": ["b"], "max_gen_toks": 9}), ("One", {"until": ["a"], "max_gen_toks": 8}))
    )
    assert again.num_asked == 2
    different = EngineLM(other, journal=Journal(tmp_path / "journal"))
    assert different.loglikelihood(asked(*pairs)) != answers[0]
    assert different.num_asked == 6


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda model: model.loglikelihood(asked(("a", ""))), ValueError, "A continuation of 0 tokens"),
        (lambda model: model.loglikelihood(asked(("a", "b" * 300))), ValueError, "A continuation of 300 tokens"),
        (lambda model: model.generate_until(asked(("a", {"num_beams": 2}))), NotSupported, "beams"),
        (lambda model: model.generate_until(asked(("a", {"max_gen_toks": 20, "min_p": 0.1}))), ValueError, "min_p"),
        (lambda model: model.generate_until(asked(("a", {"max_gen_toks": 256}))), ValueError, "a longer context"),
    ],
)
def test_what_cannot_be_asked_is_told(ours, ask, error, message):
    with pytest.raises(error, match=message):
        ask(ours)
