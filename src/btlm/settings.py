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
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        item_hint = typing.get_args(hint)[1]
        return [f" of {key}{problem}" for key, item in value.items() for problem in misfits(item_hint, item)]
    return [] if fits(hint, value) else [f" is {value!r}, not {wanted(hint)}"]


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a type and within its limits. Lists pass for tuples, and whole numbers for numbers."""
    hint, marks = unmarked(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return value is None or fits(arguments[0], value)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)) or (NOT_EMPTY in marks and not value):
            return False
        items = arguments if origin is tuple and ... not in arguments else arguments[:1] * len(value)
        return len(items) == len(value) and all(map(fits, items, value))
    if origin is dict:
        return isinstance(value, dict) and all(fits(arguments[1], item) for item in value.values())
    if hint in (int, float):
        number = isinstance(value, int) or (hint is float and isinstance(value, float) and math.isfinite(value))
        return (
            number and not isinstance(value, bool) and all(value in mark for mark in marks if isinstance(mark, Range))
        )
    return hint is Any or isinstance(value, hint)


def wanted(hint: Any, plural: bool = False) -> str:
    """What a value of a type is, in words."""
    hint, marks = unmarked(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return wanted(arguments[0], plural)
    if origin is Literal:
        return f"{'any' if plural else 'one'} of {', '.join(map(str, arguments))}"
    if origin in (list, tuple):
        if origin is tuple and ... not in arguments:
            return f"{('no', 'one', 'two', 'three')[len(arguments)]} {wanted(arguments[0], plural=True)}"
        return f"a list of {wanted(arguments[0], plural=True)}"
    if origin is dict:
        return "a mapping"
    if dataclasses.is_dataclass(hint):
        return f"{getattr(hint, '__name__', '').lower()}s" if plural else "a mapping"
    words = {int: "whole number", float: "number", str: "text"}
    limits = "".join(f" {mark}" for mark in marks if isinstance(mark, Range))
    return "true or false" if hint is bool else f"{'' if plural else 'a '}{words[hint]}{'s' * plural}{limits}"


# Reading recipes


def read_yaml(path: Path | str) -> Any:
    """The content of a recipe.

    Raises:
        ValueError: It cannot be read, or is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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
    problems += [f"{prefix}{name} is missing" for name in required(cls) if name not in raw]
    return {name: _read(hint, raw[name], problems, prefix + name) for name, hint in types_of.items() if name in raw}


def _read(hint: Any, value: Any, problems: list[str], where: str) -> Any:
    """A value in the type of its key, or ``None`` with a problem."""
    marked, (hint, _) = hint, unmarked(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(arguments[0], value, problems, where)
    if dataclasses.is_dataclass(hint):
        before = len(problems)
        values = read_fields(hint, value, problems, where)
        if len(problems) > before:
            return None
        try:
            return hint(**values)  # type: ignore[operator]  # a class
        except ValueError as error:
            problems.append(str(error).rstrip("."))
            return None
    if origin is list and dataclasses.is_dataclass(arguments[0]) and isinstance(value, list) and value:
        return [_read(arguments[0], item, problems, f"{where}[{i}]") for i, item in enumerate(value)]
    if found := misfits(marked, value):
        problems += [f"{where}{problem}{_how_to_write(hint, value)}" for problem in found]
        return None
    return tuple(value) if origin is tuple else value


def _how_to_write(hint: Any, value: Any) -> str:
    """How YAML wants a number to be written that it took for something else."""
    if hint is int and isinstance(value, (str, float)):
        return " (written out, as in 1_000_000)"
    return " (YAML takes 1e-3 for text: write 1.0e-3)" if hint is float and isinstance(value, str) else ""


def did_you_mean(key: object, known: Iterable[str]) -> str:
    """The nearest known key, as the end of a message; empty if there is none."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.75)
    return f": did you mean {near[0]}?" if near else ""


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


def required(cls: Any) -> list[str]:
    """Fields that have no default."""
    return [
        item.name
        for item in dataclasses.fields(cls)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]


def texts(cls: Any) -> dict[str, str]:
    """Help for the fields of a dataclass: what the section ``Args:`` of its docstring says, by name."""
    section = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}


def unmarked(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without what ``Annotated`` says of it, and that."""
    if typing.get_origin(hint) is Annotated:
        hint, *marks = typing.get_args(hint)
        return hint, tuple(marks)
    return hint, ()
