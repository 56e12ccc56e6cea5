"""What every parser of the command line is made of."""

from argparse import ArgumentTypeError, RawDescriptionHelpFormatter

from jsonargparse import ArgumentParser


def new_parser(usage: str, description: str, epilog: str | None = None, version: str | None = None) -> ArgumentParser:
    """A parser that raises errors instead of ending the process."""
    return ArgumentParser(
        prog="btlm",
        usage=f"btlm {usage}",
        description=description,
        epilog=epilog,
        version=version,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )


def whole(text: str) -> int:
    """A whole number of the command line."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """A number of the command line."""
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
