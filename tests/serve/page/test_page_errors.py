"""Whatever goes wrong with the server is said, and what passes by itself is waited for."""

# ruff: noqa: F401, F811 (fixtures are imported)
import time
from typing import Any

import pytest
from browsing import BROWSER, NETWORK, answers, ask, backend, browser, browser_page, send, until
from fake_backend import FakeBackend, Refusal, spoken

pytestmark = BROWSER


@pytest.fixture(autouse=True)
def network_notes(request: pytest.FixtureRequest) -> None:
    if "browser_page" in request.fixturenames:
        request.getfixturevalue("browser_page").expected.append(NETWORK)


def test_a_busy_server_is_asked_again_when_it_says(browser_page: Any, backend: FakeBackend) -> None:
    backend.refusal = Refusal(429, "Queue full.", "queue_full", {"Retry-After": "2"})
    start = time.monotonic()
    send(browser_page)
    browser_page.wait_for_selector("text=/busy; asking again in [12] s/")
    browser_page.wait_for_selector("text=Hello from the mixture.")
    assert time.monotonic() - start >= 2  # not before the server allowed it
    assert len(backend.requests) == 2
    assert backend.requests[0] == backend.requests[1]


def test_waiting_can_be_stopped(browser_page: Any, backend: FakeBackend) -> None:
    backend.refusal = Refusal(429, "Queue full.", None, {"Retry-After": "50"})
    send(browser_page)
    browser_page.wait_for_selector("text=/asking again in/")
    browser_page.click("#send")
    browser_page.wait_for_selector("text=Stopped.")
    assert len(backend.requests) == 1


def test_a_conversation_that_is_too_long(browser_page: Any, backend: FakeBackend) -> None:
    for question in ("one", "two", "three", "four"):
        ask(browser_page, question)
    message = "This model's maximum context length is 2048 tokens, but 2311 were sent."
    backend.refusal = Refusal(400, message, "context_length_exceeded")
    ask(browser_page, "five")
    assert browser_page.locator(".trouble").get_attribute("data-kind") == "long"
    assert message in browser_page.locator(".trouble").inner_text()
    assert len(backend.requests[-1]["messages"]) == 9  # all was sent: nothing is cut in silence
    browser_page.click("text=Leave out the older half")
    until(browser_page, "document.querySelectorAll('.prose')[4].textContent.length > 3")
    sent = [m["content"] for m in backend.requests[-1]["messages"]]
    assert (sent[0], sent[-1]) == ("three", "five")
    assert browser_page.locator("[data-cut] .bubble").inner_text() == "three"


def test_a_refusal_shows_the_servers_words(browser_page: Any, backend: FakeBackend) -> None:
    backend.refusal = Refusal(400, "min_p must be <b>below</b> 1", "invalid_value")
    ask(browser_page)
    assert "min_p must be <b>below</b> 1" in browser_page.locator(".trouble").inner_text()
    browser_page.click("text=Try again")
    browser_page.wait_for_selector("text=Hello from the mixture.")
    assert browser_page.locator(".trouble").count() == 0


def test_a_broken_stream_keeps_what_came(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply, backend.break_after = spoken("one two three four"), 2
    ask(browser_page)
    assert answers(browser_page) == ["one two"]
    assert "broke off" in browser_page.locator(".trouble").inner_text()
    backend.break_after = None
    browser_page.click("text=Try again")
    browser_page.wait_for_selector("text=one two three four")


def test_the_key_is_asked_for_and_kept_for_the_tab(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    backend.key = "secret"
    page.reload()
    page.fill("#api-key", "wrong")
    page.click("dialog .primary")
    page.wait_for_selector("text=Incorrect API key provided.")
    page.fill("#api-key", "secret")
    page.click("dialog .primary")
    page.wait_for_selector("#welcome li")
    ask(page)
    assert answers(page) == ["Hello from the mixture."]
    assert page.evaluate("JSON.stringify(localStorage).includes('secret')") is False
    assert page.evaluate("sessionStorage.getItem('octad.key')") == "secret"
    page.reload()
    page.wait_for_selector(".answer .tok")
    assert page.locator("dialog").count() == 0


def test_a_key_that_expires_is_asked_for_again(browser_page: Any, backend: FakeBackend) -> None:
    ask(browser_page)
    backend.key = "new"
    send(browser_page, "And now?")
    browser_page.fill("#api-key", "new")
    browser_page.click("dialog .primary")
    until(browser_page, "document.querySelectorAll('.prose')[1].textContent.length > 3")
    assert answers(browser_page)[1] == "Hello from the mixture."


def test_loading_shows_its_progress_and_ends(browser_page: Any, backend: FakeBackend) -> None:
    backend.health = {"status": "loading", "progress": 0.25, "message": "reading weights"}
    browser_page.reload()
    browser_page.wait_for_selector("#banner:has-text('being loaded: reading weights (25 %)')")
    assert browser_page.locator("#banner progress").evaluate("e => e.value") == 0.25
    backend.refusal = Refusal(503, "Still loading.", "loading", times=1)
    send(browser_page, "Early question")  # is answered as soon as that can be
    browser_page.wait_for_selector("text=/sent as soon as it is/")
    backend.health = None
    browser_page.wait_for_selector("text=Hello from the mixture.")
    until(browser_page, "document.querySelector('#banner').textContent === ''")


def test_a_server_that_drains_says_so(browser_page: Any, backend: FakeBackend) -> None:
    backend.health = {"status": "draining"}
    browser_page.reload()
    browser_page.wait_for_selector("#banner:has-text('shutting down')")


def test_a_server_that_is_gone(browser_page: Any, backend: FakeBackend) -> None:
    ask(browser_page)
    browser_page.context.route("**/*", lambda route: route.abort())
    ask(browser_page, "Anybody there?")
    assert browser_page.locator(".trouble").get_attribute("data-kind") == "gone"
    browser_page.wait_for_selector("#banner:has-text('does not answer')")
    browser_page.context.unroute("**/*")
    until(browser_page, "document.querySelector('#banner').textContent === ''")
    browser_page.click("text=Try again")
    until(browser_page, "document.querySelectorAll('.prose')[1].textContent.length > 3")


def test_cut_at_the_longest_answer(browser_page: Any, backend: FakeBackend) -> None:
    backend.finish = "length"
    ask(browser_page)
    assert "Cut at 4 tokens" in browser_page.locator(".state").inner_text()
