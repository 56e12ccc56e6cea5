"""`btlm report`: what it reads and refuses, and the page in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from btlm.cli.main import main
from btlm.errors import ResultsError
from btlm.evaluate.report_command import run_report
from btlm.evaluate.report_data import read_evidence
from btlm.evaluate.report_page import page
from btlm.evaluate.results import Result, write_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAIN = Result(
    name="piqa",
    metric="acc_norm",
    value=0.5,
    unit="",
    n=100,
    standard_error=0.05,
    shots=0,
    model="runs/mine/model",
    model_sha256="a" * 64,
    versions={"btlm": "1"},
    command="btlm eval runs/mine/model",
    machine="a machine",
    time="2026-01-01T00:00:00Z",
)


def row(name: str, metric: str, value: float, **more: Any) -> Result:
    return replace(PLAIN, name=name, metric=metric, value=value, **more)


def rows_of_all() -> list[Result]:
    bench = {"settings": {"dtype": "4bit", "context": 512, "cache_dtype": "int8"}, "shots": None}
    positions = [
        row(
            f"positions {first}-{first + 63}",
            "nats_per_token",
            4.0 + 0.1 * (scaling != "none"),
            settings={
                "positions": [first, first + 63],
                "scaling": scaling,
                "factor": factor,
                "length": 128,
                "train_length": 64,
                "texts": ["book.txt"],
            },
        )
        for scaling, factor in (("none", 1.0), ("dynamic", 2.0))
        for first in (0, 64)
    ]
    needle = [
        row(f"needle {kind}", "accuracy", share, settings={"kind": kind, "length": 256, "depth": depth, "chance": 0.1})
        for kind, depth, share in (("text", 0.0, 0.2), ("text", 1.0, 0.9), ("absent", None, 0.1))
    ]
    return [
        PLAIN,
        row("mmlu", "acc", 0.25, shots=5, partial=True),
        row("own_task", "f1", 0.125),
        *(row("bench 4bit, 512 tokens", key, value, **bench) for key, value in BENCH.items()),
        *positions,
        *needle,
        row("perplexity", "perplexity", 12.5, settings={"texts": ["<b>&.txt"], "context": 64}),
    ]


BENCH = {"peak_bytes": 2.5e9, "weight_bytes": 2e9, "cache_bytes": 1e8, "decode_tokens_per_s": 17.25}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, rows_of_all())
    return path


def harness_file(path: Path, **changes: Any) -> Path:
    content = {
        "results": {"piqa": {"alias": "piqa", "acc,none": 0.7, "acc_norm,none": 0.75, "acc_norm_stderr,none": 0.01}},
        "group_subtasks": {},
        "versions": {"piqa": 1.0},
        "n-shot": {"piqa": 0},
        "n-samples": {"piqa": {"original": 1838, "effective": 1838}},
        "config": {"model": "hf", "model_args": "pretrained=EleutherAI/pythia-2.8b,dtype=bfloat16", "limit": None},
        "date": 1795740272.0,
        "pretty_env_info": "CPU:\nModel name:   A processor",
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.19.0",
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


class _Text(HTMLParser):
    """What a page says, outside of scripts and styles; and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        if self._within not in ("script", "style") and data.strip():
            self.words.append(" ".join(data.split()))


def read(text: str) -> _Text:
    parser = _Text()
    parser.feed(text)
    return parser


def test_a_page_has_all_numbers_and_needs_nothing_else(results, tmp_path, capsys):
    text = run_report([results], tmp_path / "report.html")
    said = read(text)
    for words in (
        "50.00 ± 5.00",
        "77.2",
        "-27.2",
        "beyond the standard error",
        "25.00 ± 5.00",
        "partial",
        "12.50 ± 5.00",
    ):
        assert words in said.words
    for words in ("2.5", "17.2", "4.1000 ± 0.0500", "<b>&.txt; context 64, stride None, cache None", "12.5 ± 0.05"):
        assert words in said.words
    for words in ("btlm eval runs/mine/model", "a machine", "btlm 1", "a" * 64, "2026-01-01T00:00:00Z"):
        assert words in said.words
    assert all(re.fullmatch(r"#[\w-]+", place) for place in said.loads)
    assert all(f'id="{place[1:]}"' in text for place in said.loads)
    assert "url(" not in text
    assert "wrote " in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == text


def test_what_was_not_measured_says_how(tmp_path):
    write_results(tmp_path / "results.json", [PLAIN])
    words = " ".join(read(run_report([tmp_path], tmp_path / "report.html")).words)
    for command in ("btlm bench", "btlm eval-positions", "btlm perplexity", "btlm eval-needle"):
        assert f"Not measured: {command} MODEL" in words


def test_a_file_of_the_harness_stands_beside(results, tmp_path):
    path = harness_file(tmp_path / "results_2026.json")
    evidence = read_evidence([results, path])
    assert [model.label for model in evidence.models] == ["mine", "EleutherAI/pythia-2.8b"]
    (theirs,) = evidence.models[1].find("piqa", "acc_norm")
    assert (theirs.value, theirs.standard_error, theirs.n, theirs.shots, theirs.partial) == (0.75, 0.01, 1838, 0, False)
    assert (theirs.machine, theirs.time) == ("A processor", "2026-11-27T00:44:32Z")
    table = page(evidence)["benchmarks"][0]
    assert table.columns[:6] == [
        "task",
        "metric",
        "mine",
        "less BTLM-3B-8k",
        "EleutherAI/pythia-2.8b",
        "less BTLM-3B-8k",
    ]
    assert [one.text for one in table.rows[0][2:6]] == ["50.00 ± 5.00", "-27.2", "75.00 ± 1.00", "-2.2"]


def test_a_limit_of_the_harness_is_partial(tmp_path):
    config = {"model": "hf", "model_args": {"pretrained": "a/b"}, "limit": 10}
    (model,) = read_evidence([harness_file(tmp_path / "one.json", config=config)]).models
    assert all(row.partial for row in model.rows)


def test_whole_results_come_before_partial_ones_and_all_are_named(tmp_path):
    rows = [
        replace(PLAIN, partial=True, value=0.9, time="2027"),
        PLAIN,
        replace(PLAIN, settings={"context": 64}, value=0.6),
    ]
    write_results(tmp_path / "results.json", rows)
    table = page(read_evidence([tmp_path]))["benchmarks"][0]
    cell = table.rows[0][2]
    assert (cell.text, cell.note) == ("50.00 ± 5.00", "")
    assert cell.facts["also measured (context 64)"] == "60.00"
    assert cell.facts["also measured (partial)"] == "90.00"


def test_models_are_told_apart_by_their_digest(tmp_path):
    write_results(tmp_path / "a.json", [PLAIN])
    write_results(tmp_path / "b.json", [replace(PLAIN, model_sha256="b" * 64, model="../mine", value=0.6)])
    write_results(tmp_path / "c.json", [replace(PLAIN, model="/elsewhere/copy")])
    models = read_evidence([tmp_path / name for name in ("a.json", "b.json", "c.json")]).models
    assert [(model.label, len(model.rows)) for model in models] == [("mine (aaaaaa)", 1), ("mine (bbbbbb)", 1)]


def test_the_curve_of_a_training_run(results, tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    records: list[dict[str, Any]] = [
        {"step": i, "tokens": 1000 * i, "sequence_length": 8, "loss": 5.0 - 0.1 * i} for i in range(1, 9)
    ]
    records[-1]["bits_per_byte"] = {"books": 1.5, "mean": 1.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for given in (run, run / "metrics.jsonl"):
        words = read(run_report([results, given], tmp_path / "report.html")).words
        assert "Training of tiny" in words
        assert "1.5000" in words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"a": 1}', "holds no results; it needs the keys format (1) and rows, or those of lm-evaluation-harness."),
        ('{"results": {}}', "was written by an unknown version of lm-evaluation-harness, and 0.4.x is read"),
        ('{"results": {}, "lm_eval_version": "0.5.0"}', "was written by version 0.5.0 of lm-evaluation-harness"),
        ('{"results": {}, "lm_eval_version": "0.4.13"}', "is no whole file of lm-evaluation-harness"),
        ('{"format": 9, "rows": []}', "has the format 9"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, message, capsys):
    path = tmp_path / "results.json"
    path.write_text(content)
    assert main(["report", str(path), "--output", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_results(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has neither a results.json nor a metrics.jsonl" in capsys.readouterr().err


def test_contradictions_are_refused(tmp_path):
    write_results(tmp_path / "a.json", [PLAIN])
    write_results(tmp_path / "b.json", [replace(PLAIN, value=0.6)])
    with pytest.raises(ResultsError, match=r"is 0\.5 in .*a\.json and 0\.6 in .*b\.json, measured in the same way"):
        read_evidence([tmp_path / "a.json", tmp_path / "b.json"])
    assert len(read_evidence([tmp_path / "a.json", tmp_path / "a.json"]).rows) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(results, tmp_path, width):
    """Columns sort, numbers open, and nothing but tables and drawings, which scroll, is wider than the window."""
    check = """
    const table = document.querySelectorAll("table")[1];
    const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
    const before = names();
    table.querySelector("thead button").click();
    const up = names();
    table.querySelector("thead button").click();
    const opened = table.querySelector("td details");
    opened.open = true;
    const wide = [...document.querySelectorAll("body *")].filter((one) =>
      one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".wide, .chart"));
    parent.document.title = JSON.stringify({ before, up, down: names(), width: innerWidth,
      shown: opened.querySelector("dl").offsetHeight > 0, wide: wide.map((one) => one.outerHTML.slice(0, 80)) });
    """
    text = run_report([results], tmp_path / "report.html")
    (tmp_path / "inner.html").write_text(
        text.replace("</body>", f"<script>addEventListener('load', () => {{{check}}})</script></body>")
    )
    frame = f'<iframe src="inner.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    (tmp_path / "outer.html").write_text(f"<!doctype html><title>none</title>{frame}")
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path}/outer.html"], capture_output=True, text=True, check=True)
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1].replace("&quot;", '"').replace("&lt;", "<"))  # type: ignore[index]
    assert found["width"] == width
    assert found["up"] == sorted(found["before"])
    assert found["down"] == sorted(found["before"], reverse=True)
    assert found["up"] != found["before"]
    assert found["shown"]
    assert found["wide"] == []
