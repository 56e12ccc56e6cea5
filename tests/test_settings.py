import dataclasses
import shutil
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from btlm.cli.options import Device
from btlm.convert.options import GGUF, QuantizeOptions
from btlm.data.recipe import Clean, Dedup, Execution, Inspection, Mix, Read
from btlm.engine.options import GenerationOptions
from btlm.errors import OptionError
from btlm.evaluate.options import Bench
from btlm.generate.options import Run
from btlm.plan.options import Hardware
from btlm.settings import (
    NOT_EMPTY,
    Count,
    Number,
    Range,
    apply_changes,
    check,
    did_you_mean,
    fits,
    plain,
    read_fields,
    read_yaml,
    recipe_file,
    texts,
    to_yaml,
    wanted,
)
from btlm.tune.options import CoordCheck, Search, SearchSpace

OPTIONS = [Read, Clean, Dedup, Mix, Execution, Inspection, GenerationOptions, Run, Bench, QuantizeOptions, GGUF]
OPTIONS += [Hardware, CoordCheck, Search, SearchSpace, Device]


@dataclass(frozen=True)
class Part:
    """A part.

    Args:
        size: Size in ``bytes``,
            on two lines.
        kind: Kind: with a colon.

    Raises:
        OptionError: Not a field.
    """

    size: Count
    kind: Literal["round", "square"] = "round"

    def __post_init__(self) -> None:
        check(self, "part")
        if self.kind == "square" and self.size == 1:
            raise ValueError("part.size of a square is above 1.")


@dataclass(frozen=True)
class Whole:
    part: Part
    parts: Annotated[list[Part], NOT_EMPTY] = field(default_factory=lambda: [Part(1)])
    shares: tuple[Annotated[float, Range(0, below=1)], Annotated[float, Range(0, below=1)]] = (0.0, 0.5)
    names: tuple[str, ...] = ()
    weights: dict[str, Number] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    on: bool = False
    note: str | None = None


def read(raw: Any) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    return read_fields(Whole, raw, problems), problems


def test_values_are_read_in_their_types() -> None:
    raw: dict[str, Any] = {
        "part": {"size": 2},
        "parts": [{"size": 1, "kind": "round"}],
        "shares": [0, 0.25],
        "names": ["a", "b"],
    }
    raw |= {"weights": {"a": 2}, "free": {7: None}, "on": True, "note": None}
    values, problems = read(raw)
    assert problems == []
    whole = Whole(**values)
    assert whole == Whole(Part(2), [Part(1)], (0, 0.25), ("a", "b"), {"a": 2}, {7: None}, on=True)  # type: ignore[dict-item]
    assert read(yaml.safe_load(to_yaml(whole))) == (values, [])
    assert plain(whole)["names"] == ["a", "b"]
    assert list(yaml.safe_load(to_yaml(whole))) == [item.name for item in dataclasses.fields(Whole)], "in their order"


def test_every_problem_is_found_and_what_can_be_read_is() -> None:
    raw = {
        "part": {"size": 0, "kin": "round"},
        "parts": [{"size": 1}, {"size": 1, "kind": "square"}, {"kind": "oval"}, 3],
        "shares": [0, 1.0],
        "weights": {"a": -1, "b": 1, "c": "{x}"},
        "note": 3,
        "name": [],
        "on": True,
    }
    values, problems = read(raw)
    assert sorted(problems) == sorted(
        [
            "part.kin is not a key of a recipe: did you mean kind?",
            "part.size is 0, not a whole number of at least 1",
            "part.size of a square is above 1",
            "parts[2].size is missing",
            "parts[2].kind is 'oval', not one of round, square",
            "parts[3] is 3, not a mapping",
            "shares is [0, 1.0], not two numbers in [0, 1)",
            "weights of a is -1, not a number of at least 0",
            "weights of c is '{x}', not a number of at least 0",
            "note is 3, not a text",
            "name is not a key of a recipe: did you mean names?",
        ]
    )
    assert (values["part"], values["parts"], values["on"]) == (None, [Part(1), None, None, None], True)


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (int, [0, -3], [True, 1.0, "1", None], "a whole number"),
        (float, [0, -3, 1.5, 10**400], [True, "1", None, float("nan"), float("inf")], "a number"),
        (Count, [1, 10**9], [0, -1, 1.0], "a whole number of at least 1"),
        (Annotated[int, Range(1, 1024)], [1, 1024], [0, 1025], "a whole number from 1 to 1,024"),
        (Annotated[float, Range(0, below=1)], [0, 0.99], [1, 1.0, -0.1], "a number in [0, 1)"),
        (Annotated[float, Range(above=0, most=1)], [0.1, 1], [0, 1.1], "a number above 0 and at most 1"),
        (Annotated[float, Range(above=0, below=1)], [0.1], [0, 1], "a number above 0 and below 1"),
        (str | None, ["", "a", None], [1, ["a"]], "a text"),
        (bool, [True, False], [1, 0, "true"], "true or false"),
        (Literal[4, 8], [4, 8], [4.0, True, 5, "4"], "one of 4, 8"),
        (list[str], [[], ["a"], ("a",)], ["a", [1], {"a": 1}], "a list of texts"),
        (Annotated[list[Part], NOT_EMPTY], [[Part(1)]], [[], Part(1)], "a list of parts"),
        (tuple[Count, ...], [(), (1, 2)], [1, (0,)], "a list of whole numbers of at least 1"),
        (tuple[float, float], [(1, 2.0)], [(1,), (1, 2, 3)], "two numbers"),
        (tuple[Literal["a", "b"], ...], [("a", "b")], [("c",)], "a list of any of a, b"),
        (dict[str, Any], [{}, {"a": None}], [[], None], "a mapping"),
    ],
)
def test_types_and_limits(hint: Any, good: list[Any], bad: list[Any], words: str) -> None:
    assert [value for value in good if not fits(hint, value)] == []
    assert [value for value in bad if fits(hint, value)] == []
    assert wanted(hint) == words


def test_a_class_that_checks_itself_names_its_fields() -> None:
    with pytest.raises(ValueError, match=r"^part\.size is 'x', not a whole number of at least 1; part\.kind is"):
        Part("x", "{oval}")  # type: ignore[arg-type]
    with pytest.raises(OptionError) as caught:
        GenerationOptions(top_k=0, num_beams="{4}")  # type: ignore[arg-type]
    told = "num_beams is '{4}', not a whole number of at least 1; top_k is 0, not a whole number of at least 1."
    assert str(caught.value) == told
    assert caught.value.text(str.upper) == told.replace("num_beams", "NUM_BEAMS").replace("top_k", "TOP_K")


def test_the_nearest_key() -> None:
    assert did_you_mean("bandz", ["rows", "bands"]) == ": did you mean bands?"
    assert did_you_mean("colour", ["rows", "bands"]) == ""
    assert did_you_mean(7, ["rows"]) == ""
    assert did_you_mean("BANDZ", ["rows", "Bands"]) == ": did you mean Bands?"


def test_changes_of_what_is_no_mapping_are_passed_over() -> None:
    problems: list[str] = []
    apply_changes(None, {"a.b": 1}, problems)
    apply_changes(raw := {"a": None, "b": 3}, {"a.b.c": 1, "b.c": 2}, problems)
    assert (raw, problems) == (
        {"a": {"b": {"c": 1}}, "b": 3},
        ["b.c cannot be set, since b has no keys: set b as a whole"],
    )


def test_help_is_that_of_the_docstring() -> None:
    assert texts(Part) == {"size": "Size in bytes, on two lines.", "kind": "Kind: with a colon."}


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_every_option_is_described(cls: Any) -> None:
    assert list(texts(cls)) == [item.name for item in dataclasses.fields(cls)], "in the order of the class"


@pytest.mark.parametrize("cls", [cls for cls in OPTIONS if cls is not Search], ids=lambda cls: cls.__name__)
def test_defaults_fit_their_types(cls: Any) -> None:
    check(cls())


@pytest.mark.parametrize("kind", ["", "data"])
def test_recipes_that_come_with_btlm_are_known_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipes = Path(__file__).parents[1] / "recipes"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "btlm-tiny").mkdir()  # a folder of that name, such as a model, is none
    names = [file.stem for file in (recipes / kind).glob("*.yaml")]
    assert "btlm-tiny" in names
    for name in names:
        assert recipe_file(name, kind) == recipes / kind / f"{name}.yaml"
        assert recipe_file(Path("recipes", kind, f"{name}.yaml"), kind) == recipes / kind / f"{name}.yaml"
    # A file of one's own comes first.
    (tmp_path / "recipes" / kind).mkdir(parents=True)
    for own in (Path("continue"), Path("recipes", kind, "btlm-tiny.yaml")):
        own.write_text("seed: 3")
        assert (recipe_file(own, kind), read_yaml(own, kind)) == (own, {"seed": 3})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("btlm-tny", r"^btlm-tny is not a readable recipe: did you mean btlm-tiny\?$"),
        ("mine.yml", r"^mine.yml is not a readable recipe: did you mean mine.yaml\?$"),
        ("x", "^x is not a readable recipe: there is no such file, and btlm comes with btlm-3b, .*, lora.$"),
        ("here/mine.yml", r"^here/mine.yml is not a readable recipe: there is no such file"),
        ("recipes/btlm-tny.yaml", r"^recipes/btlm-tny.yaml is not a readable recipe: did you mean btlm-tiny\?$"),
        ("recipes/absent.yaml", "^recipes/absent.yaml is not a readable recipe: there is no such file"),
        ("slimpajama", "^slimpajama is not a readable recipe: there is no such file"),  # one of data
        (".", "^. is not a readable recipe"),
    ],
)
def test_a_recipe_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ValueError, match=message):
        read_yaml(name)


def test_recipes_are_a_part_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert pyproject["tool"]["scikit-build"]["wheel"]["packages"] == {"btlm": "src/btlm", "btlm/recipes": "recipes"}
    # As in a wheel: they lie beside the modules.
    installed = tmp_path / "site-packages/btlm"
    shutil.copytree(Path(__file__).parents[1] / "recipes", installed / "recipes")
    monkeypatch.setattr("btlm.settings.__file__", str(installed / "settings.py"))
    assert recipe_file("btlm-3b") == installed / "recipes/btlm-3b.yaml"
    assert recipe_file("slimpajama", "data") == installed / "recipes/data/slimpajama.yaml"
