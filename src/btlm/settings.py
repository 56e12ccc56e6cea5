"""Settings as dataclasses: the one home of their names, types, ranges, defaults and help.

Recipes, flags and the classes themselves are checked here, by type hints. A field holds a number, a text, a boolean, a
``Literal``, another dataclass, a list, tuple or dictionary of these, or one of them or ``None``. Numbers get limits as
``Annotated[int, Range(1)]``; what help shows in place of a value can be given, as in ``Annotated[str, "FILE"]``. The
help of a field is its text in the section ``Args:`` of the docstring of its class.
"""

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from btlm.errors import OptionError


@dataclass(frozen=True)
class Range:
    """Limits of a number; ``least`` and ``most`` are allowed, ``above`` and ``below`` are not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        if self.least > -math.inf and self.most < math.inf:
            return f"from {self.least:,} to {self.most:,}"
        if self.least > -math.inf and self.below < math.inf:
            return f"in [{self.least:,}, {self.below:,})"
        limits = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {limit:,}" for words, limit in limits.items() if math.isfinite(limit))


# Limits that many settings have.
Whole = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Number = Annotated[float, Range(0)]

# Marks a list that needs an item.
NOT_EMPTY = object()


# Checking


def check(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass, as its ``__post_init__``.

    Args:
        settings: An instance.
        prefix: Key of the section that it is in a recipe.

    Raises:
        OptionError: Names every field whose value does not fit its type.
    """
    problems = []
    for name, hint in hints(type(settings)).items():
        for problem in misfits(hint, getattr(settings, name)):
            problem = problem.replace("{", "{{").replace("}", "}}")
            problems.append(f"{prefix}.{name}{problem}" if prefix else f"{{{name}}}{problem}")
    if problems:
        raise OptionError(f"{'; '.join(problems)}.")


def misfits(hint: Any, value: Any) -> list[str]:
    """What keeps a value from fitting a type, as ends of sentences that begin with its key; nothing where it fits."""
    kind, arguments, *_ = parts_of(hint)
    if kind is dict and isinstance(value, dict):
        keys = []
        if arguments[0] is not str:  # any key can be read as a text
            keys = [f" has the key {key!r}, not {wanted(arguments[0])}" for key in value if not fits(arguments[0], key)]
        return keys + [f" of {key}{problem}" for key, item in value.items() for problem in misfits(arguments[1], item)]
    return [] if fits(hint, value) else [f" is {value!r}, not {wanted(hint)}"]


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a type and within its limits. Lists pass for tuples, and whole numbers for numbers."""
    kind, arguments, marks, optional = parts_of(hint)
    if value is None and optional:
        return True
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if kind in (list, tuple):
        if not isinstance(value, (list, tuple)) or (NOT_EMPTY in marks and not value):
            return False
        items = arguments if kind is tuple and ... not in arguments else arguments[:1] * len(value)
        return len(items) == len(value) and all(map(fits, items, value))
    if kind is dict:
        return isinstance(value, dict) and not misfits(hint, value)
    if kind in (int, float):
        number = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
        inside = number and all(value in mark for mark in marks if isinstance(mark, Range))
        return inside and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def wanted(hint: Any, plural: bool = False) -> str:
    """What a value of a type is, in words."""
    kind, arguments, marks, _ = parts_of(hint)
    if kind is Literal:
        return f"{'any' if plural else 'one'} of {', '.join(map(str, arguments))}"
    if kind in (list, tuple):
        number = {1: "one", 2: "two"}[len(arguments)] if kind is tuple and ... not in arguments else "a list of"
        return f"{number} {wanted(arguments[0], plural=True)}"
    if kind is dict or dataclasses.is_dataclass(kind):
        return f"{getattr(kind, '__name__', '').lower()}s" if plural else "a mapping"
    if kind is bool:
        return "true or false"
    words = {int: "whole number", float: "number", str: "text"}
    limits = "".join(f" {mark}" for mark in marks if isinstance(mark, Range))
    return f"{'' if plural else 'a '}{words[kind]}{'s' * plural}{limits}"


# Reading recipes


def recipe_file(name: Path | str, kind: str = "") -> Path:
    """The file of a recipe.

    Args:
        name: Path of a YAML file, or name of a recipe that comes with btlm, such as ``btlm-tiny``. The path
            ``recipes/btlm-tiny.yaml`` means that recipe where there is no such file.
        kind: Folder of these recipes: ``data`` for those of documents; by default those of training.

    Raises:
        ValueError: There is no such recipe.
    """
    package, path = Path(__file__).parent, Path(name)
    # In an installed package the recipes are a part of it; in the repository they lie beside `src`.
    recipes = package / "recipes" if (package / "recipes").is_dir() else package.parents[1] / "recipes"
    shipped = {file.stem: file for file in sorted((recipes / kind).glob("*.yaml"))}
    named = recipes / path.relative_to("recipes") if path.parts[:1] == ("recipes",) else shipped.get(str(name), path)
    if found := next((file for file in (path, named) if file.is_file()), None):
        return found
    near = did_you_mean_path(path, "*.y*ml") or did_you_mean(path.stem, shipped)
    none = f": there is no such file, and btlm comes with {', '.join(shipped)}."
    raise ValueError(f"{name} is not a readable recipe{near or none}")


def read_yaml(path: Path | str, kind: str = "") -> Any:
    """The content of a recipe, which is given as in :func:`recipe_file`.

    Raises:
        ValueError: It cannot be read, or is no YAML.
    """
    import yaml

    path = recipe_file(path, kind)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable recipe: {' '.join(str(error).split())}.") from error


def apply_changes(raw: Any, changes: dict[str, Any], problems: list[str]) -> None:
    """Set values in the content of a recipe by dotted key (``{"optimizer.lr": 0.01}``); note what cannot be set."""
    for key, value in changes.items():
        *sections, last = key.split(".")
        at = raw
        for i, section in enumerate(sections):
            if isinstance(at, dict):
                if at.get(section) is None:
                    at[section] = {}
                at = at[section]
                if not isinstance(at, dict):
                    whole = ".".join(sections[: i + 1])
                    problems.append(f"{key} cannot be set, since {whole} has no keys: set {whole} as a whole")
        if isinstance(at, dict):
            at[last] = value


def read_fields(cls: Any, raw: Any, problems: list[str], where: str = "") -> dict[str, Any]:
    """The fields of a dataclass from a recipe's content.

    Args:
        cls: The dataclass.
        raw: What YAML holds.
        problems: Receives every problem.
        where: Key of ``raw`` in the recipe.

    Returns:
        Values by name, ``None`` where one cannot be used.
    """
    if not isinstance(raw, dict):
        problems.append(f"{where or 'the content'} is {raw!r}, not a mapping")
        return {}
    prefix = f"{where}." if where else ""
    types_of = hints(cls)
    listed = f"({where or 'a recipe'} has {', '.join(types_of)})"
    problems += [
        f"{prefix}{key} is not a key of a recipe{did_you_mean(key, types_of) or f' {listed}'}"
        for key in raw
        if key not in types_of
    ]
    problems += [
        f"{prefix}{item.name} is missing"
        for item in dataclasses.fields(cls)
        if item.name not in raw and item.default is item.default_factory is dataclasses.MISSING
    ]
    return {name: _read(hint, raw[name], problems, prefix + name) for name, hint in types_of.items() if name in raw}


def _read(hint: Any, value: Any, problems: list[str], where: str) -> Any:
    """A value in the type of its key, or ``None`` with a problem."""
    kind, arguments, _, optional = parts_of(hint)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(kind):
        before = len(problems)
        values = read_fields(kind, value, problems, where)
        if len(problems) > before:
            return None
        try:
            return kind(**values)  # type: ignore[operator]  # a class
        except ValueError as error:
            problems.append(str(error).rstrip("."))
            return None
    if kind is list and dataclasses.is_dataclass(arguments[0]) and isinstance(value, list) and value:
        return [_read(arguments[0], item, problems, f"{where}[{i}]") for i, item in enumerate(value)]
    if found := misfits(hint, value):
        advice = ""  # how YAML wants a number to be written that it took for something else
        if kind is int and isinstance(value, (str, float)):
            advice = " (written out, as in 1_000_000)"
        elif kind is float and isinstance(value, str):
            advice = " (YAML takes 1e-3 for text: write 1.0e-3)"
        problems += [f"{where}{problem}{advice}" for problem in found]
        return None
    return tuple(value) if kind is tuple else value


def did_you_mean(key: object, known: Iterable[str]) -> str:
    """The nearest known key, as the end of a message; empty if there is none."""
    near = _nearest(str(key), known)
    return f": did you mean {near}?" if near else ""


def did_you_mean_path(path: Path, pattern: str = "*") -> str:
    """The path beside ``path`` with the nearest name, as the end of a message; empty if there is none."""
    near = _nearest(path.name, (file.name for file in path.parent.glob(pattern)))
    return f": did you mean {path.with_name(near)}?" if near else ""


def _nearest(name: str, known: Iterable[str]) -> str | None:
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.75)
    return lower[near[0]] if near else None


def plain(settings: Any) -> Any:
    """A dataclass as plain values for YAML and JSON, every key spelled out."""
    if dataclasses.is_dataclass(settings):
        return {item.name: plain(getattr(settings, item.name)) for item in dataclasses.fields(settings)}
    if isinstance(settings, dict):
        return {key: plain(item) for key, item in settings.items()}
    return [plain(item) for item in settings] if isinstance(settings, (list, tuple)) else settings


def to_yaml(settings: Any) -> str:
    """The YAML that :func:`read_fields` reads as the same settings."""
    import yaml

    text: str = yaml.safe_dump(plain(settings), sort_keys=False)
    return text


# What a class says of its fields


def hints(cls: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass, by name."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {item.name: found[item.name] for item in dataclasses.fields(cls)}


def texts(cls: Any) -> dict[str, str]:
    """Help for the fields of a dataclass: what the section ``Args:`` of its docstring says, by name."""
    section = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}


def parts_of(hint: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], bool]:
    """What a type consists of.

    Returns:
        The plain type, such as ``list``; its arguments; what ``Annotated`` says of it; and whether it may be ``None``.
    """
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        kind, inner, _, optional = parts_of(arguments[0])
        return kind, inner, arguments[1:], optional
    if kind in (types.UnionType, typing.Union):
        return *parts_of(arguments[0])[:3], True
    return kind or hint, arguments, (), False
