"""Requests that nobody would send: does the server fail, hang, grow, or keep a place?

    python benchmarks/serve_fuzz.py [MODEL] [--requests 20000] [--seed 1]

schemathesis makes requests of the server's own description of its API, those that fit it and those that do not, and
checks that every answer is one that the description allows and that none is a failure of the server (5xx); the first
one that is not ends the benchmark. After each tenth a row tells what the server counted, the places that are still
taken while nobody asks, and its memory.
"""

import argparse
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from served import serving
from tiny_inputs import add_smoke, write_model

from btlm.checkpoint import BUNDLED_MODEL

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_FLAGS = ["--context", "128", "--max-requests", "4", "--max-waiting", "4"]
_OPERATIONS = 5  # that take something, and share the requests


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", default=str(BUNDLED_MODEL))
    parser.add_argument("--requests", type=int, default=20_000, help="about so many")
    parser.add_argument("--seed", type=int, default=1)
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            args.model, args.requests = str(write_model(Path(folder))), 50
            measure(args)
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Send the requests in ten parts, and print what the server says after each."""
    print("| requests | answers: 2xx | 4xx | 5xx | texts written | open places | memory |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(args.model, *_FLAGS, log=Path(folder) / "log") as (url, pid),
    ):
        for part in range(10):
            run = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", _CHECKS]
            run += ["--max-examples", str(max(1, args.requests // 10 // _OPERATIONS)), "--phases", "fuzzing"]
            run += ["--seed", str(args.seed + part), "--no-color", "--warnings", "off", "--request-timeout", "60"]
            done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                told = [line for line in (Path(folder) / "log").read_text().splitlines() if not line.startswith("{")]
                raise SystemExit("\n".join([done.stdout[-5000:], done.stderr[-1000:], *told]))
            report(url, pid)


def report(url: str, pid: int) -> None:
    """A row of the table."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    answers = dict.fromkeys("2345", 0)
    for sample in samples:
        if sample.name == "btlm_http_requests_total":
            answers[sample.labels["status"][0]] += int(sample.value)
    ended = sum(sample.value for sample in samples if sample.name == "btlm_texts_total")
    places = sum(sample.value for sample in samples if sample.name in ("btlm_texts_waiting", "btlm_texts_running"))
    memory = psutil.Process(pid).memory_info().rss
    cells = [sum(answers.values()), answers["2"], answers["4"], answers["5"], int(ended), int(places)]
    print(f"| {' | '.join(f'{cell:,}' for cell in cells)} | {memory / 1e6:,.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
