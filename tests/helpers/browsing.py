"""The chat page in a real browser: Debian's chromium, driven by playwright.

    from browsing import BROWSER, ask, backend, browser, browser_page    # the fixtures are the last three
    pytestmark = BROWSER

`browser_page` shows the page in front of `backend`, a server that says what a test tells it to; it has a fresh profile.
A test fails when the page logs an error or a violation of its Content-Security-Policy, throws, or asks anything of
another host; `browser_page.expected` holds what it may log.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(__file__).parents[2] / "page-src" / "node_modules" / "axe-core" / "axe.min.js"
NETWORK = "Failed to load resource"  # chromium's own note of an answer that is an error
BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None,
        reason="playwright is not installed (make test-page installs it)",
    ),
]


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def browser_page(browser: Any, backend: FakeBackend, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Of the size and colours that `@pytest.mark.parametrize(..., indirect=True)` may give."""
    yield from opened(browser, backend.url, getattr(request, "param", {}))


def opened(browser: Any, url: str, options: Mapping[str, Any]) -> Iterator[Any]:
    """A page of a fresh profile that shows `url`. Afterwards it must have logged, thrown and violated nothing, and asked
    nothing of another host; `page.expected` holds parts of what it may log."""
    context = browser.new_context(
        **{"viewport": {"width": 1280, "height": 800}, "bypass_csp": False, **options}
    )
    context.set_default_timeout(10_000)
    page = context.new_page()
    troubles: list[str] = []
    page.expected = []
    page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else troubles.append(r.url)
    )
    page.goto(url)
    page.wait_for_selector("#send[aria-label]")
    yield page
    context.close()
    assert [t for t in troubles if not any(allowed in t for allowed in page.expected)] == []


def ask(page: Any, text: str = "Hello?") -> None:
    """Send a question and wait for the end of its answer."""
    send(page, text)
    page.wait_for_selector(".answer:not([aria-busy]) >> nth=-1")
    until(page, "document.querySelector('#send').getAttribute('aria-label') === 'Send'")


def send(page: Any, text: str = "Hello?") -> None:
    """Send a question."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer")


def answers(page: Any) -> list[str]:
    """What the answers on the screen say."""
    return [text.strip() for text in page.locator(".answer .prose").all_inner_texts()]


def until(page: Any, expression: str, seconds: float = 10) -> None:
    """Wait until an expression holds in the page. (Playwright's own way needs eval, which the page's CSP forbids.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        if time.monotonic() > end:
            raise TimeoutError(expression)
        page.wait_for_timeout(30)
