"""What the tests of the playground do and read on the page."""

from typing import Any

from tests.serve.playground.stand_in import TEXT

NAMES = [name for name, *_ in TEXT]


def generate(page: Any, prompt: str = "Albert Einstein was known for") -> None:
    """Ask for a continuation and wait for its end."""
    page.fill("#prompt", prompt)
    page.click("#generate")
    finished(page)


def finished(page: Any) -> None:
    """Wait for the end of the continuation that is being written."""
    page.locator("#stop").wait_for(state="hidden")


def text_of(page: Any) -> str:
    """The continuation on the page."""
    text: str = page.locator("#tokens").evaluate("node => node.textContent")
    return text


def plain(names: list[str]) -> str:
    """The text of tokens of the stand-in."""
    return "".join(names).replace("bytes:\\xe2\\x82", "").replace("bytes:\\xac", "€")
