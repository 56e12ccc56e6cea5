"""Flags from dataclasses: names, types, defaults and help stand in the classes of :mod:`btlm.settings`.

A field ``new_tokens`` is the flag ``--new-tokens``; a key of a recipe, ``mix.min_holdout``, is ``--mix.min_holdout``.
A list is written with commas, and a mapping as in YAML: ``--contexts 512,2048 --mix.weights 'Books: 2, Web: 0.5'``.
"""

from argparse import SUPPRESS, ArgumentError, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from btlm.errors import OptionError
from btlm.settings import did_you_mean, hints, parts_of, texts, wanted

T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """Where to compute.

    Args:
        device: Device of torch, or auto, which is a GPU if there is one.
    """

    device: Annotated[str, "DEVICE"] = "auto"


class Parser(ArgumentParser):
    """A parser that raises errors instead of ending the process.

    Args:
        usage: Names and arguments of the command.
        description: What it does.
        examples: Command lines, indented by two spaces.
    """

    def __init__(self, usage: str, description: str, examples: str = "") -> None:
        epilog = f"examples:\n{examples}" if examples else None
        super().__init__(
            "btlm", usage, description, epilog, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter
        )

    def add_model(self) -> None:
        """Add the argument ``model``."""
        self.add_argument("model", metavar="MODEL", help="checkpoint folder, folder of adapters, or Hugging Face id")

    def add_texts(self) -> None:
        """Add the argument ``texts``."""
        kinds = "text file, which is one document, JSON lines, Parquet, or folder of such"
        self.add_argument("texts", nargs="+", metavar="TEXT", help=kinds)

    def add_options(self, cls: type, title: str = "", prefix: str = "", flags: Mapping[str, str] | None = None) -> Any:
        """Add a flag for every field of a dataclass.

        Args:
            cls: The dataclass.
            title: Heading of these flags in the help.
            prefix: Key of the section that the class is in a recipe, whose flags are named by their keys.
            flags: Names of flags that are not made from the name of the field, by field.

        Returns:
            What further arguments can be added to.
        """
        group = self.add_argument_group(title) if title else self
        help_of, types_of = texts(cls), hints(cls)
        for item in fields(cls):
            key = f"{prefix}.{item.name}" if prefix else item.name
            flag = (flags or {}).get(item.name) or flag_of(key)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            text = help_of.get(item.name, "")
            text = text[:1].lower() + text[1:].rstrip(".")
            if "(default" not in text and types_of[item.name] is not bool:
                text += " (required)" if default is MISSING else f" (default: {_shown(default)})"
            shared: dict[str, Any] = {"dest": key, "default": SUPPRESS, "help": text.replace("%", "%%")}
            if types_of[item.name] is bool:
                group.add_argument(flag, action="store_true", **shared)
            else:
                reader, metavar = _reader(types_of[item.name]), _metavar(types_of[item.name])
                group.add_argument(flag, type=reader, metavar=metavar, required=default is MISSING, **shared)
        return group

    def parse(self, argv: Sequence[str]) -> Namespace:
        """The arguments of a command line.

        Raises:
            ArgumentError: It has a mistake.
        """
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = did_you_mean(unknown[0].partition("=")[0], known) if len(unknown) <= 2 else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return arguments

    def error(self, message: str) -> NoReturn:
        """Called by :mod:`argparse` with every mistake."""
        raise ArgumentError(None, message)


def flag_of(name: str) -> str:
    """The flag of a field, or of a key of a recipe."""
    return f"--{name if '.' in name else name.replace('_', '-')}"


def options_of(cls: type[T], arguments: Namespace, flags: Mapping[str, str] | None = None) -> T:
    """The dataclass of the flags that :meth:`Parser.add_options` made of it without a prefix.

    Raises:
        ValueError: A value cannot be used; the message names its flag.
    """
    try:
        return cls(**given(arguments, hints(cls)))
    except OptionError as error:
        raise ValueError(error.text(lambda name: (flags or {}).get(name) or flag_of(name))) from error


def given(arguments: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of some arguments that were given."""
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def choose(
    argv: list[str],
    prog: str,
    description: str,
    commands: Mapping[str, str],
    run: Callable[[str, list[str]], None],
    version: str = "",
) -> None:
    """Run one of several commands.

    Args:
        argv: Name of the command, and its arguments.
        prog: What stands before the name on the command line.
        description: What the commands are for.
        commands: What each does, by name.
        run: Called with the name and the arguments.
        version: Answer to ``--version``.
    """
    if argv and not argv[0].startswith("-"):
        if argv[0] not in commands:
            remedy = did_you_mean(argv[0], commands) or f" (choose from {', '.join(commands)})"
            raise ArgumentError(None, f"{argv[0]!r} is not a command{remedy}")
        run(argv[0], argv[1:])
        return
    width = max(map(len, commands))
    listed = "\n".join(f"    {name:{width}}  {text}" for name, text in commands.items())
    parser = Parser(f"{prog} COMMAND ...", description)
    parser.epilog = f"commands:\n{listed}"
    if version:
        parser.add_argument("--version", action="version", version=f"btlm {version}", help="show the version and exit")
    parser.parse(argv or ["--help"])
    raise ArgumentError(None, "the following arguments are required: COMMAND")


# Types


def _reader(hint: Any) -> Callable[[str], Any]:
    """What makes a value of the text after a flag. Limits are checked later, by the dataclass."""
    kind, arguments, *_ = parts_of(hint)
    if kind is Literal:
        return lambda text: next((choice for choice in arguments if str(choice) == text), text)
    if kind in (list, tuple):
        item = _reader(arguments[0])
        return lambda text: kind(map(item, _items(text)))
    if kind is dict:
        return lambda text: _yaml(text, mapping=True)
    if kind in (int, float):

        def number(text: str) -> Any:
            try:
                return kind(text)
            except ValueError:
                raise ArgumentTypeError(f"{text!r} is not {wanted(hint)}") from None

        return number
    return str


def _items(text: str) -> list[str]:
    """The items of a list, with commas between them; in brackets, as in YAML, they may be quoted."""
    return list(map(str, _yaml(text))) if text.startswith("[") else [part.strip() for part in text.split(",")]


def _yaml(text: str, mapping: bool = False) -> Any:
    import yaml

    try:
        return yaml.safe_load(f"{{{text}}}" if mapping and not text.startswith("{") else text)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"{text!r} is not YAML ({' '.join(str(error).split())})") from error


def _metavar(hint: Any) -> str:
    """What stands for a value in the help: a mark of its type, or a letter by its kind."""
    kind, arguments, marks, _ = parts_of(hint)
    if named := [mark for mark in marks if isinstance(mark, str)]:
        return named[0]
    if kind is Literal:
        return "|".join(map(str, arguments))
    if kind in (list, tuple):
        fixed = kind is tuple and ... not in arguments
        return ",".join(map(_metavar, arguments)) if fixed else f"{_metavar(arguments[0])},..."
    return {int: "N", float: "X", dict: "KEY: VALUE,..."}.get(kind, "TEXT")


def _shown(default: Any) -> str:
    """A default as it would be given."""
    if isinstance(default, (list, tuple)):
        return ",".join(map(_shown, default)) or "none"
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, int):
        return f"{default:_}" if default >= 100_000 else str(default)
    return str(default) if default else "none"
