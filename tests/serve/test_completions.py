"""`/v1/completions` by the official client, against the engine without a server."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from btlm.checkpoint import BUNDLED_MODEL, Checkpoint
from btlm.engine import Engine, GenerationOptions
from btlm.generate import TextGenerator

PROMPT = "Albert Einstein was known for"
RULES = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"temperature": 1.3, "top_k": 20, "seed": 4, "repetition_penalty": 1.2},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0, "logit_bias": {262: -100.0, 257: 2.0}},
]


@pytest.fixture(scope="module")
def offline():
    checkpoint = Checkpoint.open(BUNDLED_MODEL)
    return TextGenerator(Engine.open(checkpoint, context=256, threads=1), checkpoint.tokenizer)


def as_sent(rules):
    """The rules as the client takes them: what OpenAI does not know goes to the body, and ids are text."""
    sent = dict(rules)
    extra = {name: sent.pop(name) for name in ("top_k", "repetition_penalty") if name in sent}
    if "logit_bias" in sent:
        sent["logit_bias"] = {str(token): bias for token, bias in sent["logit_bias"].items()}
    return {**sent, "extra_body": extra}


def complete(client, prompt=PROMPT, **given):
    return client.completions.create(model="btlm-tiny", prompt=prompt, **given)


@pytest.mark.parametrize("rules", RULES)
def test_texts_are_those_of_the_engine(client, offline, rules):
    expected = offline.generate(PROMPT, GenerationOptions(max_new_tokens=24, **rules))
    answer = complete(client, max_tokens=24, **as_sent(rules))
    assert answer.choices[0].text == expected
    assert answer.usage.completion_tokens == 24
    stream = list(complete(client, max_tokens=24, stream=True, **as_sent(rules)))
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in stream[:-1])


def test_a_seed_gives_the_same_text_whatever_else_is_written(client):
    def write(seed):
        return complete(client, max_tokens=20, seed=seed, temperature=1.0).choices[0].text

    alone = [write(seed) for seed in range(6)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(write, [*range(6)] * 3))
    assert together == alone * 3
    assert len(set(alone)) == 6


def test_the_choices_of_a_seed_are_those_of_the_seeds_that_follow(client):
    answer = complete(client, ["The", PROMPT], n=3, seed=5, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [*range(6)]
    single = [
        complete(client, prompt, seed=5 + i, max_tokens=6).choices[0].text
        for prompt in ("The", PROMPT)
        for i in range(3)
    ]
    assert [choice.text for choice in answer.choices] == single
    assert answer.usage.prompt_tokens == 1 + 5
    assert answer.usage.completion_tokens == 6 * 6


def test_the_best_of_several_has_the_highest_mean_log_probability(client):
    given = {"seed": 1, "max_tokens": 5, "logprobs": 0, "temperature": 1.5}
    all_of_them = complete(client, n=6, **given).choices
    ordered = sorted(all_of_them, key=lambda choice: -np.mean(choice.logprobs.token_logprobs))
    best = complete(client, n=2, best_of=6, **given)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ordered[:2]]
    assert best.usage.completion_tokens == 30


def test_log_probabilities_of_the_prompt_are_those_of_the_engine(client, offline):
    text = "The capital of France is Paris. Grüße, 世界 🙂"
    ids = offline.tokenizer.encode(text).ids
    expected = offline.engine.score(ids)
    for prompt in (text, ids):
        answer = complete(client, prompt, max_tokens=0, echo=True, logprobs=2)
        (choice,) = answer.choices
        found = choice.logprobs
        assert choice.text == text
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        np.testing.assert_array_equal(found.token_logprobs[1:], expected.tolist())
        assert choice.finish_reason == "length"
        assert answer.usage.completion_tokens == 0
        assert answer.usage.prompt_tokens == len(ids)
        for token, score, best in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
            assert best[token] == score
            assert len(best) in (2, 3)


def test_places_are_those_of_the_tokens(client):
    answer = complete(client, "Grüße, 世界 🙂 and", max_tokens=12, echo=True, logprobs=1, seed=2)
    choice = answer.choices[0]
    tokens, places = choice.logprobs.tokens, choice.logprobs.text_offset
    assert len(tokens) == answer.usage.total_tokens
    for token, start in zip(tokens, places, strict=True):
        if not token.startswith("bytes:") and token != "<|endoftext|>":
            assert choice.text[start : start + len(token)] == token
    assert any(token.startswith("bytes:\\x") for token in tokens)  # of the characters that take several tokens


def test_echo_with_new_tokens_has_both(client):
    plain = complete(client, max_tokens=5, temperature=0, logprobs=1).choices[0]
    scored = complete(client, max_tokens=0, echo=True, logprobs=1).choices[0]
    both = complete(client, max_tokens=5, temperature=0, echo=True, logprobs=1).choices[0]
    assert both.text == PROMPT + plain.text
    assert both.logprobs.token_logprobs == [*scored.logprobs.token_logprobs, *plain.logprobs.token_logprobs]
    assert both.logprobs.text_offset[-5:] == [place + len(PROMPT) for place in plain.logprobs.text_offset]
    quiet = complete(client, max_tokens=0, echo=True)
    assert (quiet.choices[0].text, quiet.choices[0].logprobs) == (PROMPT, None)
    stream = list(complete(client, max_tokens=5, temperature=0, echo=True, logprobs=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in stream) == both.text
    scores = [score for chunk in stream for score in chunk.choices[0].logprobs.token_logprobs]
    assert scores == both.logprobs.token_logprobs


def test_a_stop_text_may_cross_tokens(client):
    whole = complete(client, max_tokens=30, temperature=0).choices[0].text
    for length in (1, 3, 9):
        stop = whole[25 : 25 + length]
        end = whole.index(stop)
        answer = complete(client, max_tokens=30, temperature=0, stop=["never there", stop], logprobs=0)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (whole[:end], "stop")
        assert "".join(choice.logprobs.tokens).startswith(whole[:end])
        stream = list(complete(client, max_tokens=30, temperature=0, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in stream) == whole[:end]
        assert stream[-1].choices[0].finish_reason == "stop"
        # Counted are the tokens up to the one that completes the stop text.
        assert answer.usage.completion_tokens < 30


def test_streams_tell_their_usage(client):
    stream = list(complete(client, max_tokens=7, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert [len(chunk.choices) for chunk in stream[-2:]] == [1, 0]
    assert stream[-1].usage.completion_tokens == 7
    assert stream[-1].usage.total_tokens == 12
    assert all(chunk.usage is None for chunk in stream[:-1])


def test_streams_of_several_texts_are_told_apart(client):
    whole = [choice.text for choice in complete(client, ["One", "Two"], n=2, seed=9, max_tokens=8).choices]
    texts = [""] * 4
    for chunk in complete(client, ["One", "Two"], n=2, seed=9, max_tokens=8, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == whole


def test_token_ids_are_told_and_taken(client, offline):
    extra = {"return_token_ids": True}
    answer = complete(client, max_tokens=8, temperature=0, extra_body=extra).choices[0]
    ids = answer.model_extra["prompt_token_ids"]
    assert ids == offline.tokenizer.encode(PROMPT).ids
    going_on = [*ids, *answer.model_extra["token_ids"][:4]]
    again = complete(client, going_on, max_tokens=4, temperature=0, extra_body=extra).choices[0]
    assert again.model_extra["token_ids"] == answer.model_extra["token_ids"][4:]


def test_an_empty_prompt_is_the_beginning_of_a_text(client, offline):
    (end,) = offline.engine.end_ids
    expected = [token.id for token in offline.engine.generate([end], GenerationOptions(max_new_tokens=5))]
    for prompt in ("", [end]):
        answer = complete(client, prompt, max_tokens=5, temperature=0, extra_body={"return_token_ids": True})
        assert answer.choices[0].model_extra["token_ids"] == expected


def test_the_end_of_a_text_ends_it_unless_it_is_ignored(client):
    bias = {"50256": 100}
    answer = complete(client, max_tokens=5, temperature=0, logit_bias=bias, logprobs=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.choices[0].logprobs.tokens == ["<|endoftext|>"]
    assert answer.usage.completion_tokens == 1
    answer = complete(client, max_tokens=5, temperature=0, logit_bias=bias, extra_body={"ignore_eos": True})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"prompt": 5}, "prompt", "none of the types"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [1, "a"]}, "prompt", "valid"),
        ({"prompt": [50257]}, "prompt", "Token 50257 is not in the vocabulary of 50,257."),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": "a " * 300}, "prompt", "exceed the context of 256 tokens"),
        ({"prompt": "a" * 10**6}, "prompt", "exceeds the context of 256 tokens"),
        ({"max_tokens": 256}, "prompt", "exceed the context of 256 tokens"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": 2.5}, "max_tokens", "2.5"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", '"hot"'),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "0.001"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 3, "best_of": 2}, "best_of", "best_of 2 is less than n 3"),
        ({"best_of": 2, "stream": True}, "best_of", "known only at the end"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "pattern"),
        ({"logit_bias": {"\U00010d40": 1}}, "logit_bias", "pattern"),
        ({"logit_bias": {"50257": 1}}, "logit_bias", "Token 50257 of logit_bias"),
        ({"logit_bias": {"7": 101}}, "logit_bias", "101"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"suffix": "the end"}, "suffix", "not supported"),
        ({"min_p": 0.1}, "min_p", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only matter to streams"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"n": 128, "prompt": ["a", "b", "c"]}, "prompt", "asks for 384 texts, and at most 260"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(server, given, param, words):
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, **given})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert "\n" not in error["message"]


def test_the_client_raises_the_errors_that_it_knows(client):
    with pytest.raises(openai.BadRequestError, match="exceed the context") as caught:
        complete(client, max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this server has 'btlm-tiny'"):
        client.completions.create(model="gpt-5", prompt="a")


def test_what_clients_send_without_meaning_anything_is_taken(server):
    given = {"user": "me", "metadata": {"a": 1}, "service_tier": "auto", "min_p": 0, "prediction": None, "stop": None}
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 1, **given})
    assert answer.status_code == 200


def test_events_are_lines_however_a_client_ends_them(server):
    """U+2028 and U+0085 end lines for some clients."""
    prompt = "a\u2028b\x85c\u2029"
    body = {"prompt": prompt, "echo": True, "max_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith(prompt)


def test_more_log_probabilities_than_an_answer_can_tell_are_refused(server):
    body = {"prompt": [[5] * 250] * 2, "n": 128, "echo": True, "logprobs": 20, "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "at most 1,000,000 are told" in answer.json()["error"]["message"]
