"""`btlm eval` against lm-evaluation-harness' own command with its model for Transformers."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from btlm.cli.main import main
from btlm.errors import OptionError
from btlm.evaluate.eval_command import eval_table, run_eval
from btlm.evaluate.harness_tasks import load_tasks, quiet_harness
from btlm.evaluate.journal import Journal
from btlm.evaluate.options import Eval
from btlm.evaluate.reference import REFERENCES
from btlm.evaluate.results import Origin, read_results
from tests.checkpoint.tiny import save_tiny
from tests.evaluate.quiz import write_data, write_tasks

QUESTIONS = 12
DYNAMIC = {"type": "linear", "train_seq_len": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), n_embd=128, n_inner=150, n_positions=256, initializer_range=0.1)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), QUESTIONS)


@pytest.fixture
def options(tasks, data):
    def make(*names, **more):
        return Eval(**{"suite": names, "include": str(tasks), "data": str(data), **more})

    return make


def figures(rows):
    return {(row.name, row.metric): (row.value, row.standard_error, row.n, row.shots, row.partial) for row in rows}


def test_scores_are_those_of_the_harness(model, tasks, data, options, capsys):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    rows = run_eval(model, options("quiz", "quizzes_all", "writing", shots=2))
    theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)
    with quiet_harness(), load_tasks(["quiz", "quizzes_all", "writing"], data=data, include=tasks, shots=2) as loaded:
        found = evaluate(lm=theirs, task_dict=loaded.tasks, bootstrap_iters=10, log_samples=False)
    ours = figures(rows)
    assert len(ours) == 8  # three tasks of two metrics, one of one, and the group
    for (name, metric), (value, error, n, shots, partial) in ours.items():
        expected = {**found["results"], **found["groups"]}[name]
        key = next(key for key in expected if key.startswith(f"{metric},"))
        assert value == pytest.approx(expected[key], abs=1e-9)
        assert error == pytest.approx(expected[key.replace(",", "_stderr,")], abs=1e-9)
        assert (shots, partial) == (2, False)
        assert n == {"quiz": 12, "quizzes_all": 12, "writing": 2}.get(name, 6)
    assert 0 < ours["quiz", "acc"][0] < 1
    assert "partial" not in capsys.readouterr().out


def test_results_say_what_they_depend_on(model, options, tmp_path, capsys):
    output = tmp_path / "results.json"
    run_eval(model, options("quizzes_all", limit=2, output=str(output), context=128))
    rows = read_results(output)
    assert {row.name for row in rows} == {"quiz_first", "quiz_second", "quizzes_all"}
    assert all(row.partial and row.shots == 0 and row.versions["lm_eval"] for row in rows)
    one = next(row for row in rows if row.name == "quiz_first")
    assert one.settings["task_version"] == 3.0
    assert (one.settings["context"], one.settings["cache_dtype"]) == (128, "float32")
    assert len(one.settings["data_sha256"][0]) == 64
    printed = capsys.readouterr().out
    assert "4 partial" in printed
    assert printed.strip().splitlines()[3].startswith("partial: ")
    assert list(tmp_path.iterdir()) == [output]


def test_as_many_questions_as_there_are_is_not_partial(model, options):
    assert not any(row.partial for row in run_eval(model, options("quiz", limit=QUESTIONS)))
    assert all(row.partial for row in run_eval(model, options("quiz", limit=QUESTIONS - 1)))


def test_published_scores_stand_beside(model, capsys):
    from rich.console import Console

    from btlm.checkpoint import Checkpoint

    origin = Origin.of(Checkpoint.open(model))
    rows = [
        origin.result("piqa", "acc", 0.5, "", 100, standard_error=0.01, shots=0),
        origin.result("piqa", "acc_norm", 0.77, "", 100, standard_error=0.01, shots=0),
        origin.result("boolq", "acc", 0.5, "", 100, standard_error=0.01, shots=0),
        origin.result("other", "f1", 0.5, "", 100),
    ]
    table = eval_table(rows, {name: [name] for name in ("piqa", "boolq", "other")}, ["BTLM-3B-8k", "Pythia-2.8B"])
    Console(width=120).print(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["piqa", "acc_norm", "0", "100", "77.00", "±", "1.00", "77.2", "(-0.2)", "74", "(+3.0*)"]
    assert lines[3].split()[2:] == ["0", "100", "50.00", "±", "1.00", "69.6", "(-19.6*)", "64.1", "(-14.1*)"]
    assert lines[4].split() == ["other", "f1", "100", "50.00"]
    assert REFERENCES["LLaMA-7B"]["lambada_openai", "perplexity"] == 3.49
    assert ("truthfulqa_mc2", "acc") not in REFERENCES["LLaMA-7B"]
    assert REFERENCES["StableLM-3B-4E1T"]["winogrande", "acc"] == 66.5


def test_what_the_engine_does_not_run_is_asked_on_transformers(tasks, data, options, tmp_path, capsys):
    """Dynamic interpolation: the factor of a pass follows from its length, which must not depend on other requests."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    folder = save_tiny(tmp_path / "model", n_positions=256, initializer_range=0.1, alibi_scaling=DYNAMIC)
    chosen = options("quiz", "quizzes_all", output=str(tmp_path / "results.json"))
    rows = run_eval(folder, chosen)
    assert {row.settings["engine"] for row in rows} == {"transformers"}
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    with quiet_harness(), load_tasks(["quiz", "quizzes_all"], data=data, include=tasks) as loaded:
        found = evaluate(lm=theirs, task_dict=loaded.tasks, bootstrap_iters=10, log_samples=False)
    for row in rows:
        expected = {**found["results"], **found["groups"]}[row.name][f"{row.metric},none"]
        assert row.value == pytest.approx(expected, abs=1e-9)
    assert "Transformers answers instead, one request at a time." in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"threads": 1}, {"kernels": "torch"}, {"cache_dtype": "float32"}])
def test_options_of_the_engine_are_refused_where_transformers_answers(options, tmp_path, given):
    folder = save_tiny(tmp_path / "model", n_positions=256, alibi_scaling=DYNAMIC)
    with pytest.raises(OptionError, match=f"{next(iter(given))} only matter to the engine"):
        run_eval(folder, options("quiz", **given))


def test_answers_of_transformers_are_kept(options, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model", n_positions=256, initializer_range=0.1, alibi_scaling=DYNAMIC)
    chosen = options("quiz", "writing", output=str(tmp_path / "results.json"))
    asked: list[str] = []
    put = Journal.__setitem__

    def counting(journal, key, answer):
        asked.append(key)
        put(journal, key, answer)
        if len(asked) == 35:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "__setitem__", counting)
    with pytest.raises(KeyboardInterrupt):
        run_eval(folder, chosen)
    rows = run_eval(folder, chosen)
    assert len(asked) == len(set(asked)) == 3 * QUESTIONS + 2
    assert figures(rows) == figures(run_eval(folder, chosen))


def test_local_files_need_no_network(model, options, monkeypatch):
    calls = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: calls.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: calls.append(address))
    run_eval(model, options("quiz", "quizzes_all", "writing", shots=2))
    assert not calls


def test_a_stopped_run_goes_on_where_it_stopped(model, options, tmp_path, monkeypatch):
    chosen = options("quiz", "writing", output=str(tmp_path / "results.json"))
    expected = figures(run_eval(model, chosen))
    asked: list[str] = []
    put, most = Journal.__setitem__, [0]

    def counting(journal, key, answer):
        if len(asked) == most[0]:
            raise KeyboardInterrupt
        asked.append(key)
        put(journal, key, answer)

    monkeypatch.setattr(Journal, "__setitem__", counting)
    for most[0] in (0, 7, 20, 37):
        with pytest.raises(KeyboardInterrupt):
            run_eval(model, chosen)
    most[0] = 1000
    assert figures(run_eval(model, chosen)) == expected
    assert len(asked) == len(set(asked)) == 3 * QUESTIONS + 2


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(model, options, tmp_path):
    chosen = options("quiz", "writing", output=str(tmp_path / "results.json"))
    expected, total = figures(run_eval(model, chosen)), 3 * QUESTIONS + 2
    (tmp_path / "results.json").unlink()
    program = (
        "import sys, time; from btlm.cli.main import main; from btlm.evaluate.journal import Journal\n"
        "put = Journal.__setitem__\n"
        "Journal.__setitem__ = lambda *all: (put(*all), time.sleep(0.02))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    suite = ["--suite", "quiz,writing", "--include", chosen.include, "--data", chosen.data, "--output", chosen.output]
    command = [sys.executable, "-c", program, "eval", str(model), *suite]
    journal, kept = tmp_path / "results.json.journal", tmp_path / "kept"
    moments = sorted(random.Random(1).sample(range(total), 10))
    for moment in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not journal.exists() or journal.read_bytes().count(b"\n") < moment:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not kept.exists():
            kept.hardlink_to(journal)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert figures(read_results(tmp_path / "results.json")) == expected
    keys = [json.loads(line)[0] for line in kept.read_bytes().splitlines()]
    assert len(keys) == len(set(keys)) == total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--suite quizz", "--suite has quizz, which is neither a suite nor a task: did you mean quiz?"),
        ("--suite quiz --reference Pythia-2.8", "--reference has Pythia-2.8, for which no scores are known: did you"),
        ("--suite quiz --data {folder}", "--data {folder} has no file quiz_test.jsonl."),
        ("--suite quiz --limit 0", "--limit is 0"),
        (
            "--suite quiz --output {folder}/x/results.json --context 2",
            "of 16 tokens cannot be scored in a context of 2",
        ),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(model, tasks, data, tmp_path, arguments, message, capsys):
    given = arguments.format(folder=tmp_path).split()
    where = ["--include", str(tasks), *([] if "--data" in given else ["--data", str(data)])]
    assert main(["eval", str(model), *where, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("btlm: error: ")
    assert error.count("\n") == 1
    assert message.format(folder=tmp_path) in error


def test_a_folder_that_is_no_model_is_told_first(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "--suite", "nothing"]) == 2
    assert "config.json" in capsys.readouterr().err
