"""`/v1/chat/completions` by the official client."""

from typing import Any

import httpx
import pytest

from btlm.serve.chat import STOP, WARNING, conversation
from btlm.serve.schema import Message

MESSAGES: list[Any] = [
    {"role": "system", "content": "A talk about science."},
    {"role": "user", "content": "Who was Einstein?"},
    {"role": "assistant", "content": "A physicist."},
    {"role": "user", "content": [{"type": "text", "text": "Born "}, {"type": "text", "text": "when?"}]},
]
TEXT = "A talk about science.\n\nUser: Who was Einstein?\n\nAssistant: A physicist.\n\nUser: Born when?\n\nAssistant:"


def test_a_conversation_is_a_text():
    assert conversation([Message(**message) for message in MESSAGES]) == TEXT


@pytest.mark.parametrize("rules", [{"temperature": 0}, {"seed": 4}])
def test_the_answer_continues_the_text(client, rules):
    answer = client.chat.completions.create(
        model="btlm-tiny", messages=MESSAGES, max_tokens=20, logprobs=True, top_logprobs=2, **rules
    )
    plain = client.completions.create(model="btlm-tiny", prompt=TEXT, max_tokens=20, stop=STOP, logprobs=2, **rules)
    (choice,) = answer.choices
    assert choice.message.content == plain.choices[0].text
    assert choice.finish_reason == plain.choices[0].finish_reason
    assert answer.usage.total_tokens == plain.usage.total_tokens
    assert answer.model_extra["warning"] == WARNING
    content = choice.logprobs.content
    assert [one.logprob for one in content] == plain.choices[0].logprobs.token_logprobs
    assert b"".join(bytes(one.bytes) for one in content).decode() == choice.message.content
    assert all(len(one.top_logprobs) == 2 for one in content)
    stream = list(
        client.chat.completions.create(
            model="btlm-tiny", messages=MESSAGES, max_tokens=20, stream=True, logprobs=True, top_logprobs=2, **rules
        )
    )
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == choice.message.content
    assert [one for chunk in stream for one in chunk.choices[0].logprobs.content] == content


def test_without_a_limit_the_answer_may_fill_the_context(server):
    bias = {"50256": -100, "12982": -100}  # neither the end of the text, nor the stop text's "User"
    answer = server.client.chat.completions.create(
        model="btlm-tiny", messages=[{"role": "user", "content": "Hi"}], temperature=0, logit_bias=bias
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == server.engine.context + 1  # the last token is not read again


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type"),
        ({"top_logprobs": 3}, "top_logprobs need logprobs"),
        ({"tools": [{"type": "function"}]}, "not supported"),
        ({"tool_choice": "required"}, "tool_choice is \"required\": input should be 'none' or 'auto'."),
        ({"prediction": {}}, "prediction is not known here; leave it out."),
        ({"top_logprob": 2}, "leave it out: did you mean top_logprobs?"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, "exceed the context"),
    ],
)
def test_what_cannot_be_used_is_told(server, given, words):
    body = {"messages": [{"role": "user", "content": "a"}], **given}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert not message.endswith("?.")
