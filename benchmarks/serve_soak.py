"""The server for an hour under mixed load: is each text still the engine's own, and does nothing grow?

    python benchmarks/serve_soak.py [MODEL] [--minutes 60] [--clients 12]

Clients send what real ones send: streams and whole answers, greedy and drawn ones, log-probabilities of prompts,
several choices, structured output; a fifth of them hangs up in the middle. The same requests are asked again and again,
and every answer has to be the one that the engine gives to it in this process, alone. Every tenth of the time a row
tells the requests, the differing answers, the errors, the places that are still taken while nobody asks, and the
memory.
"""

import argparse
import asyncio
import json
import time
from typing import Any

import httpx
import numpy as np
import psutil
from served import WORDS, serving
from tiny_inputs import add_smoke

from btlm.checkpoint import BUNDLED_MODEL
from btlm.engine import GenerationOptions
from btlm.generate import TextGenerator

_KINDS = 40  # of requests, which are asked again and again


def kinds(context: int) -> list[dict[str, Any]]:
    """Requests that write texts."""
    rng = np.random.default_rng(0)
    asked = []
    for i in range(_KINDS):
        prompt = " ".join(rng.choice(WORDS, int(rng.integers(1, max(2, context // 4)))))
        drawn = {"temperature": 0.8, "top_p": 0.9, "seed": i} if i % 2 else {"temperature": 0}
        asked.append({"prompt": prompt, "max_tokens": int(rng.integers(1, context // 4)), **drawn})
    return asked


def expected(model: str, asked: list[dict[str, Any]], context: int) -> list[str]:
    """What the engine answers in this process."""
    generator = TextGenerator.open(model, context=context)
    texts = []
    for one in asked:
        rules = {key: value for key, value in one.items() if key in ("temperature", "top_p", "seed")}
        texts.append(generator.generate(one["prompt"], GenerationOptions(max_new_tokens=one["max_tokens"], **rules)))
    return texts


class Soak:
    """Clients, and what they found."""

    def __init__(self, url: str, asked: list[dict[str, Any]], texts: list[str]) -> None:
        self.url, self.asked, self.texts = url, asked, texts
        self.requests = self.different = self.errors = self.hung_up = 0
        self.going = True

    async def client(self, number: int) -> None:
        """Ask until the time is over."""
        rng = np.random.default_rng(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            while self.going:
                index, way = int(rng.integers(len(self.asked))), int(rng.integers(5))
                try:
                    await (self.whole, self.stream, self.hang_up, self.score, self.form)[way](http, index)
                    self.requests += 1
                except (httpx.HTTPError, AssertionError, KeyError, ValueError):
                    self.errors += 1

    async def whole(self, http: httpx.AsyncClient, index: int) -> None:
        """A text as a whole."""
        answer = await http.post("/v1/completions", json=self.asked[index])
        self.different += answer.json()["choices"][0]["text"] != self.texts[index]

    async def stream(self, http: httpx.AsyncClient, index: int) -> None:
        """A text in pieces."""
        text = ""
        async with http.stream("POST", "/v1/completions", json={**self.asked[index], "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        self.different += text != self.texts[index]

    async def hang_up(self, http: httpx.AsyncClient, index: int) -> None:
        """A stream that is left."""
        async with http.stream("POST", "/v1/completions", json={**self.asked[index], "stream": True}) as answer:
            async for _ in answer.aiter_lines():
                break
        self.hung_up += 1

    async def score(self, http: httpx.AsyncClient, index: int) -> None:
        """Log-probabilities of a prompt, and several choices."""
        body = {"prompt": self.asked[index]["prompt"], "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2, "seed": 1}
        choices = (await http.post("/v1/completions", json=body)).json()["choices"]
        assert len(choices) == 2

    async def form(self, http: httpx.AsyncClient, index: int) -> None:
        """Structured output."""
        body = {"prompt": self.asked[index]["prompt"], "guided_choice": ["yes", "no"], "seed": index}
        text = (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        assert text in ("yes", "no")


async def soak(args: argparse.Namespace, url: str, pid: int, asked: list[dict[str, Any]], texts: list[str]) -> None:
    """Ten parts, after each of which nobody asks for a moment."""
    print(
        "| minutes | requests | hung up | other texts | errors | open places | memory |\n|---|---|---|---|---|---|---|"
    )
    begun, process = time.monotonic(), psutil.Process(pid)
    one = Soak(url, asked, texts)
    for _ in range(10):
        one.going = True
        clients = [asyncio.create_task(one.client(number)) for number in range(args.clients)]
        await asyncio.sleep(args.minutes * 6)
        one.going = False
        await asyncio.gather(*clients)
        await asyncio.sleep(1)
        async with httpx.AsyncClient(base_url=url) as http:
            lines = (await http.get("/metrics")).text.splitlines()
        places = sum(
            float(line.split()[1]) for line in lines if line.startswith(("btlm_texts_waiting", "btlm_texts_running"))
        )
        cells = [f"{(time.monotonic() - begun) / 60:.1f}", f"{one.requests:,}", f"{one.hung_up:,}", str(one.different)]
        cells += [str(one.errors), f"{places:.0f}", f"{process.memory_info().rss / 1e6:,.0f} MB"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", default=str(BUNDLED_MODEL))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--context", type=int, default=512)
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.minutes, args.clients, args.context = 0.05, 4, 64
    asked = kinds(args.context)
    texts = expected(args.model, asked, args.context)
    with serving(args.model, "--context", str(args.context), "--max-requests", "8") as (url, pid):
        asyncio.run(soak(args, url, pid, asked, texts))


if __name__ == "__main__":
    main()
