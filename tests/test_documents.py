"""The commands that documents name exist, with their options. Those of the README also run, in test_readme.py."""

import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

from btlm.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/RESULTS.md"]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def commands(start: str) -> list[str]:
    """What begins with ``start`` in code blocks, on a line of its own or after ``&&``, and between backticks."""
    found = set()
    for document in DOCUMENTS:
        prose, *blocks = re.split(r"^```.*$", document.read_text().replace("\\\n", " "), flags=re.MULTILINE)
        code = "\n".join(blocks[::2])
        prose = "\n".join([prose, *blocks[1::2]])
        found |= set(re.findall(rf"(?:^|&& )({start}[^\n]*)", code, re.MULTILINE))
        found |= set(re.findall(rf"`({start}[^`\n]*)", prose))
    assert len(found) > 10
    return sorted(found)


@cache
def help_of(*command: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return output.getvalue()


@pytest.mark.parametrize("command", commands("btlm (?:data )?[a-z][a-z-]+"))
def test_a_command_of_btlm(command: str) -> None:
    words = command.split()
    shown = help_of(*words[1 : 3 if words[1] == "data" else 2])
    assert shown.startswith("usage: ")
    assert set(OPTION.findall(command)) <= set(OPTION.findall(shown))


@pytest.mark.parametrize("command", commands(r"(?:\w+=\S+ )?python benchmarks/"))
def test_a_command_of_benchmarks(command: str) -> None:
    script = command.split("python ")[1].split()[0]
    text = (ROOT / script).read_text()
    assert "__main__" in text
    for option in OPTION.findall(command):
        assert f'"{option}"' in text or (option == "--smoke" and "add_smoke(parser)" in text)
