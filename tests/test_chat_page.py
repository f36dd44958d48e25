"""The chat page of lococo-serve in a headless browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import export_text
from test_server import SECONDS, Server, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = export_text(tmp_path_factory.mktemp("page") / "bundle", eos_token_id=None)  # answers until it is stopped
    with serving(bundle, "--max-new-tokens", "20000", LOCOCO_API_KEY="secret") as running:
        yield running


@pytest.fixture
def page(browser: sync_api.Browser, server: Server) -> Iterator[sync_api.Page]:
    """The page, opened; nothing that it does may leave the machine or fail in its scripts."""
    page = browser.new_page()
    page.set_default_timeout(SECONDS * 1000)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    yield page
    assert all(url.startswith((f"http://127.0.0.1:{server.port}/", "data:")) for url in requests), requests
    assert not errors
    page.close()


def say(page: sync_api.Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def test_the_page_streams_stops_and_shows_what_it_costs(page: sync_api.Page, server: Server) -> None:
    expect = sync_api.expect
    expect(page.locator("#memory")).to_contain_text("expected the server's key")
    page.fill("#key", "secret")
    say(page, "Hello")
    answer = page.locator(".assistant")
    expect(answer).to_have_text(re.compile(r".{50}", re.DOTALL))
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
    expect(page.locator("#memory")).to_have_text(re.compile(r"^state [\d,]+ bytes in 24 slots"))
    expect(page.locator("#model")).to_have_value("bundle")
    expect(page.locator("#send")).to_be_disabled()
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    server.wait_for("lococo_running_requests", 0)
    stopped = answer.text_content()
    assert stopped
    page.wait_for_timeout(100)
    assert answer.text_content() == stopped
    say(page, "And more?")  # the conversation goes on
    expect(page.locator(".user")).to_have_count(2)
    expect(page.locator(".assistant")).to_have_count(2)
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    server.wait_for("lococo_running_requests", 0)


def test_a_screen_reader_finds_everything(page: sync_api.Page) -> None:
    expect = sync_api.expect
    expect(page.get_by_role("heading", level=1)).to_have_text("lococo")
    page.get_by_label("key").fill("secret")
    page.get_by_role("textbox", name="Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    log = page.get_by_role("main").get_by_role("log", name="Conversation")
    expect(log).to_have_attribute("aria-busy", "true")
    expect(log.get_by_role("article", name="You")).to_have_text("Hello")
    expect(log.get_by_role("article", name="Model")).to_have_text(re.compile("."))
    page.get_by_role("button", name="Stop").click()
    expect(log).to_have_attribute("aria-busy", "false")
    page.get_by_label("key").fill("wrong")
    page.get_by_role("textbox", name="Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(log.get_by_role("alert")).to_contain_text("expected the server's key")


def test_what_is_said_is_text(page: sync_api.Page) -> None:
    page.fill("#key", "secret")
    say(page, "<img src=x onerror=alert(1)><b>bold</b>")
    sync_api.expect(page.locator(".user")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("#log img, #log b").count() == 0


def test_an_error_is_shown_and_the_message_kept(page: sync_api.Page) -> None:
    page.fill("#key", "wrong")
    say(page, "Hello")
    sync_api.expect(page.locator(".error")).to_contain_text("expected the server's key")
    sync_api.expect(page.locator("#input")).to_have_value("Hello")
