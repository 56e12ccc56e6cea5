"""The playground in Chromium. Its tests need playwright and Debian's chromium, and are skipped without them."""

import shutil

import pytest

from tests.serve.playground.stand_in import StandIn, serve

PATIENCE = 20_000  # milliseconds
DESKTOP = {"width": 1440, "height": 900}


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or pytest.skip("needs chromium")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as start:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = start.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def server():
    state = StandIn()
    running = serve(state)
    yield state
    running.shutdown()
    running.server_close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page; at the end of the test, nothing may have gone wrong in it, nor left for another origin."""
    contexts, problems, addresses = [], [], []

    def open_(viewport=DESKTOP, **options):
        context = browser.new_context(viewport=viewport, **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        # Chromium reports every refused request, which the page answers for itself.
        page.on("console", lambda m: None if m.text.startswith("Failed to load resource") else problems.append(m.text))
        page.goto(server.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in addresses if not url.startswith((server.url, "data:"))] == []


@pytest.fixture
def page(open_page):
    return open_page()
