"""The server under load, against llama.cpp's, in turn (A B A B) at BTLM-3B's shape.

    pip install 'llama-cpp-python[server]'      (compiles for minutes; use a separate environment)
    python benchmarks/serve_load.py --model btlm-3b-4bit --gguf btlm-3b-q4_0.gguf --llama-python PYTHON

A client opens 1, 4, 16 and 64 streams at once, each with a prompt of its own (``--prompt`` words of one token) and
``--new`` tokens that are written greedily. It tells the tokens per second of all streams together, the time to the
first token (median and 99th percentile over the streams), and the time between two tokens (99th percentile). Both
servers have ``--threads`` threads, and the client takes little of them: it only looks for the beginnings of events.

``python -m llama_cpp.server`` writes one text at a time; the others wait. ``--peer-url`` names a server that is already
running instead, such as llama.cpp's own ``llama-server -np 16``.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from served import WORDS, serving
from tiny_inputs import add_smoke, write_model

from btlm.engine.memory import read_rate

_PEER_PORT = 8790


class Stream:
    """When the tokens of one text came."""

    def __init__(self, sent: float) -> None:
        self.sent = sent
        self.times: list[float] = []

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def between(self) -> list[float]:
        """Seconds between two tokens."""
        return np.diff(self.times).tolist()


async def stream(url: str, body: dict[str, object]) -> Stream:
    """Send one request, and note when its events come."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=2**20)
    content = json.dumps(body).encode()
    head = [f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json"]
    head += [f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"]
    one = Stream(time.perf_counter())
    writer.write("\r\n".join(head).encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()[-500:]}")
    while line := await reader.readline():
        if line.startswith(b'data: {"error"'):
            raise RuntimeError(line.decode())
        if line.startswith(b"data: {"):
            one.times.append(time.perf_counter())
    writer.close()
    return one


async def load(url: str, number: int, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One measurement."""
    rng = np.random.default_rng([seed, number])
    prompts = [" " + " ".join(rng.choice(WORDS, args.prompt)) for _ in range(number)]
    start = time.perf_counter()
    bodies = [{"prompt": prompt, "max_tokens": args.new, "temperature": 0, "stream": True} for prompt in prompts]
    streams = await asyncio.gather(*(stream(url, body) for body in bodies))
    seconds = time.perf_counter() - start
    firsts = [one.first for one in streams]
    between = [each for one in streams for each in one.between]
    return {
        "tokens": sum(min(len(one.times), args.new) for one in streams) / seconds,  # some servers send a last event
        "first_p50": float(np.percentile(firsts, 50)),
        "first_p99": float(np.percentile(firsts, 99)),
        "between_p99": float(np.percentile(between, 99)),
    }


@contextmanager
def peer(args: argparse.Namespace) -> Iterator[str]:
    """In this context, llama.cpp's server runs."""
    if args.peer_url:
        yield args.peer_url
        return
    command = [str(args.llama_python), "-m", "llama_cpp.server", "--model", str(args.gguf), "--port", str(_PEER_PORT)]
    command += ["--n_ctx", str(args.context), "--n_threads", str(args.threads), "--interrupt_requests", "false"]
    command += ["--n_threads_batch", str(args.threads), "--verbose", "false"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{_PEER_PORT}"
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/v1/models").close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a 4-bit folder of BTLM-3B's shape")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same shape for llama.cpp")
    parser.add_argument(
        "--llama-python", type=Path, metavar="PYTHON", help="a Python that has llama-cpp-python[server]"
    )
    parser.add_argument("--peer-url", metavar="URL", help="a server of llama.cpp that is running")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to write per stream")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-requests", type=int, default=16)
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            args.model, args.streams, args.turns = write_model(Path(folder)), [1, 4], 1
            args.prompt, args.new, args.context = 8, 4, 64
            measure(args)
        return
    if args.model is None:
        print("Nothing is measured without --model.")
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Measure both servers in turn, and print."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    flags = ["--context", str(args.context), "--threads", str(args.threads), "--max-requests", str(args.max_requests)]
    rates = []
    for turn in range(args.turns):
        rates.append(read_rate(args.threads)["bytes_per_s"] / 1e9)
        with serving(args.model, *flags) as (url, _):
            ask(url, "ours", args, turn, found)
        if args.llama_python or args.peer_url:
            with peer(args) as url:
                ask(url, "peer", args, turn, found)
    print(f"{args.threads} threads, prompts of {args.prompt} and {args.new} new tokens, {args.turns} turns, medians;")
    print(f"memory is read at {min(rates):.1f} to {max(rates):.1f} GB/s\n")
    print("| streams | server | tokens/s | ratio | first token p50 | p99 | between tokens p99 |")
    print("|---|---|---|---|---|---|---|")
    for number in args.streams:
        for server in ("ours", "peer"):
            if not (rows := found.get((server, number))):
                continue
            middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            ratio = ""
            if server == "ours" and (others := found.get(("peer", number))):
                pairs = zip(rows, others, strict=True)
                ratio = f"{statistics.median(row['tokens'] / other['tokens'] for row, other in pairs):.2f}"
            cells = [f"{number}", "btlm" if server == "ours" else "llama.cpp", f"{middle['tokens']:.2f}", ratio]
            cells += [f"{middle[key]:.2f} s" for key in ("first_p50", "first_p99")] + [f"{middle['between_p99']:.3f} s"]
            print(f"| {' | '.join(cells)} |")


def ask(
    url: str,
    server: str,
    args: argparse.Namespace,
    turn: int,
    found: dict[tuple[str, int], list[dict[str, float]]],
) -> None:
    """All measurements of one turn."""
    asyncio.run(load(url, 1, argparse.Namespace(prompt=8, new=2), 99))  # what is mapped gets into memory
    for number in args.streams:
        found.setdefault((server, number), []).append(asyncio.run(load(url, number, args, turn)))


if __name__ == "__main__":
    main()
