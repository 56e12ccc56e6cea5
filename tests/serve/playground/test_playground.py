"""The playground writes text token by token, and goes on from any token."""

from typing import Any

import pytest

from tests.serve.playground.actions import NAMES, finished, generate, plain, text_of
from tests.serve.playground.stand_in import TEXT

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect
pytestmark = pytest.mark.slow

# Streaming


def test_text_streams_token_by_token(page, server):
    server.pause = 0.05
    page.fill("#prompt", "Albert Einstein was known for")
    page.click("#generate")
    expect(page.locator(".token").nth(1)).to_be_visible()
    assert page.locator(".token").count() < len(TEXT)
    expect(page.locator("#stop")).to_be_visible()
    finished(page)
    assert page.locator(".token").count() == len(TEXT)
    assert text_of(page) == plain(NAMES)
    expect(page.locator("#lead")).to_have_text("Albert Einstein was known for")
    figures = page.locator("#figures")
    expect(figures).to_contain_text(f"Ended by itself. {len(TEXT)} tokens · 5 in the prompt")
    expect(figures).to_contain_text("tokens/s · first after 0.")
    expect(page.locator("#status")).to_contain_text("Ended by itself")


def test_the_request_has_the_settings(page, server):
    page.fill("#max_tokens", "7")
    page.fill("#temperature", "0.72")
    page.fill("#seed", "11")
    page.click("#more summary")
    page.fill("#top_k", "40")
    page.fill("#repetition_penalty", "1.1")
    page.fill("#stop-strings", "END\n\\n\\n")
    generate(page, "Once")
    assert server.requests == [
        {
            "model": "btlm-tiny",
            "prompt": "Once",
            "max_tokens": 7,
            "temperature": 0.72,
            "top_p": 0.95,
            "seed": 11,
            "top_k": 40,
            "repetition_penalty": 1.1,
            "stop": ["END", "\n\n"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 5,
            "return_token_ids": True,
        }
    ]
    expect(page.locator("#figures")).to_contain_text("Ended at the most new tokens. 7 tokens")


def test_without_sampling_its_settings_stay_out(page, server):
    page.fill("#temperature", "0")
    page.click("text=Random")
    assert 0 <= int(page.input_value("#seed")) < 2**31
    generate(page)
    assert {"top_p", "top_k", "seed"} & set(server.requests[0]) == set()


def test_output_forms(page, server):
    wanted: dict[str, dict[str, Any]] = {
        "json": {"response_format": {"type": "json_object"}},
        "schema": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "integer"}},
            }
        },
        "regex": {"guided_regex": "[ab]+"},
        "choices": {"guided_choice": ["yes", "no"]},
    }
    texts = {"schema": '{"type": "integer"}', "regex": "[ab]+", "choices": "yes\n\nno\n"}
    for form, fields in wanted.items():
        page.select_option("#form", form)
        if form in texts:
            page.fill("#form-text", texts[form])
        generate(page)
        assert {k: v for k, v in server.requests[-1].items() if k in ("response_format", *fields)} == fields
    # The server would begin the form anew in the middle of the text.
    page.locator(".token").nth(2).click()
    expect(page.locator("#popover")).to_contain_text("cannot be written anew from the middle")


def test_escape_and_stop_end_a_request(page, server):
    server.pause = 0.2
    page.fill("#prompt", "Once")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#figures")).to_contain_text("Stopped.")
    assert server.aborted.wait(20)
    server.aborted.clear()
    page.click("#generate")
    page.click("#stop")
    expect(page.locator("#generate")).to_be_visible()
    assert server.aborted.wait(20)


# Tokens


def test_colors_follow_the_probability_and_can_be_off(page):
    generate(page)
    bands = [node.get_attribute("class") for node in page.locator(".token").all()[:4]]
    assert bands == ["token p1", "token p2", "token p0", "token p5"]
    color = "node => getComputedStyle(node).backgroundColor"
    assert page.locator(".token").nth(3).evaluate(color) != "rgba(0, 0, 0, 0)"
    page.uncheck("#tint")
    assert page.locator(".token").nth(3).evaluate(color) == "rgba(0, 0, 0, 0)"


def test_pointing_at_a_token_shows_what_else_could_have_come(page):
    generate(page)
    page.locator(".token").nth(3).hover()
    popover = page.locator("#popover")
    expect(popover).to_contain_text("probability 0.40%")
    assert popover.locator(".name").all_inner_texts() == ["␣the", "␣evolution", "␣relativity"]
    assert popover.locator(".percent").all_inner_texts() == ["40.0%", "20.0%", "0.40%"]
    popover.hover()  # the pointer may go to the popover
    page.wait_for_timeout(400)
    expect(popover).to_be_visible()
    page.locator("h1").hover()
    expect(popover).to_be_hidden()


def test_spaces_line_breaks_and_parts_of_characters_have_marks(page):
    generate(page)
    marks = {
        i: [mark.get_attribute("data-mark") for mark in page.locator(".token").nth(i).locator("i").all()]
        for i in (6, 10, 12)
    }
    assert marks == {6: ["↵"], 10: ["◌"], 12: ["·", "·"]}
    first, second = (page.locator(".token").nth(i).bounding_box() for i in (5, 7))
    assert second["y"] > first["y"], "the line break is kept"
    page.locator(".token").nth(10).hover()
    expect(page.locator("#popover .big")).to_have_text("bytes e2 82")


def test_the_keyboard_reaches_every_token_and_its_alternatives(page, server):
    generate(page)
    page.locator(".token").first.focus()
    popover = page.locator("#popover")
    expect(popover.locator(".big")).to_have_text("␣the")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(popover.locator(".big")).to_have_text("␣relativity")
    assert page.locator('.token[tabindex="0"]').count() == 1
    page.keyboard.press("ArrowDown")  # to the next line
    focused = "Number(document.activeElement.dataset.index)"
    assert page.evaluate(focused) > NAMES.index("\n")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) < NAMES.index("\n")
    page.keyboard.press("Home")
    page.keyboard.press("Escape")
    expect(popover).to_be_hidden()
    expect(page.locator(".token").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(popover.locator("button").first).to_be_focused()
    expect(popover.locator("button").first).to_have_attribute("aria-label", "Use space a instead and go on, 20.0%")
    page.keyboard.press("Enter")
    expect(page.locator(".token.chosen")).to_be_focused()
    finished(page)
    assert server.requests[-1]["prompt"][-1] == server.names[" a"]


def test_regenerating_sends_ids_and_keeps_the_text_before(page, server):
    generate(page)
    page.locator(".token").nth(12).click()
    server.text = [(" new", 0.5, {})]
    page.click("text=Regenerate from here")
    finished(page)
    prompt = server.tokenize("Albert Einstein was known for")
    assert server.requests[-1]["prompt"] == [*prompt, *(server.names[name] for name in NAMES[:12])]
    assert text_of(page) == plain(NAMES[:12]) + " new"
    page.click("#continue")
    finished(page)
    assert server.requests[-1]["prompt"][len(prompt) + 12 :] == [server.names[" new"]]
    for before in (plain(NAMES[:12]) + " new", plain(NAMES)):
        page.click("#undo")
        assert text_of(page) == before


def test_an_alternative_takes_the_place_of_a_token(page, server):
    generate(page)
    page.locator(".token").nth(3).click()
    server.text = [(" of", 0.9, {}), (" species", 0.8, {})]
    page.get_by_role("button", name="evolution").click()
    expect(page.locator(".token.chosen")).to_be_visible()
    finished(page)
    ids = [*server.tokenize("Albert Einstein was known for"), *(server.names[name] for name in NAMES[:3])]
    assert server.requests[-1]["prompt"] == [*ids, server.names[" evolution"]]
    assert text_of(page) == " the theory of evolution of species"
    page.locator(".token").nth(3).hover()
    expect(page.locator("#popover")).to_contain_text("You chose this token.")


def test_a_character_is_completed_after_its_kept_part(page, server):
    generate(page)
    page.locator(".token").nth(11).click()
    server.text = [("bytes:\\xb9", 0.5, {})]
    page.click("text=Regenerate from here")
    finished(page)
    assert text_of(page).endswith(" bytes₹")


def test_tokens_of_a_stop_text_are_struck_out(page, server):
    server.kept_text = len(" the theory of rel")
    generate(page)
    assert page.locator(".token.unused").count() == len(TEXT) - 3
    page.click("#copy-text")
    expect(page.locator("#status")).to_have_text("Copied the text")
    assert page.evaluate("navigator.clipboard.readText()") == " the theory of rel"
    page.click("#continue")
    finished(page)
    assert server.requests[-1]["prompt"][5:] == [server.names[name] for name in NAMES[:3]]


def test_what_the_model_writes_stays_text(page):
    generate(page, "<script>alert(1)</script><b>x</b>")
    assert page.locator("#output img").count() == page.locator("#output b").count() == 0
    page.locator(".token").nth(13).hover()
    expect(page.locator("#popover")).to_contain_text("<img␣src=x␣onerror=alert(1)>")
    assert page.locator("#output img").count() == page.locator("#output b").count() == 0
