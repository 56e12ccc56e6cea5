"""Who may ask, from where, how much, and how many at a time."""

import base64
import hashlib
import json
import re
import socket
import threading

import httpx
import openai
import pytest

from btlm.errors import OptionError
from btlm.serve.guard import read_keys
from btlm.serve.options import Serve
from tests.serve.conftest import running, wait

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def locked(checkpoint):
    with running(checkpoint, KEYS, max_requests=1, max_waiting=2, max_per_key=2, max_body=2000) as one:
        yield one


def post(server, body, key=None, **headers):
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_opens(locked, key):
    assert post(locked, {"prompt": "a", "max_tokens": 2}, key).status_code == 200


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer wrong", "Basic first-key", "Bearer first-key2"])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/models", "/metrics", "/tokenize", "/openapi.json", "/x", "//v1/models", "/health/"]
)
def test_without_a_key_nothing_is_told(locked, authorization, path):
    headers = {} if authorization is None else {"Authorization": authorization}
    for method in ("GET", "POST", "OPTIONS"):
        answer = httpx.request(method, f"{locked.url}{path}", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_probes_and_the_page_need_no_key(locked, path):
    assert httpx.get(f"{locked.url}{path}").status_code == 200


def test_the_official_client_knows_the_error(locked):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_body_that_is_too_large_is_refused(locked):
    answer = post(locked, {"prompt": "a" * 3000}, KEYS[0])
    assert answer.status_code == 413
    assert "2,000 bytes" in answer.json()["error"]["message"]

    def parts():
        for _ in range(50):
            yield b" " * 100

    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    assert httpx.post(f"{locked.url}/v1/completions", content=parts(), headers=headers).status_code == 413


def test_only_json_is_taken(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert answer.status_code == 415
        assert "send application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", ""])
def test_a_name_that_was_made_to_lead_here_is_refused(server, host):
    answer = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
    assert answer.status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:1234", "127.0.0.1:80", "[::1]:80", "[::1]"])
def test_names_of_this_machine_are_not(server, host):
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200


def test_other_origins_are_refused_by_the_browser_unless_given(server, checkpoint):
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{server.url}/v1/completions", headers=headers).headers
    with running(checkpoint, cors_origins=("https://example.org",)) as open_one:
        answer = httpx.options(f"{open_one.url}/v1/completions", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"


def hold(server, key, stop):
    """A request that is under way until it is stopped."""
    body = {"prompt": "a" * 20, "max_tokens": 40, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60):
        stop.wait(60)


def test_too_many_at_once_are_refused(checkpoint, monkeypatch):
    with running(checkpoint, KEYS, max_requests=1, max_waiting=2, max_per_key=2) as one:
        gate, step = threading.Event(), one.engine.step
        monkeypatch.setattr(one.engine, "step", lambda: (gate.wait(60), step())[1])
        stop = threading.Event()
        threads = [threading.Thread(target=hold, args=(one, key, stop)) for key in (KEYS[0], KEYS[0], KEYS[1])]
        for thread in threads:
            thread.start()
        wait(lambda: one.service.worker.num_running + one.service.worker.num_waiting == 3)
        answer = post(one, {"prompt": "a"}, KEYS[0])
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "2 requests under way, which is its limit" in answer.json()["error"]["message"]
        answer = post(one, {"prompt": "a"}, KEYS[1])
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "2 of at most 2 are waiting" in answer.json()["error"]["message"]
        gate.set()
        stop.set()
        for thread in threads:
            thread.join()
        wait(lambda: one.service.worker.num_running + one.service.worker.num_waiting == 0)
        assert post(one, {"prompt": "a"}, KEYS[0]).status_code == 200
        text = httpx.get(f"{one.url}/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"}).text
        assert 'btlm_refusals_total{reason="key"} 1.0' in text
        assert 'btlm_refusals_total{reason="queue"} 1.0' in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"\\ud800": 1}',
        b'{"stop": "\\ud800"}',
        b'{"logit_bias": {"\\ud800": 1}}',
        b'{"response_format": {"type": "json_schema", "json_schema": {"schema": {"\\ud800": 1e999}}}}',
        b"[" * 100_000,
    ],
)
def test_damaged_bodies_are_told(server, content):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_never_arrives_is_given_up(checkpoint, monkeypatch):
    monkeypatch.setattr("btlm.serve.guard._BODY_S", 0.2)
    with running(checkpoint) as one, socket.create_connection(("127.0.0.1", int(one.url.rpartition(":")[2]))) as line:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        assert b" 408 " in line.recv(1000)


def test_the_log_has_no_texts_unless_asked(checkpoint, caplog):
    for log_prompts in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", "btlm.serve.access"), running(checkpoint, log_prompts=log_prompts) as one:
            post(one, {"prompt": "a secret", "max_tokens": 3, "ignore_eos": True})
        lines = [json.loads(record.message) for record in caplog.records if record.name == "btlm.serve.access"]
        (line,) = (line for line in lines if line["path"] == "/v1/completions")
        assert (line["status"], line["prompt_tokens"], line["completion_tokens"]) == (200, 8, 3)
        assert line["first_token_s"] >= line["queued_s"] >= 0
        assert ("a secret" in json.dumps(lines)) is log_prompts


def test_an_address_that_others_reach_needs_a_key_or_insistence():
    with pytest.raises(OptionError, match="can be reached by others"):
        Serve(host="0.0.0.0")
    with pytest.raises(OptionError, match="can be reached by others"):
        Serve(host="example.org")
    for given in ({"host": "::1"}, {"host": "localhost"}, {"host": "0.0.0.0", "public": True}):
        Serve(**given)
    Serve(host="0.0.0.0", api_key=("a",))


def test_keys_are_read(tmp_path):
    path = tmp_path / "keys.txt"
    with pytest.raises(OptionError, match="cannot be read"):
        read_keys(Serve(api_key_file=str(path)))
    path.write_text("\n\n")
    with pytest.raises(OptionError, match="has no key"):
        read_keys(Serve(api_key_file=str(path)))
    path.write_text("one\n two \n")
    assert read_keys(Serve(api_key_file=str(path), api_key=("zero",))) == ("zero", "one", "two")
    with pytest.raises(OptionError, match="letters and digits"):
        read_keys(Serve(api_key=("a b",)))


def test_the_page_may_run_only_its_own_script(server):
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_requests_whose_bodies_arrive_late_count_too(locked):
    """The last byte of each is held back, so that all have passed the check before one is answered."""
    content = b'{"prompt": "a", "max_tokens": 1}'
    head = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEYS[0]}", "Connection: close"]
    head += ["Content-Type: application/json", f"Content-Length: {len(content)}", "", ""]
    lines = [socket.create_connection(("127.0.0.1", int(locked.url.rpartition(":")[2]))) for _ in range(5)]
    for line in lines:
        line.sendall("\r\n".join(head).encode() + content[:-1])
    first = [line.recv(12) for line in lines[2:]]
    assert first == [b"HTTP/1.1 429"] * 3
    for line in lines[:2]:
        line.sendall(content[-1:])
        assert line.recv(12) == b"HTTP/1.1 200"
    for line in lines:
        line.close()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [{}] * 200_000},
        {"prompt": [[]] * 200_000},
        {"prompt": [""] * 200_000},
        {"prompt": [[1]] * 200_000},
        {"prompt": [[1, {}]] * 1000},
        {"prompt": "a", "stop": [{}] * 200_000},
        {"prompt": "a", "guided_choice": ["a"] * 200_000},
        {"prompt": "a", "logit_bias": {str(token): 0.1 for token in range(50_000)}},
    ],
)
def test_a_long_list_is_refused_before_it_is_read_to_its_end(server, body):
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert len(answer.content) < 1000


def test_the_log_has_no_control_characters(server, caplog):
    with caplog.at_level("INFO", "btlm.serve.access"):
        httpx.get(f"{server.url}/%c2%9b31m%e2%80%ae")
        wait(lambda: any(one.name == "btlm.serve.access" for one in caplog.records))  # which follows the answer
    lines = [one.message for one in caplog.records if one.name == "btlm.serve.access"]
    assert all(line.isascii() and line.isprintable() for line in lines)
