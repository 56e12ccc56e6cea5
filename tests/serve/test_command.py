"""`btlm serve` as a process."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.checkpoint.tiny import set_config
from tests.serve.conftest import wait


class Process:
    """The command, whose standard error is read as it comes."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "btlm", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
        self.process: Any = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.url = ""
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

    def wait_for(self, pattern):
        for _ in range(6000):
            if found := re.search(pattern, self.text):
                return found
            assert self.process.poll() is None, self.text
            time.sleep(0.01)
        raise AssertionError(f"no {pattern} in {self.text}")

    @property
    def text(self):
        return "".join(list(self.lines))

    def end(self):
        status = self.process.wait(60)
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return status


@contextmanager
def process(*arguments):
    one = Process(*arguments)
    try:
        one.url = one.wait_for(r"serving at (http://\S+)").group(1)
        yield one
    finally:
        one.process.kill()
        one.end()


def stream(url, **given):
    body = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True, **given}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60)


@pytest.mark.parametrize("name", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_running_texts_are_finished_before_it_stops(name):
    with process() as one, stream(one.url) as answer:
        lines = answer.iter_lines()
        next(lines)
        one.process.send_signal(name)
        one.wait_for("stopping: 1 running text and 0 waiting have 30 seconds")
        refused = httpx.post(f"{one.url}/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert refused.headers["retry-after"]
        assert httpx.get(f"{one.url}/ready").status_code == 503
        assert httpx.get(f"{one.url}/health").status_code == 200
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert one.end() == 0
        assert "did not finish" not in one.text
        assert "Traceback" not in one.text


@pytest.mark.slow
def test_stopping_under_load_loses_no_text():
    def waiting(url):
        (found,) = re.findall(r"^btlm_texts_waiting (\S+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)
        return float(found)

    def whole(url, i):
        with stream(url, max_tokens=200, prompt=str(i)) as answer:
            if answer.status_code == 503:  # it came after the signal
                return None
            return [line for line in answer.iter_lines() if line]

    with process("--max-requests", "3") as one, ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(whole, one.url, i) for i in range(9)]
        wait(lambda: waiting(one.url) >= 3)
        one.process.send_signal(signal.SIGTERM)
        for answer in answers:
            if (lines := answer.result()) is None:
                continue
            assert lines[-1] == "data: [DONE]"
            assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert one.end() == 0


def test_texts_that_take_too_long_are_told_so():
    with process("--drain", "0.2") as one, stream(one.url, max_tokens=8000, prompt="b") as answer:
        lines = answer.iter_lines()
        next(lines)
        one.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert "error" in json.loads(rest[-2].removeprefix("data: "))
        assert one.end() == 0
        assert "1 text did not finish in time" in one.text
        assert "Traceback" not in one.text


@pytest.mark.slow
def test_a_second_signal_stops_at_once():
    with process() as one, stream(one.url, max_tokens=8000) as answer:
        lines = answer.iter_lines()
        next(lines)
        one.process.send_signal(signal.SIGINT)
        one.wait_for("stopping")
        one.process.send_signal(signal.SIGINT)
        assert one.end() == 0


def test_what_it_tells_at_the_start():
    with process(
        "--served-name", "my model", "--context", "512", "--max-requests", "3", "--cache-tokens", "1000"
    ) as one:
        assert "3 texts at a time of 512 tokens at most, 1,024 together" in one.text
        assert httpx.get(f"{one.url}/v1/models").json()["data"][0]["id"] == "my model"
        assert httpx.get(f"{one.url}/v1/models/my model").json()["max_model_len"] == 512


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others, and no key is set: add --api-key-file"),
        (["--host", "192.0.2.1", "--public"], "--host 192.0.2.1 and --port 0 cannot be listened on"),
        (["--api-key-file", "nowhere.txt"], "--api-key-file nowhere.txt cannot be read"),
        (["--patience", "1"], "--patience is 1.0, not a number above 1"),
        (["--cors-origins", "example.org"], "give the scheme, too"),
        (["--context", "100000000"], "of memory are free; use a shorter context"),
        (["--context", "512", "--cache-tokens", "100"], "too small for one request of 512"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(arguments, words):
    one = Process(*arguments)
    assert one.end() == 2
    last = one.text.splitlines()[-1]
    assert last.startswith("btlm: error: ")
    assert words in last
    assert "Traceback" not in one.text


def test_models_that_the_engine_cannot_run_are_refused(copy):
    set_config(copy, alibi_scaling={"type": "linear", "train_seq_len": 64})
    one = Process(copy)
    assert one.end() == 2
    assert "dynamic" in one.text
