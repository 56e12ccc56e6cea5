"""A small model and a text for runs of `btlm quantize`, and runs that wait to be stopped."""

import subprocess
import sys
from typing import Any

import pytest
import torch

# Groups of 64 divide the width; neither 64 nor 128 divides the feed-forward width.
WIDE: dict[str, Any] = {"n_embd": 128, "n_inner": 150, "n_positions": 512, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def one_thread():
    """As in the processes that tests start: a copy for a text depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} is what follows {i - 1} and comes before {i + 1}." for i in range(200)))
    return path


def start_slow_run(output, source, *options, matrix=4):
    """Run the command up to a matrix, where it waits."""
    program = (
        "import sys, time, torch, btlm.convert.quantize as q, btlm.cli; pack = q.pack; count = []\n"
        "torch.set_num_threads(1)\n"
        "def slow(*a):\n    count.append(1)\n"
        f"    if len(count) == {matrix}: print('here', flush=True); time.sleep(60)\n"
        "    return pack(*a)\n"
        "q.pack = slow; sys.exit(btlm.cli.main(['quantize', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, source, output, *options]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "here\n"
    return run
