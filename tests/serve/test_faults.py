"""Clients that go away, engines that fail, files that change: nothing hangs, and nothing wrong is sent."""

import asyncio
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import running, wait

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def idle(server):
    worker = server.service.worker
    return worker.num_running == worker.num_waiting == 0


@pytest.fixture(scope="module")
def roomy():
    with running(context=8192, max_requests=2) as one:
        yield one
        assert idle(one)


def send(server, body):
    """A connection on which a request was sent, and nothing is read."""
    content = httpx.Request("POST", server.url, json=body).content
    line = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    line.sendall("\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content)
    return line


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(roomy, stream):
    before = roomy.service.metrics.new_tokens._value.get()
    with send(roomy, {**LONG, "stream": stream}):
        wait(lambda: roomy.service.worker.num_running == 1)
    wait(lambda: idle(roomy))
    assert roomy.service.metrics.new_tokens._value.get() - before < LONG["max_tokens"] / 2


def test_a_client_that_hangs_up_while_its_prompt_is_read(roomy):
    before = roomy.service.metrics.new_tokens._value.get()
    with send(roomy, {**LONG, "prompt": [7] * 4000}):
        wait(lambda: roomy.service.worker.num_running == 1)
    wait(lambda: idle(roomy))
    assert roomy.service.metrics.new_tokens._value.get() == before


def test_a_client_that_hangs_up_while_it_waits(roomy):
    lines = [send(roomy, {**LONG, "stream": True}) for _ in range(2)]
    wait(lambda: roomy.service.worker.num_running == 2)
    with send(roomy, LONG):
        wait(lambda: roomy.service.worker.num_waiting == 1)
    wait(lambda: roomy.service.worker.num_waiting == 0)
    assert roomy.service.worker.num_running == 2
    for line in lines:
        line.close()
    wait(lambda: idle(roomy))


def test_many_clients_that_are_killed(roomy):
    for _ in range(20):
        lines = [send(roomy, {**LONG, "stream": True, "prompt": str(i)}) for i in range(10)]
        lines[0].recv(100)
        for line in lines:
            line.close()
    wait(lambda: idle(roomy))
    answer = httpx.post(f"{roomy.url}/v1/completions", json={"prompt": "a", "max_tokens": 3})
    assert answer.status_code == 200


@pytest.mark.slow
def test_a_reader_that_takes_nothing_is_given_up(monkeypatch, checkpoint):
    monkeypatch.setattr("btlm.serve.stream._SLOWEST_S", 0.3)
    with running(context=8192, max_requests=1) as one:
        line = send(one, {**LONG, "stream": True, "logprobs": 20, "n": 3})
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        wait(lambda: one.service.worker.num_running == 1)
        wait(lambda: idle(one))
        line.close()


def test_a_request_that_takes_too_long_ends_with_an_error():
    with running(context=8192, max_requests=1, timeout=0.3) as one:
        answer = httpx.post(f"{one.url}/v1/completions", json=LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match=r"more than 0\.3 seconds"):
            list(one.client.completions.create(model="btlm-tiny", prompt="a", max_tokens=4000, stream=True))
        wait(lambda: idle(one))


@pytest.mark.parametrize("when", ["step", "add"])
def test_a_dead_engine_fails_everybody_at_once(when, monkeypatch, caplog):
    with running(context=8192, max_requests=1) as one:
        url = f"{one.url}/v1/completions"
        with ThreadPoolExecutor(3) as pool:
            whole = [pool.submit(httpx.post, url, json=LONG, timeout=30) for _ in range(2)]
            stream = pool.submit(
                lambda: list(one.client.completions.create(model="btlm-tiny", prompt="a", max_tokens=4000, stream=True))
            )
            wait(lambda: one.service.worker.num_running + one.service.worker.num_waiting == 3)

            def fail(*_, **__):
                raise MemoryError("out of it")

            monkeypatch.setattr(one.engine, when, fail)
            if when == "add":
                pool.submit(httpx.post, url, json=LONG, timeout=30)
                one.service.worker.cancel(list(one.service.worker._owners)[:1])
            for answer in (one.result() for one in whole):
                assert answer.status_code == 503 or when == "add"  # where one of them was cancelled to make room
            with pytest.raises(openai.APIError, match="engine has stopped"):
                stream.result()
        for path in ("/ready", "/health"):
            answer = httpx.get(f"{one.url}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
        answer = httpx.post(url, json=LONG)
        assert answer.status_code == 503
        assert "out of it" not in answer.text  # clients get no traces
    assert "MemoryError: out of it" in caplog.text


def test_weights_that_are_replaced_or_deleted_stay_as_they_were(copy):
    body = {"prompt": "abc", "max_tokens": 20, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    with running(copy) as one:

        def ask():
            return httpx.post(f"{one.url}/v1/completions", json=body).json()["choices"]

        before = ask()
        weights = copy / "model.safetensors"
        other = Path(shutil.copy(weights, copy / "other"))
        with other.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(bytes(1000))
        other.replace(weights)
        assert ask() == before
        weights.unlink()
        assert ask() == before


def test_nothing_is_sent_once_weights_were_written_into(copy, caplog):
    with running(copy) as one:
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
        answer = httpx.post(f"{one.url}/v1/completions", json={"prompt": "abc"})
        assert answer.status_code == 503
        assert "WeightsChanged" in answer.json()["error"]["message"]
        assert httpx.get(f"{one.url}/ready").status_code == 503
    assert "model.safetensors was written to while it was in use" in caplog.text


@pytest.mark.slow
def test_more_clients_than_places_all_get_an_answer(checkpoint):
    async def ask(client, url, i):
        body = {"prompt": f"text {i}", "max_tokens": 5, "ignore_eos": True}
        return await client.post(url, json=body)

    async def ask_all(url):
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            return await asyncio.gather(*(ask(client, url, i) for i in range(500)))

    with running(checkpoint, max_requests=4, max_waiting=30) as one:
        answers = asyncio.run(ask_all(f"{one.url}/v1/completions"))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 34
        assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)
        wait(lambda: idle(one))


def test_threads_of_a_server_end_with_it(checkpoint):
    before = threading.active_count()
    with running(checkpoint):
        pass
    wait(lambda: threading.active_count() <= before)
