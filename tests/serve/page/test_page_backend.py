"""The page in front of other engines: speakers that come at the end, no masks, or no routing at all."""

# ruff: noqa: F401, F811 (fixtures are imported)

from collections.abc import Iterator
from typing import Any

import pytest
from browsing import BROWSER, answers, ask, backend, browser, opened
from fake_engines import LAYERS, TOP_K, WORDS, FakeEngine
from fronting import Front, front, until

pytestmark = BROWSER
NAMES = ["general", "french", "maths", "code"]
ANSWER = "".join(WORDS)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_colours_come_when_the_answer_is_whole(browser: Any, front: Front, kind: str) -> None:
    with FakeEngine(kind) as engine:
        shown = front(engine.url, names=NAMES, shape=(LAYERS, TOP_K))
        for page in opened(browser, shown.url + "/", {}):
            page.click("label.switch")
            ask(page)
            assert answers(page) == [ANSWER]
            tokens = page.locator(".answer .tok[data-i]")
            assert tokens.count() == len(WORDS)
            for at in range(len(WORDS)):
                assert f"e{(at + 1) % 4}" in (tokens.nth(at).get_attribute("class") or "").split()
            assert page.locator(".bar").get_attribute("aria-label").startswith("Spoken by ")
            assert page.locator(".chip").first.evaluate("chip => chip.tagName") == "SPAN"  # nothing to press
            panel = page.locator("#panel-body")
            assert "Masks need octad" in panel.inner_text()
            assert panel.locator(".toggle").count() == 0
            page.click("button[aria-label='Look at the tokens one by one']")
            card = page.locator("#token-card")
            assert "50 % of the places" in card.inner_text()
            assert f"of {LAYERS} layers" in card.inner_text()
            page.keyboard.press("Escape")
            page.reload()
            page.wait_for_selector(".answer .tok[data-i]")
            assert page.locator(".answer .tok[data-i]").count() == len(WORDS)


def test_a_plain_chat_says_so(browser: Any, front: Front) -> None:
    with FakeEngine("plain") as engine:
        shown = front(engine.url)
        for page in opened(browser, shown.url + "/", {}):
            page.wait_for_selector("text=this is a plain chat")
            ask(page)
            assert answers(page) == [ANSWER]
            assert page.locator(".answer .tok").count() == 0
            sent = [body for path, body, _ in engine.requests if path == "/v1/chat/completions"]
            assert not {"speakers", "only_experts", "return_routed_experts"} & set(sent[-1])


def test_the_engine_goes_and_comes_back(browser: Any, front: Front) -> None:
    with FakeEngine("plain") as engine:
        shown = front(engine.url)
        for page in opened(browser, shown.url + "/", {}):
            page.expected = ["Failed to load resource"]
            ask(page)
            engine.down = True
            while shown.get("/health").status_code == 200:
                page.wait_for_timeout(50)
            page.fill("#prompt", "And now?")
            page.keyboard.press("Enter")
            page.wait_for_selector("text=The engine behind this server does not answer")
            engine.down = False
            until(lambda page=page: answers(page) == [ANSWER, ANSWER])  # type: ignore[misc]
