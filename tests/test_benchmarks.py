"""Every script of benchmarks/ runs from end to end."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = [
    path for path in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py")) if "__main__" in path.read_text()
]
# These take seconds at most; the others start several processes, or load torch and Transformers.
FAST = ("kernel_speed.py",)


@pytest.mark.parametrize(
    "script",
    [pytest.param(path, id=path.stem, marks=() if path.name in FAST else pytest.mark.slow) for path in SCRIPTS],
)
def test_a_benchmark_runs(script: Path) -> None:
    """A peer that is not installed is left out."""
    done = subprocess.run([sys.executable, str(script), "--smoke"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|---|" in done.stdout or "without llama.cpp" in done.stdout
    assert "| nan" not in done.stdout
