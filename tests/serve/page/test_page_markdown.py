"""Markdown on the page: what markdown-it makes of it, nothing that runs or loads, and the same work for each token."""

# ruff: noqa: F401, F811 (fixtures are imported)
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from browsing import BROWSER, answers, ask, backend, browser, browser_page, until
from fake_backend import FakeBackend, Said, spoken
from markdown_it import MarkdownIt

pytestmark = BROWSER

BLOCKS = ("h1", "h2", "h3", "p", "li", "pre", "th", "td", "blockquote")

SAMPLE = """# One

A paragraph with *emphasis*, **strong**, `code` and [a link](https://example.org/).

## Two

- first
- second
    - deeper

1. uno
2. due

```js
const a = [1, 2].map((x) => x * 2);
```

| name | value |
|------|-------|
| pi   | 3.14  |

> said somebody

Last line.
"""


class _Blocks(HTMLParser):
    """[tag, its own text without that of blocks inside], in the order in which the blocks begin."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self.open: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in BLOCKS:
            self.found.append([tag, ""])
            self.open.append(self.found[-1])

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1][1] += data


def blocks(html: str) -> list[tuple[str, str]]:
    parser = _Blocks()
    parser.feed(html)
    return [(tag, " ".join(text.split())) for tag, text in parser.found if text.strip()]


def test_structure_is_markdown_its(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = spoken(SAMPLE)
    ask(browser_page)
    shown = browser_page.locator(".answer .prose")
    html = shown.evaluate("""e => {
        const copy = e.cloneNode(true);
        for (const head of copy.querySelectorAll('.code-head')) head.remove();
        return copy.innerHTML;
    }""")
    html = re.sub(
        r"<(/?)h([3-6])", lambda m: f"<{m[1]}h{int(m[2]) - 2}", html
    )  # content begins below the message's h2
    assert blocks(html) == blocks(MarkdownIt("commonmark").enable("table").render(SAMPLE))
    links = shown.locator("a").evaluate_all("all => all.map(a => [a.href, a.rel, a.textContent])")
    assert links == [["https://example.org/", "noopener noreferrer nofollow", "a link"]]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_nothing_runs_and_nothing_loads(browser_page: Any, backend: FakeBackend, size: int) -> None:
    """Requests to other hosts and violations of the CSP fail every test (conftest)."""
    text = (
        "<img src=x onerror=window.ran=1><script>window.ran=1</script> [a](javascript:window.ran=1) "
        "[b](JaVaScRiPt:window.ran=1) [c](data:text/html,x) ![d](https://evil.example/pixel.png) ![e](x) "
        "<https://example.org> [f](vbscript:x) $\\href{javascript:window.ran=1}{x}$ "
        '$\\includegraphics{https://evil.example/p.png}$ [g](  https://example.org/ok "t")\n\n'
        "```<img>\n<script>window.ran=1</script>\n```\n"
    )
    backend.reply = [Said(text[at : at + size]) for at in range(0, len(text), size)]
    ask(browser_page)
    until(browser_page, "document.querySelectorAll('.formula').length > 0")
    browser_page.wait_for_timeout(300)
    assert browser_page.evaluate("window.ran") is None
    shown = browser_page.locator(".answer .prose")
    assert shown.locator("img, script, iframe, object").count() == 0
    links = shown.locator("a").evaluate_all("all => all.map(a => a.href)")
    assert links == ["https://evil.example/pixel.png", "https://example.org/ok"] or links == [
        "https://evil.example/pixel.png",
        "https://example.org",
        "https://example.org/ok",
    ]
    said = shown.inner_text()
    for kept in (
        "<img src=x onerror=window.ran=1>",
        "[a](javascript:window.ran=1)",
        "[c](data:text/html,x)",
        "![e](x)",
    ):
        assert kept in said


def test_formulas(browser_page: Any, backend: FakeBackend) -> None:
    text = (
        "Inline $a^2$ and \\(b_1\\), display \\[ c = 1 \\] and $$d = 2$$.\n\n"
        "Not: $5, $HOME and $PATH, cost 3$ or $4.\n\nStray $x is *text*.\n\n"
        "$$\nno end, but **bold**\n\nafter all. \\(broken \\frac{\\)"
    )
    backend.reply = spoken(text, "maths")
    ask(browser_page)
    until(browser_page, "document.querySelectorAll('.katex').length === 4")
    tex = browser_page.locator(".answer annotation").all_text_contents()
    assert tex == ["a^2", "b_1", "c = 1", "d = 2"]
    assert browser_page.locator(".katex-display").count() == 2
    said = answers(browser_page)[0]
    assert "Not: $5, $HOME and $PATH, cost 3$ or $4." in said
    assert "Stray $x is text." in said
    assert browser_page.locator(".answer em").inner_text() == "text"
    assert browser_page.locator(".answer strong").inner_text() == "bold"
    assert "\\frac{" in browser_page.locator(".formula.unread").inner_text()


def test_code_has_colours_a_language_and_a_copy(browser_page: Any, backend: FakeBackend) -> None:
    code = 'def f(x):\n    return "a" + x  # why\n'
    backend.reply = spoken(f"```python\n{code}```\n\n```nolanguage\nplain\n```\n", "python")
    browser_page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(browser_page)
    until(browser_page, "document.querySelectorAll('.hl-keyword').length === 2")
    assert browser_page.locator(".hl-string").inner_text() == '"a"'
    assert browser_page.locator(".language").all_inner_texts() == ["python", "nolanguage"]
    assert browser_page.locator(".code .tok .hl-keyword").count() == 2  # the speaker is still there
    browser_page.click("button[aria-label='Copy code'] >> nth=0")
    browser_page.wait_for_selector("button[aria-label=Copied]")
    assert browser_page.evaluate("navigator.clipboard.readText()").strip() == code.strip()


@pytest.mark.parametrize(
    "text",
    ["> " * 200 + "deep", "- a\n" + "".join(" " * 2 * n + "- x\n" for n in range(1, 60)), "*a **b _c " * 40],
)
def test_odd_markdown_loses_no_word(browser_page: Any, backend: FakeBackend, text: str) -> None:
    backend.reply = spoken(text + "\n\nthe end")
    browser_page.expected.append("shown as plain text")
    ask(browser_page)
    said = answers(browser_page)[0]
    assert "the end" in said
    assert sorted(re.findall(r"[a-z]+", said)) == sorted(re.findall(r"[a-z]+", text + " the end"))


def test_the_same_work_for_each_token(browser_page: Any, backend: FakeBackend) -> None:
    """Nothing that stands is taken away or drawn anew: the second thousand tokens change no more nodes than the first."""
    page = browser_page
    line = "Some *words* and `code` here, then more of them until the paragraph ends.\n\n- an item\n\n"
    backend.reply = spoken(line * 60)
    page.evaluate("""() => {
        window.work = [];
        new MutationObserver((records) => {
            for (const {addedNodes, removedNodes, target} of records) {
                const inside = target.nodeType !== 1 || target.closest('.prose');
                if (inside) window.work.push([addedNodes.length, removedNodes.length]);
            }
        }).observe(document.querySelector('#messages'), {childList: true, subtree: true, characterData: true});
    }""")
    ask(page)
    work = page.evaluate("window.work")
    tokens = len(backend.reply)
    assert tokens > 1000
    assert sum(removed for _, removed in work) == 0
    assert sum(added for added, _ in work) < 3 * tokens


def test_thinking_is_folded_away(browser_page: Any, backend: FakeBackend) -> None:
    chunks = backend.chunks

    def thoughtful(body: dict[str, Any]) -> Any:
        delta = {"reasoning_content": "Let me <b>see</b>."}
        yield {
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
        }
        yield from chunks(body)

    backend.chunks = thoughtful  # type: ignore[method-assign]
    ask(browser_page)
    assert answers(browser_page) == ["Hello from the mixture."]
    browser_page.click(".thought summary")
    assert browser_page.locator(".thought pre").inner_text() == "Let me <b>see</b>."
