"""Structured output: what comes is what was asked for, however unlikely the model finds it."""

import json
import re

import httpx
import numpy as np
import pytest

from btlm.checkpoint import BUNDLED_MODEL, Checkpoint
from btlm.serve.schema import CompletionRequest
from btlm.serve.structured import GrammarMask, Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def complete(server, **given):
    return httpx.post(f"{server.url}/v1/completions", json={"prompt": "An animal:", **given}, timeout=60)


@pytest.mark.parametrize("rules", [{"temperature": 0}, *({"seed": seed, "temperature": 1.5} for seed in range(5))])
def test_a_text_follows_a_schema(server, rules):
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    (choice,) = complete(server, response_format=form, max_tokens=100, **rules).json()["choices"]
    assert choice["finish_reason"] == "stop"
    value = json.loads(choice["text"])
    assert sorted(value) == ["age", "kind", "name"]
    assert len(value["name"]) <= 12
    assert 0 <= value["age"] <= 150
    assert value["kind"] in ("cat", "dog")


def test_a_json_object_is_one(server):
    form = {"type": "json_object"}
    choices = complete(server, response_format=form, max_tokens=120, n=6, seed=1).json()["choices"]
    ended = [choice["text"] for choice in choices if choice["finish_reason"] == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)
    assert all(choice["text"].startswith("{") for choice in choices)


def test_a_text_matches_an_expression(server):
    pattern = r"[A-Z][a-z]{2,5}, (19|20)\d\d"
    choices = complete(server, guided_regex=pattern, n=4, max_tokens=30, seed=2).json()["choices"]
    assert all(re.fullmatch(pattern, choice["text"]) for choice in choices)


def test_a_text_is_one_of_the_choices(server):
    names = ["a+b (c)", "a|b", "Grüße 🙂"]
    choices = complete(server, guided_choice=names, n=12, max_tokens=30, seed=2, temperature=2).json()["choices"]
    assert {choice["text"] for choice in choices} <= set(names)
    assert len({choice["text"] for choice in choices}) > 1


def test_a_schema_that_allows_only_one_text_gives_it_in_streams_too(server):
    form = {"type": "json_schema", "json_schema": {"schema": {"const": {"a": [1, "x"]}}}}
    stream = server.client.completions.create(
        model="btlm-tiny", prompt="a", max_tokens=30, stream=True, extra_body={"response_format": form}
    )
    assert json.loads("".join(chunk.choices[0].text for chunk in stream)) == {"a": [1, "x"]}


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {
                "type": "object", "properties": {"a": {"type": "array", "items": {"type": "objekt"}}}}}}},
            "response_format.json_schema.schema",
            "at /properties/a/items, Invalid type: objekt.",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/x"}}}},
            "response_format.json_schema.schema",
            "at its root, Pointer '/$defs/x' does not exist.",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "add json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format", '"xml"'),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "exclude each other"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_compiled_is_told(server, given, param, words):
    answer = complete(server, **given)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]
    assert "\n" not in error["message"]


def test_a_mask_follows_guesses_back():
    """A mask is asked about guesses that may be wrong: what it says depends only on the tokens that it is given."""
    checkpoint = Checkpoint.open(BUNDLED_MODEL)
    grammars = Grammars(checkpoint.tokenizer, 50257, [50256])
    make = grammars.mask(CompletionRequest(guided_regex=r"(ab|ac)*d"))
    texts = [[], [397], [397, 330], [397, 330, 67], [397, 330, 67, 50256], [397, 397], [], [330, 67]]
    one = make()
    assert isinstance(one, GrammarMask)
    for text in texts:
        np.testing.assert_array_equal(one(text), make()(text))
    assert np.flatnonzero(one([397, 67])).tolist() == [50256]
    assert not one([397, 67])[397]


def test_a_form_that_costs_too_much_ends_only_its_own_text(server):
    answer = complete(server, guided_regex="(a{1000}){1000}", max_tokens=3)
    assert answer.status_code == 400
    assert "too complex" in answer.json()["error"]["message"]
    assert complete(server, guided_regex="[ab]", max_tokens=3).status_code == 200
