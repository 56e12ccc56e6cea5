"""The playground's errors, copies, looks and speed."""

import ast
import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.serve.playground.actions import generate
from tests.serve.playground.stand_in import PAGE, TEXT

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect
pytestmark = pytest.mark.slow

AXE = [
    Path(spec.origin).parent / "axe.min.js"
    for name in ("axe_playwright_python", "axe_core_python")
    if (spec := find_spec(name)) and spec.origin
]
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1440, "height": 900}


# Errors


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("refusal", "max_tokens must be at most 8192.", "max_tokens must be at most 8192."),
        ("fails_after", 3, "The engine ran out of memory."),
        ("breaks_after", 3, "The connection ended before the text was complete."),
    ],
)
def test_an_error_is_shown_and_gone_with_the_next_text(page, server, setting, value, message):
    setattr(server, setting, value)
    generate(page)
    expect(page.locator("#error")).to_have_text(message)
    assert page.locator(".token").count() == (0 if setting == "refusal" else 3)
    setattr(server, setting, None)
    generate(page)
    expect(page.locator("#error")).to_be_hidden()


def test_wrong_settings_are_named_and_send_nothing(page, server):
    page.click("#more summary")
    page.fill("#top_k", "1.5")
    page.click("#more summary")  # the error opens it again
    generate(page)
    expect(page.locator("#error")).to_have_text("Top-k must be a whole number from 0 to 50257.")
    expect(page.locator("#top_k")).to_be_focused()
    page.fill("#top_k", "0")
    page.select_option("#form", "schema")
    page.fill("#form-text", "{")
    generate(page)
    expect(page.locator("#error")).to_contain_text("The JSON schema is not valid JSON")
    assert server.requests == []


def test_an_api_key_is_asked_for_and_kept_in_the_tab(open_page, server):
    server.key = "s3cret"
    page = open_page()
    expect(page.locator("#error")).to_have_text("This server needs an API key.")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#error")).to_have_text("The server does not accept this API key.")
    page.fill("#key", "s3cret")
    page.keyboard.press("Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#warning")).to_contain_text("without sense")
    generate(page)
    assert page.locator(".token").count() == len(TEXT)
    assert page.evaluate("[sessionStorage['api-key'], localStorage.length]") == ["s3cret", 0]
    page.click("#copy-curl")
    expect(page.locator("#status")).to_have_text("Copied the curl command")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "s3cret" not in copied
    assert '-H "Authorization: Bearer $API_KEY"' in copied


def test_readiness_is_shown(open_page, server):
    server.ready = False
    page = open_page()
    expect(page.locator("#ready")).to_have_text("not ready yet")
    server.ready = True
    expect(page.locator("#ready")).to_have_text("ready")


# Copies


def test_requests_are_copied_as_programs(page, server):
    prompt = 'It\'s "here": \\ $HOME `x`\né😀'
    page.fill("#prompt", prompt)
    page.select_option("#form", "json")
    page.click("#copy-curl")
    expect(page.locator("#status")).to_have_text("Copied the curl command")
    command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert command[:2] == ["curl", f"{server.url}v1/completions"]
    fields = {"model": "btlm-tiny", "prompt": prompt, "max_tokens": 200, "temperature": 0.8, "top_p": 0.95}
    form = {"response_format": {"type": "json_object"}}
    assert json.loads(command[command.index("-d") + 1]) == {**fields, **form}
    page.click("#copy-python")
    expect(page.locator("#status")).to_have_text("Copied the Python program")
    program = ast.parse(page.evaluate("navigator.clipboard.readText()"))
    calls = [node for node in ast.walk(program) if isinstance(node, ast.Call) and len(node.keywords) > 3]
    sent = {word.arg: ast.literal_eval(word.value) for word in calls[0].keywords}
    assert sent == {**fields, "extra_body": form}


# The page


def test_the_page_is_one_file_without_handlers_in_attributes():
    page = PAGE.read_text()
    for forbidden in ("innerHTML", "eval(", " style=", " onclick=", "http://", "https://", "@import"):
        assert forbidden not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.skipif(not AXE, reason="needs axe-playwright-python or axe-core-python")
def test_axe_finds_nothing(open_page, server, viewport, scheme):
    page = open_page(viewport, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.evaluate(AXE[0].read_text())

    def violations():
        found = page.evaluate("axe.run().then(({violations}) => violations)")
        return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]

    assert violations() == []
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    generate(page)
    page.locator(".token").nth(3).click()
    expect(page.locator("#popover")).to_be_visible()
    assert violations() == []
    server.refusal = "No."
    page.keyboard.press("Escape")
    page.click("#theme")
    page.select_option("#form", "schema")
    generate(page)
    assert violations() == []


def test_the_chosen_theme_is_remembered(open_page):
    page = open_page(color_scheme="light")
    color = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(color)
    page.click("#theme")
    dark = page.evaluate(color)
    assert light != dark
    page.reload()
    assert page.evaluate(color) == dark


def test_eight_thousand_tokens_are_divided_into_blocks_that_do_not_show(page, server):
    server.text = [(f" w{i}", 0.5, {" a": 0.2, " b": 0.1}) for i in range(8000)]
    page.fill("#max_tokens", "8192")
    page.click("#generate")
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    assert page.locator(".token").count() == 8000
    # So that the browser lays out only the last part anew, the text is divided into blocks. That must not show.
    assert page.locator("#tokens > div").count() > 1
    places = "() => tokens.map(({node}) => { const {left, top} = node.getBoundingClientRect(); return [left, top]; })"
    divided = page.evaluate(places)
    page.evaluate("joinBlocks()")
    assert page.locator("#tokens > div").count() == 1
    assert page.evaluate(places) == divided
