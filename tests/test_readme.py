"""The commands of README.md work as printed.

Every `bash`, `sh` and `console` block runs line by line, and every `python` block as one program, each in a new folder
with the recipes. The line `<!-- not run: REASON -->` before its fence excludes a block.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

SHELLS = {"bash", "sh", "console"}
FENCE = re.compile(
    r"(?:^ *<!-- *(?P<exempt>not run\b[^\n]*?) *-->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
ASSIGNMENTS = re.compile(r"^(?:\w+=\S*\s+)*")
# Commands that install btlm, which is already installed here.
SETUP = re.compile(r"(?:git clone|cd|source|(?:python3? -m )?pip install|python3? -m venv)\b")


class Block(NamedTuple):
    """A fenced block of a README that the tests run."""

    line: int
    language: str
    body: str


def runnable_blocks(text: str) -> list[Block]:
    """Blocks in a language that the tests run, without those that are excluded with a reason."""
    blocks = []
    for match in FENCE.finditer(text):
        exempt, language, body = match["exempt"], match["language"], match["body"]
        line = text.count("\n", 0, match.start("language")) + 1
        if exempt is not None:
            if not re.fullmatch(r"not run: .*\w.*", exempt):
                raise ValueError(f"Line {line - 1}: say why, as in <!-- not run: REASON -->, not {exempt!r}.")
        elif language in {*SHELLS, "python"}:
            blocks.append(Block(line, language, dedent(body)))
    return blocks


def commands(block: Block) -> list[str]:
    """Commands of a shell block, with continued lines joined; in a console block, the lines that begin with `$`."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_make_generate_samples_if_nothing_is_given(tmp_path):
    fake = tmp_path / "btlm"
    fake.write_text("#!/bin/sh\nprintf '%s|' \"$@\"\n")
    fake.chmod(0o755)
    argv = ["make", "-s", "-o", ".venv/.base", "generate", f"BIN={tmp_path}"]
    assert run(argv, ROOT) == "generate|Albert Einstein was known for|--temperature|0.8|--top-p|0.95|--seed|1|"
    assert run([*argv, "PROMPT=Once"], ROOT) == "generate|Once|"
    assert run([*argv, "ARGS=--top-k 5"], ROOT) == "generate|Albert Einstein was known for|--top-k|5|"


def run(argv: list[str], folder: Path) -> str:
    """Run a program with this environment's `btlm` on its path; returns its output, or fails the test."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PROMPT", "ARGS"}
    }
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{argv[-1]}\nexit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_block(block: Block, folder: Path) -> None:
    """Run a block. `make` only prints what it would do, since its targets install packages and run all tests."""
    if block.language == "python":
        run([sys.executable, "-c", block.body], folder)
        return
    for command in commands(block):
        program = ASSIGNMENTS.sub("", command)
        if program.startswith("btlm "):
            run(["bash", "-o", "pipefail", "-c", command], folder)
        elif re.match(r"make\b", program):
            planned = run(["bash", "-c", re.sub(r"\bmake\b", "make -n", command, count=1)], ROOT)
            assert "generate" not in program.split() or '/btlm generate "$PROMPT"' in planned, planned
        elif not SETUP.match(program):
            pytest.fail(f"{command}: neither run nor set up here; mark the block with <!-- not run: REASON -->")


def readme_blocks() -> list[Block]:
    return runnable_blocks(README.read_text()) if README.exists() else []


@pytest.mark.parametrize("block", [pytest.param(block, id=f"line-{block.line}") for block in readme_blocks()])
def test_readme_block_runs(block, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    run_block(block, tmp_path)


def test_readme_shows_how_to_generate():
    assert any("make generate" in command for b in readme_blocks() if b.language in SHELLS for command in commands(b))


@pytest.mark.parametrize(
    ("fence", "expected"),
    [
        ("```bash\nbtlm --help\n```", [Block(3, "bash", "btlm --help\n")]),
        ("```python\nimport btlm\n```", [Block(3, "python", "import btlm\n")]),
        ("```yaml\na: 1\n```", []),
        ("```\nbtlm --help\n```", []),
        ("<!-- not run: needs 6 GB -->\n```bash\nbtlm --help\n```", []),
        ("<!-- not run: needs 6 GB -->\n\n```sh\nbtlm\n```", [Block(5, "sh", "btlm\n")]),
        (
            "<!-- not run: a -->\n\n```sh\nbtlm\n```\n<!-- not run: b -->\n```sh\nbtlm b\n```",
            [Block(5, "sh", "btlm\n")],
        ),
        ("- item\n\n  ```sh\n  btlm\n  ```", [Block(5, "sh", "btlm\n")]),
        ("<!-- a comment -->\n```sh\nbtlm\n```", [Block(4, "sh", "btlm\n")]),
    ],
)
def test_blocks_are_found(fence, expected):
    assert runnable_blocks(f"# Title\n\n{fence}\n\nText.\n") == expected


@pytest.mark.parametrize("comment", ["<!-- not run -->", "<!-- not run: -->", "<!-- not run: . -->"])
def test_an_exemption_needs_a_reason(comment):
    with pytest.raises(ValueError, match="say why"):
        runnable_blocks(f"{comment}\n```bash\nbtlm\n```\n")


def test_commands_of_a_block():
    assert commands(Block(1, "bash", "# why\nbtlm a \\\n  --b\n\nmake x\n")) == ["btlm a    --b", "make x"]
    assert commands(Block(1, "console", "$ btlm a\noutput\n")) == ["btlm a"]


@pytest.mark.parametrize(
    "block",
    [
        Block(1, "bash", "btlm no-such-command\n"),
        Block(1, "bash", "HF_HUB_OFFLINE=1 btlm no-such-command | cat\n"),
        Block(1, "sh", "make no-such-target\n"),
        Block(1, "sh", "curl localhost\n"),
        Block(1, "python", "import btlm\nbtlm.no_such_name\n"),
    ],
)
def test_a_broken_block_fails(block, tmp_path):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_block(block, tmp_path)


@pytest.mark.parametrize(
    "block", [Block(1, "console", "$ btlm --help\nusage: btlm\n"), Block(1, "python", "import btlm\n")]
)
def test_a_working_block_passes(block, tmp_path):
    run_block(block, tmp_path)


@pytest.mark.parametrize("prompt", ["Once", 'say "hi"', "it's", "$HOME costs $5 or $$", "a\\b `ls` #1 (x) & y"])
def test_make_generate_passes_the_prompt_on_as_typed(prompt, tmp_path):
    fake = tmp_path / "btlm"
    fake.write_text("#!/bin/sh\nprintf '%s|' \"$@\"\n")
    fake.chmod(0o755)
    argv = ["make", "-s", "-o", ".venv/.base", "generate", f"BIN={tmp_path}", f"PROMPT={prompt}", "ARGS=--seed 1"]
    assert run(argv, ROOT) == f"generate|{prompt}|--seed|1|"
