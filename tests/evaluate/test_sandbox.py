"""Programs of a model: what they may do, and what they may not."""

import subprocess
import sys
import time
from itertools import combinations

import pytest

from btlm.cli.main import main
from btlm.errors import NotSupported
from btlm.evaluate import sandbox
from btlm.evaluate.eval_command import run_eval
from btlm.evaluate.harness_model import EngineLM
from btlm.evaluate.options import Eval
from btlm.evaluate.sandbox import need_sandbox, runs_to_its_end
from btlm.evaluate.tasks.humaneval import pass_at_k, process_results
from tests.checkpoint.tiny import save_tiny
from tests.evaluate.quiz import write_lines

try:
    need_sandbox()
    WHY = ""
except NotSupported as error:
    WHY = str(error)
needs_sandbox = pytest.mark.skipif(bool(WHY), reason=WHY)


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("assert sum(range(4)) == 6", True),
        ("import math, collections, re, heapq, itertools", True),
        ("open('own.txt', 'w').write('a'); assert open('own.txt').read() == 'a'", True),
        ("print('much' * 100_000)", True),
        ("assert 1 == 2", False),
        ("this is no program", False),
        ("import sys; sys.exit(0)", False),  # before the tests that come after it
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("import time; time.sleep(60)", False),
        ("a = bytearray(2_000_000_000)", False),
        ("open('own.txt', 'wb').write(b'a' * 20_000_000)", False),
    ],
)
def test_programs_that_end_well_and_others(program, right):
    assert runs_to_its_end(program, seconds=2.0) is right


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "import pathlib; pathlib.Path({path!r}).write_text('changed')",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, {path!r} + '2')",
        "import subprocess; subprocess.run(['mount', '-o', 'remount,rw', '/'], check=True)",
        "import ctypes; assert ctypes.CDLL(None).umount(b'/proc') == 0",
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
        "import os; os.kill({pid}, 0)",
    ],
)
def test_nothing_outside_can_be_reached(tmp_path, program):
    import socket

    path = tmp_path / "precious.txt"
    path.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen([sys.executable, "-c", "input()"]) as other:
        text = program.format(path=str(path), port=server.getsockname()[1], pid=other.pid)
        assert not runs_to_its_end(text)
        other.kill()
    assert [one.name for one in tmp_path.iterdir()] == ["precious.txt"]
    assert path.read_text() == "kept"


@needs_sandbox
def test_processes_that_a_program_leaves_are_ended():
    mark = f"sleep 61{time.time_ns() % 1000:03}"
    start = f"import subprocess; subprocess.Popen({mark.split()!r})"
    assert runs_to_its_end(start)
    assert not runs_to_its_end(f"{start}; import time; time.sleep(30)", seconds=1.0)
    time.sleep(0.2)
    assert mark not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_system_without_namespaces_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "_run", lambda *_: (False, "unshare: unshare failed: Operation not permitted\n"))
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/unshare")
    with pytest.raises(NotSupported, match=r"in which programs are run \(unshare: .*not permitted\)"):
        need_sandbox()


PROBLEM = {
    "prompt": 'def double(a):\n    """Twice a number."""\n',
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}


@needs_sandbox
def test_problems_are_solved_or_not():
    right, wrong, broken = "    return 2 * a\n", "    return a * a\n", "    return (\n"
    assert process_results(PROBLEM, [right]) == {"pass@1": 1.0}
    assert process_results(PROBLEM, [wrong]) == {"pass@1": 0.0}
    found = process_results(PROBLEM, [[right, wrong, broken, *[wrong] * 7]])
    assert found == {"pass@1": pytest.approx(0.1), "pass@10": 1.0}


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 10])
def test_humaneval_runs_what_the_model_writes(tmp_path, monkeypatch, samples):
    folder = save_tiny(tmp_path / "model", n_positions=1024)
    write_lines(tmp_path / "humaneval_test.jsonl", [{**PROBLEM, "canonical_solution": f"{i}"} for i in range(2)])
    texts = iter(["    return 2 * a\n", *["    return 3 * a\n"] * 100])
    monkeypatch.setattr(EngineLM, "generate_until", lambda self, requests, **_: [next(texts) for _ in requests])
    options = Eval(suite=("humaneval",), data=str(tmp_path), run_code=True, samples=samples)
    found = {row.metric: (row.value, row.n) for row in run_eval(folder, options)}
    assert found == (
        {"pass@1": (0.5, 2)} if samples == 1 else {"pass@1": (pytest.approx(0.05), 2), "pass@10": (0.5, 2)}
    )


@pytest.mark.slow
def test_programs_run_only_if_the_user_wants_it(tmp_path, capsys):
    folder = save_tiny(tmp_path / "model", n_positions=1024)
    write_lines(tmp_path / "humaneval_test.jsonl", [{**PROBLEM, "canonical_solution": ""}])
    assert main(["eval", str(folder), "--suite", "humaneval", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--suite has humaneval, which runs what the model writes; allow it by --run-code." in error


def test_pass_at_k_is_the_share_of_all_choices():
    for number, right, k in ((5, 2, 3), (6, 1, 1), (4, 4, 2), (5, 0, 5)):
        choices = list(combinations([True] * right + [False] * (number - right), k))
        assert pass_at_k(number, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))
