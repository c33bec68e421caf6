"""The page in front of octad's own server and a tiny random mixture: the same wire, not what a test made of it."""

# ruff: noqa: E402, F401, F811 (fixtures are imported)
from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from browsing import BROWSER, answers, ask, browser, opened, send, until

pytest.importorskip("fastapi", reason="octad[serve] is not installed")
serving = pytest.importorskip("serving", reason="there is no server to try")

from serving import Running, running, served_mixture, start

pytestmark = BROWSER

NAMES = ["general", "french", "maths"]


@pytest.fixture
def real_page(browser: Any, running: Running) -> Iterator[Any]:
    yield from opened(browser, running.url + "/", {})
    until_idle(running)


def until_idle(running: Running) -> None:
    """Nothing of any request is left in the engine."""
    import time

    end = time.monotonic() + 10
    while not running.idle():
        assert time.monotonic() < end
        time.sleep(0.02)


def limit(page: Any, tokens: int) -> None:
    """Answers of so many tokens, the likeliest ones."""
    page.keyboard.press("Control+,")
    page.fill("#sampling-max_tokens", str(tokens))
    page.fill("#sampling-temperature", "0")
    page.keyboard.press("Escape")
    until(page, "document.querySelectorAll('dialog').length === 0")


def test_a_conversation_with_speakers(real_page: Any, running: Running) -> None:
    page = real_page
    limit(page, 24)
    ask(page, "Hello there")
    nodes = stored(page)
    (answer,) = [node for node in nodes if node["role"] == "assistant"]
    assert answer["finish"] == "length"
    assert "".join(text for text, _, _ in answer["pieces"]) == answer["content"]
    assert {speaker for _, speaker, _ in answer["pieces"]} <= {0, 1, 2}
    assert all(0 < weight <= 1 for _, _, weight in answer["pieces"])
    assert answer["usage"]["completion_tokens"] == 24
    plain = running.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 24, "temperature": 0},
    ).json()
    assert answer["content"] == plain["choices"][0]["message"]["content"]
    assert [row.split()[0] for row in page.locator(".experts .expert-name").all_inner_texts()] == NAMES
    ask(page, "And more")
    assert len(answers(page)) == 2


def test_solo_is_what_the_engine_gives_to_one_expert(real_page: Any, running: Running) -> None:
    page = real_page
    limit(page, 16)
    ask(page)
    page.hover(".experts li[data-expert='1']")
    page.click("button[aria-label='Solo french']")
    page.click("text=Answer again and compare")
    until(page, "document.querySelectorAll('.keep').length === 2")
    alone = stored(page)[-1]
    assert {speaker for _, speaker, _ in alone["pieces"]} == {1}
    said = running.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Hello?"}],
            "max_tokens": 16,
            "temperature": 0,
            "only_experts": ["french"],
        },
    ).json()
    assert alone["content"] == said["choices"][0]["message"]["content"]


def test_layers(real_page: Any) -> None:
    page = real_page
    limit(page, 8)
    page.check("text=Trace layers")
    ask(page)
    ask(page, "Again")
    page.locator(".answer").nth(1).locator("button[aria-label='Look at the tokens one by one']").click()
    cells = page.locator(".layer-grid span").evaluate_all("all => all.map(e => e.title)")
    assert len(cells) == page.evaluate("fetch('v1/experts').then(r => r.json()).then(r => r.layers)")
    assert all(cell.split(": ")[1].split(",")[0].split()[0] in NAMES for cell in cells)


def test_stop_frees_the_engine(real_page: Any, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine stands still in the middle of the answer until it was stopped, so that no clock decides."""
    page, go, engine = real_page, threading.Event(), running.llm.engine
    step, steps = engine.step, count()

    def held() -> Any:
        if next(steps) == 20:
            go.wait(60)
        return step()

    limit(page, 3000)
    monkeypatch.setattr(engine, "step", held)
    before = engine.stats.generated_tokens
    send(page)
    page.wait_for_selector(".answer .tok >> nth=2", state="attached")
    assert not running.idle()
    page.click("#send")
    page.wait_for_selector("text=Stopped.")
    go.set()
    until_idle(running)
    assert engine.stats.generated_tokens - before <= 21


def test_too_long_is_said(real_page: Any) -> None:
    page = real_page
    page.expected.append("Failed to load resource")
    ask(page, "word " * 2000)
    assert page.locator(".trouble").get_attribute("data-kind") == "long"


def stored(page: Any) -> list[dict[str, Any]]:
    """The messages of the newest conversation, in the order in which they were made."""
    page.wait_for_timeout(200)
    return page.evaluate("""async () => {
        const open = indexedDB.open('octad');
        await new Promise((done) => (open.onsuccess = done));
        const all = open.result.transaction('talks').objectStore('talks').getAll();
        await new Promise((done) => (all.onsuccess = done));
        const newest = all.result.sort((a, b) => b.updated - a.updated)[0];
        return Object.values(newest.nodes).sort((a, b) => a.time - b.time);
    }""")
