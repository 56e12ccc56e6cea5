"""The rules of the house (CONTRIBUTING.md) that a program can check."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import btlm

ROOT = Path(__file__).parents[1]

# The rooms that each room may import, beside `model` and the ground files.
GRAPH: dict[str, set[str]] = {
    "data": set(),
    "checkpoint": set(),
    "kernels": set(),
    "train": {"data", "checkpoint"},
    "tune": {"train", "data"},
    "plan": {"train", "checkpoint"},
    "engine": {"kernels", "checkpoint"},
    "convert": {"engine", "checkpoint"},
    "generate": {"engine", "checkpoint"},
    "serve": {"generate", "engine", "checkpoint"},
    "evaluate": {"engine", "checkpoint", "train", "data"},
}
# Files beside the rooms, for every room except `model`; they import one another and `model`.
GROUND = {"registration", "lazy", "files", "console", "plots", "errors", "devices", "settings"}
# What each part of btlm may import. `btlm` is the package itself, which has the version.
MAY_IMPORT = {
    "model": set[str](),
    "btlm": {"model", "lazy", "registration"},
    "__main__": {"cli"},
    "cli": {"btlm", "model", *GROUND, *GRAPH},
    **{name: {"btlm", "model", *GROUND} for name in GROUND},
    **{room: {"btlm", "model", *GROUND, *rooms} for room, rooms in GRAPH.items()},
}
# numpy for the layout of packed weights, which the engine reads without torch.
MODEL_MAY_IMPORT = {*sys.stdlib_module_names, "numpy", "torch", "transformers"}


# Imports


def room_of(module: str) -> str:
    """The room in a module's full name: its second part, or `btlm` for a name in the package itself."""
    second = module.split(".")[1:2]
    return second[0] if second and second[0] in MAY_IMPORT else "btlm"


def imports_of(path: Path, module: str) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Full names of everything a file imports anywhere, also in functions and by `import_module`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import():
                yield from ((node, alias.name) for alias in node.names)
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                yield from ((node, f"{source}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node, name


def import_problems(package: Path) -> list[str]:
    """Violations of the graph of rooms in a source tree of btlm, one line each."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        parts = ["btlm", *path.relative_to(package).with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        room = room_of(module)
        if room == "btlm" and module != "btlm":
            problems.append(f"{module}: in no room")
            continue
        for node, name in imports_of(path, module):
            where = f"{module}:{node.lineno}: {name}"
            if room == "model" and isinstance(node, ast.ImportFrom) and node.level:
                if node.level > 1 or not node.module or "." in node.module:
                    problems.append(f"{where}: not of the form `from .x import y`, which travels in a checkpoint")
            elif room == "model" and name.split(".")[0] not in MODEL_MAY_IMPORT:
                problems.append(f"{where}: model imports numpy, torch, transformers and its own files")
            elif name.split(".")[0] == "btlm" and room_of(name) not in {room, *MAY_IMPORT[room]}:
                problems.append(f"{where}: {room} may not import {room_of(name)}")
    return problems


def test_rooms_import_only_what_the_graph_allows():
    assert import_problems(ROOT / "src/btlm") == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data/a.py", "import btlm.train"),
        ("data/a.py", "from btlm import train"),
        ("data/a.py", "from btlm.train.loop import train"),
        ("data/a.py", "from ..train import loop"),
        ("data/deep/a.py", "from ...engine import cache"),
        ("data/__init__.py", "from ..cli import main"),
        ("data/a.py", "def lazy():\n    from btlm.engine import Engine"),
        ("data/a.py", "import importlib\nimportlib.import_module('btlm.engine')"),
        ("data/a.py", "from btlm import checkpoint"),
        ("checkpoint/a.py", "import btlm.kernels"),
        ("kernels/a.py", "import btlm.engine"),
        ("train/a.py", "import btlm.kernels"),
        ("train/a.py", "from btlm.plan.memory import memory_per_device"),
        ("tune/a.py", "import btlm.checkpoint"),
        ("plan/a.py", "from btlm.data import TokenShards"),
        ("engine/a.py", "from btlm.convert import quantize"),
        ("convert/a.py", "from btlm.data.parts import write_part"),
        ("generate/a.py", "from btlm.train import load_recipe"),
        ("evaluate/a.py", "from btlm.convert.quantize import quantize"),
        ("serve/a.py", "import btlm.evaluate"),
        ("train/a.py", "if TYPE_CHECKING:\n    import btlm.cli"),
        ("files.py", "from btlm.data import TokenShards"),
        ("console.py", "import btlm.train"),
        ("__main__.py", "import btlm.engine"),
        ("__init__.py", "from btlm.data import TokenShards"),
        ("model/a.py", "from btlm.files import whole_file"),
        ("model/a.py", "from ..files import whole_file"),
        ("utils.py", "import math"),
        ("model/a.py", "from btlm.model.alibi import alibi_slopes"),
        ("model/a.py", "from btlm import __version__"),
        ("model/a.py", "from ..data import TokenShards"),
        ("model/a.py", "from . import alibi"),
        ("model/a.py", "from .deep.alibi import alibi_slopes"),
        ("model/a.py", "import scipy"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert len(import_problems(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("model/a.py", "import math\nimport torch\nfrom transformers.utils import logging\nfrom .alibi import slopes"),
        ("__init__.py", "from btlm.model import BTLMConfig"),
        ("data/a.py", "from btlm import __version__\nfrom .shards import TokenShards\nimport btlm.data.documents"),
        ("registration.py", "from btlm.model import BTLMConfig"),
        ("plots.py", "from btlm.files import whole_file"),
        ("kernels/a.py", "from btlm.console import note"),
        ("engine/a.py", "import btlm.kernels\nfrom ..checkpoint import BUNDLED_MODEL"),
        ("evaluate/a.py", "import btlm.engine, btlm.checkpoint, btlm.train, btlm.data"),
        ("cli.py", "from btlm.serve import app\nfrom .evaluate import report"),
    ],
)
def test_an_allowed_import_is_no_problem(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert import_problems(tmp_path) == []


def import_circle(package: Path) -> list[str]:
    """Modules in a source tree of btlm that import one another in a circle, lazy imports included; else empty.

    Imports in a package's ``__init__`` do not count, since it only collects names of the files below it.
    """
    files = {}
    for path in package.rglob("*.py"):
        if path.name != "__init__.py":
            files[".".join(["btlm", *path.relative_to(package).with_suffix("").parts])] = path
    imports = {
        module: {name if name in files else name.rpartition(".")[0] for _, name in imports_of(path, module)}
        & set(files)
        for module, path in files.items()
    }
    while leaves := {module for module, imported in imports.items() if not imported & set(imports)}:
        imports = {module: imported for module, imported in imports.items() if module not in leaves}
    if not imports:
        return []
    way = [min(imports)]  # each remaining module imports another remaining one
    while (following := min(imports[way[-1]] & set(imports))) not in way:
        way.append(following)
    return way[way.index(following) :]


def test_no_modules_import_one_another_in_a_circle():
    assert import_circle(ROOT / "src/btlm") == []


@pytest.mark.parametrize("line", ["from .b import x", "def lazy():\n    from btlm.data import b", "import btlm.data.b"])
def test_a_circle_is_found(tmp_path, line):
    for name, content in (("a", line), ("b", "from .c import x"), ("c", "from . import a"), ("d", "from .a import x")):
        path = tmp_path / f"data/{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    assert sorted(import_circle(tmp_path)) == ["btlm.data.a", "btlm.data.b", "btlm.data.c"]


# Exported names


def packages() -> list[str]:
    return ["btlm", *(m.name for m in pkgutil.walk_packages(btlm.__path__, "btlm.") if m.ispkg)]


def test_btlm_exports_exactly_its_public_names():
    assert btlm.__all__ == ["BTLMConfig", "BTLMLMHeadModel", "BTLMModel", "__version__"]


@pytest.mark.parametrize("name", packages())
def test_all_lists_what_a_package_offers(name):
    package = importlib.import_module(name)
    exported = getattr(package, "__all__", [])
    own = {
        key
        for key, value in vars(package).items()
        if not key.startswith("_")
        and not isinstance(value, ModuleType)
        and (getattr(value, "__module__", None) or "").startswith("btlm")
    }
    assert exported == sorted(set(exported))
    assert own <= set(exported), "public in the package and missing from its __all__"
    for key in exported:
        assert hasattr(package, key)
        assert not isinstance(getattr(package, key), ModuleType), "modules are imported by their path"
        assert not key.startswith("_") or key == "__version__"


# Files

# Assembled from parts, so that this file does not contain the text that it looks for.
HOMES = "|".join(["work", "root", "Users"])
SOURCES = "|".join("-".join(words) for words in [("index", "url"), ("find", "links"), ("trusted", "host")])
LEAK = re.compile(rf"(?<![\w.-])/(?:(?:{HOMES})/|home/\w)|--(?:extra-)?(?:{SOURCES})".encode())


def leaks(content: bytes) -> list[str]:
    """Paths on one person's machine, and package sources that others do not have."""
    return [match.group().decode() for match in LEAK.finditer(content)]


def test_no_file_names_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    if not files:
        pytest.skip("nothing is tracked yet")
    found = {str(path.relative_to(ROOT)): leaks(path.read_bytes()) for path in files if path.is_file()}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "parts",
    [
        ("see /", "work/main"),
        ('open("/', 'root/model")'),
        ("/", "home/alice/btlm"),
        ("pip install --", "index-url https://example.org"),
        ("pip install --extra-", "index-url https://example.org"),
        ("pip install --find", "-links wheels"),
    ],
)
def test_a_machine_name_is_found(parts):
    assert leaks("".join(parts).encode())


@pytest.mark.parametrize("text", ["https://example.org/work/1", "net/work/x", "~/models", "/home/", "--find links"])
def test_other_text_is_no_machine_name(text):
    assert leaks(text.encode()) == []


# Messages

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# Arguments of other programs.
OTHER_FLAGS = {"--noheader", "--job"}


def flags(path: Path) -> list[str]:
    """Command line flags in the strings and docstrings of a file."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [flag for string in strings for flag in FLAG.findall(string) if flag not in OTHER_FLAGS]


def test_only_the_command_line_names_its_flags():
    files = [path for path in (ROOT / "src/btlm").rglob("*.py") if path.parent.name != "cli"]
    assert {path.name: found for path in files if (found := flags(path))} == {}


@pytest.mark.parametrize(
    "line", ["raise ValueError('use --threads 2')", 'f"{x} --max-new-tokens"', '"""See --plan."""']
)
def test_a_flag_is_found(tmp_path, line):
    (tmp_path / "a.py").write_text(line)
    assert len(flags(tmp_path / "a.py")) == 1


def test_changelog_covers_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings
    assert headings[0] in {"Unreleased", btlm.__version__}
