"""The page for everyone: axe finds nothing, keyboard and screen reader reach all, 375 px are enough, light and dark."""

# ruff: noqa: F401, F811 (fixtures are imported)
from typing import Any

import pytest
from browsing import AXE, BROWSER, NETWORK, ask, backend, browser, browser_page, send, until
from fake_backend import FakeBackend, Refusal, spoken

pytestmark = BROWSER

PHONE = {"viewport": {"width": 375, "height": 700}, "is_mobile": True, "has_touch": True}
SIZES = [
    pytest.param({}, id="desktop"),
    pytest.param({"color_scheme": "dark"}, id="desktop-dark"),
    pytest.param(PHONE, id="phone"),
    pytest.param({**PHONE, "color_scheme": "dark"}, id="phone-dark"),
]
TEXT = """## Part

A paragraph with `code`, $x^2$ and [a link](https://example.org/).

```python
def f(x):
    return "a very long line that does not fit into a narrow window at all" + x  # why
```

| name | value |
|---|---|
| a | b |

- [x] done
"""


def violations(page: Any) -> list[str]:
    """What axe-core finds, all of its rules."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())  # through the debugger, which the page's CSP does not bind
    page.wait_for_timeout(250)  # transitions
    found = page.evaluate(
        "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html + ' ' + n.failureSummary)]))"
    )
    return [f"{rule}: {nodes[:3]}" for rule, nodes in found]


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed (`npm ci` in page-src)")
@pytest.mark.parametrize("browser_page", SIZES, indirect=True)
def test_axe_finds_nothing(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    page.expected.append(NETWORK)
    backend.make_up = {"base": "llm", "experts": [{"name": "python", "distance": 0.1}], "verdict": "Good."}
    page.reload()
    page.wait_for_selector("#welcome li")
    assert violations(page) == []
    backend.reply = [*spoken(TEXT, "python"), *spoken("and more", "french")]
    ask(page)
    until(page, "document.querySelectorAll('.katex').length === 1 && document.querySelector('.hl-keyword')")
    assert violations(page) == []
    page.click("button[aria-label='Look at the tokens one by one']")
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.click(".chip >> nth=0")
    assert violations(page) == []
    page.click("[role=menuitem] >> nth=0")
    page.wait_for_selector(".keep >> nth=1")
    assert violations(page) == []
    page.click(".keep >> nth=1")
    backend.refusal = Refusal(400, "Too long.", "context_length_exceeded")
    ask(page, "Error?")
    assert violations(page) == []
    for mode in ("underline", "names"):
        page.keyboard.press("Control+.")
        assert page.evaluate("document.body.dataset.speakers") == mode
        assert violations(page) == []


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed (`npm ci` in page-src)")
@pytest.mark.parametrize("browser_page", SIZES, indirect=True)
def test_axe_finds_nothing_in_what_opens(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    ask(page)
    narrow = page.viewport_size["width"] < 1100
    for keys in ("Control+,", "Control+/"):
        page.keyboard.press(keys)
        page.wait_for_selector("dialog[open]")
        assert violations(page) == []
        page.keyboard.press("Escape")
    for keys in ("Control+Shift+E", "Control+Shift+S"):
        if narrow:
            page.keyboard.press(keys)
        assert violations(page) == []
    page.click("#more")
    assert violations(page) == []


@pytest.mark.parametrize("browser_page", [pytest.param(PHONE, id="phone")], indirect=True)
def test_a_narrow_window_has_no_sideways_scroll(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    backend.reply = spoken(TEXT + "\n" + "unbreakable" * 30 + "\n\n" + "$$" + "x + " * 60 + "y$$\n", "python")
    ask(page)
    until(page, "document.querySelectorAll('.katex').length === 2")
    inside = (
        "document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth"
    )
    width = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(f"{inside} && {width}")
    box = page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= 375
    assert box["y"] + box["height"] <= 700
    page.tap("#open-panel")
    page.wait_for_selector("#panel:not([hidden])")
    solo = page.locator("button[aria-label='Solo french']")
    assert solo.evaluate("e => getComputedStyle(e).opacity") == "1"  # nothing hovers on a phone
    solo.tap()
    assert page.evaluate(width)
    page.keyboard.press("Escape")
    page.tap(".tok >> nth=0")
    card = page.locator("#token-card").bounding_box()
    assert card["x"] >= 0
    assert card["x"] + card["width"] <= 375


def test_keyboard_alone(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    ask(page, "First")
    page.keyboard.press("Control+Shift+O")
    assert page.locator(".message").count() == 0
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("Second")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Hello from the mixture.")
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Control+/")
    assert page.locator("dialog tr").count() >= 12
    page.keyboard.press("Escape")
    until(page, "document.querySelectorAll('dialog').length === 0")
    page.focus(".chip >> nth=0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "menuitem"
    page.keyboard.press("ArrowDown")
    assert "alone" in page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Escape")
    assert page.locator("[role=menu]").count() == 0
    assert page.evaluate("document.activeElement.className") == "chip"
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent.trim()"
            )
        )
    for name in (
        "Copy answer",
        "Answer again",
        "Edit question",
        "Settings",
        "Mask french",
        "New conversation",
        "Question",
    ):
        assert name in reached, name


def test_answers_are_read_out_politely(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    region = page.locator("#announcer")
    assert region.get_attribute("aria-live") == "polite"
    page.evaluate("""() => {
        window.heard = [];
        new MutationObserver(() => window.heard.push(document.querySelector('#announcer').textContent))
            .observe(document.querySelector('#announcer'), {childList: true, characterData: true, subtree: true});
    }""")
    backend.reply = spoken("This is a sentence. " * 60)
    backend.pace = 0.01
    ask(page)
    until(page, "window.heard.at(-1)?.endsWith('End of the answer.')")
    heard = page.evaluate("window.heard")
    assert len(heard) <= 6  # sentences together, not 240 tokens one by one
    words = " ".join(heard).removesuffix("End of the answer.").split()
    assert words == ("This is a sentence. " * 60).split()


def test_themes(browser_page: Any, backend: FakeBackend) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser_page.evaluate(paper)
    browser_page.emulate_media(color_scheme="dark")
    dark = browser_page.evaluate(paper)
    assert light != dark
    browser_page.click("#theme")
    assert browser_page.evaluate(paper) == light
    browser_page.reload()
    assert browser_page.evaluate(paper) == light
    browser_page.click("#theme")
    browser_page.emulate_media(color_scheme="light")
    assert browser_page.evaluate(paper) == dark


@pytest.mark.parametrize("browser_page", [{"forced_colors": "active"}], indirect=True)
def test_the_systems_high_contrast_colours(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = [*spoken("one", "python"), *spoken(" two", "french")]
    ask(browser_page)
    kinds = "[...document.querySelectorAll('.tok')].map(e => getComputedStyle(e).textDecorationStyle)"
    assert browser_page.evaluate(kinds) == ["dashed", "double"]


def test_right_to_left_text(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = spoken("مرحبا بالعالم\n\nplain text")
    ask(browser_page, "שלום")
    left = """(e) => {
        const range = document.createRange();
        range.selectNodeContents(e);
        return range.getBoundingClientRect().left - e.getBoundingClientRect().left;
    }"""
    assert browser_page.locator(".prose p").nth(0).evaluate(left) > 200  # at the right
    assert browser_page.locator(".prose p").nth(1).evaluate(left) < 1


def test_sampling_presets_and_system_prompt(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    page.keyboard.press("Control+,")
    page.fill("#system", "Be brief.")
    page.check("text=Also for new conversations")
    page.click("text=Balanced")
    for name, value in (
        ("min_p", "0.05"),
        ("max_tokens", "64"),
        ("seed", "7"),
        ("repetition_penalty", "1.1"),
    ):
        page.fill(f"#sampling-{name}", value)
    page.fill("#sampling-top_p", "3")
    assert page.locator("#sampling-top_p").get_attribute("aria-invalid") == "true"
    page.click("text=Save as preset")
    page.fill(".preset-name", "Mine")
    page.press(".preset-name", "Enter")
    page.click("text=Exact")
    page.keyboard.press("Escape")
    ask(page)
    sent = backend.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["temperature"] == 0
    assert not {"min_p", "max_tokens", "seed", "repetition_penalty", "top_p"} & set(sent)
    page.reload()
    page.wait_for_selector("#send[aria-label]")
    page.keyboard.press("Control+,")
    page.click("dialog >> text=Mine")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    ask(page)
    expected = {"temperature": 0.7, "min_p": 0.05, "max_tokens": 64, "seed": 7, "repetition_penalty": 1.1}
    assert expected.items() <= backend.requests[1].items()
    assert "top_p" not in backend.requests[1]  # what is out of its range is not sent
    assert backend.requests[1]["messages"][0]["content"] == "Be brief."


def test_long_answers_are_followed_unless_one_reads(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    at_end = "(e => e.scrollHeight - e.scrollTop - e.clientHeight < 5)(document.querySelector('#scroller'))"
    backend.reply = spoken("line\n\n" * 200)
    backend.pace = 0.005
    send(page)
    page.wait_for_selector(".answer p >> nth=60", state="attached")
    until(page, at_end)
    page.mouse.move(600, 400)
    page.mouse.wheel(0, -600)
    page.wait_for_selector("#to-end:not([hidden])")
    until(page, "!document.querySelector('[aria-busy]')")
    assert not page.evaluate(at_end)
    page.click("#to-end")
    assert page.evaluate(at_end)
