"""What the documents name exists: links, paths, names in btlm, commands and their options."""

import contextlib
import importlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from btlm.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path for folder in (".", "docs", "benchmarks", "src/btlm/checkpoint/*") for path in ROOT.glob(f"{folder}/*.md")
]

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w./-])(?:src|tests|docs|deploy|benchmarks|examples|recipes)/[\w./-]*\w")
NAME = re.compile(r"\bbtlm(?:\.[a-zA-Z_]\w*)+(?=\W|$)")
COMMAND = re.compile(r"(?:^|\s)(btlm|python (?:benchmarks|examples)/\w+\.py) +([^#|<>]*)")


def link_problem(document: Path, target: str, heading: str) -> str | None:
    """Why a relative link leads nowhere, if so."""
    path = document.parent / target if target else document
    if not path.exists():
        return f"{target} does not exist"
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if heading else []
    slugs = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
    return f"{target} has no heading #{heading}" if heading and heading not in slugs else None


def name_problem(name: str) -> str | None:
    """Why a dotted name in btlm leads nowhere, if so."""
    found, module = importlib.import_module("btlm"), "btlm"
    for part in name.split(".")[1:]:
        module = f"{module}.{part}"
        if not hasattr(found, part):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module)
        if not hasattr(found, part):
            return f"{name} does not exist"
        found = getattr(found, part)
    return None


@cache
def known_options(program: str) -> set[str] | None:
    """Options in the help of a `btlm` command, or in the source of a script; None if there is no such program."""
    if program.startswith("python"):
        path = ROOT / program.split()[1]
        text = path.read_text().replace("add_smoke(parser)", "--smoke") if path.exists() else None
        return None if text is None else set(re.findall(r"--[\w-]+", text))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main([*program.split()[1:], "--help"])
        except SystemExit as end:
            status = 2 if end.code else 0
    return set(re.findall(r"--\w[\w.-]*", output.getvalue())) if status == 0 else None


def command_problem(program: str, arguments: str) -> str | None:
    """Which part of a command line is unknown, if any."""
    words = shlex.split(arguments)
    while program in {"btlm", "btlm data"} and words and not words[0].startswith("-"):
        program = f"{program} {words.pop(0)}"
    used = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
    known = known_options(program)
    if known is None:
        return f"{program} does not exist"
    return f"{program} has no option {' '.join(sorted(used - known))}" if used - known else None


def problems_of(document: Path, text: str) -> list[str]:
    """What a document names and the repository does not have."""
    problems = [link_problem(document, *link) for link in LINK.findall(text)]
    for block, span in CODE.findall(text):
        block = re.sub(r"from (btlm[\w.]*) import (\w+)", r"\1.\2", block.replace("\\\n", " "))
        for line in block.splitlines() or [" ".join(span.split())]:
            problems += [f"{path} does not exist" for path in PATH.findall(line) if not (ROOT / path).exists()]
            problems += [name_problem(name) for name in NAME.findall(line)]
            problems += [command_problem(*command) for command in COMMAND.findall(line)]
    return [problem for problem in problems if problem]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_exists(document):
    assert problems_of(document, document.read_text()) == []


MISSING = """[x](none.md); [x](README.md#none); `src/btlm/infer`; `btlm.infer.gguf`; `btlm.engine.Motor`; `btlm x`;
`btlm info --x`; ```sh\nbtlm data \\\n x a\n```; `python benchmarks/x.py`; `python benchmarks/engine.py --x`"""


@pytest.mark.parametrize("text", MISSING.replace(";\n", "; ").split("; "))
def test_what_does_not_exist_is_found(text):
    assert len(problems_of(ROOT / "README.md", text)) >= 1
