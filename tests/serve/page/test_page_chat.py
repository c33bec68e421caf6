"""A conversation on the page: asked, streamed, stopped, branched, kept, found, taken away and brought back."""

# ruff: noqa: F401, F811 (fixtures are imported)
import json
from pathlib import Path
from typing import Any

import pytest
from browsing import BROWSER, answers, ask, backend, browser, browser_page, send, until
from fake_backend import FakeBackend, Said, spoken

pytestmark = BROWSER


def test_request_and_answer(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = spoken("Bonjour à tous.", "french")
    ask(browser_page, "Say hello in French")
    assert answers(browser_page) == ["Bonjour à tous."]
    (body,) = backend.requests
    assert body == {
        "model": "mixture",
        "messages": [{"role": "user", "content": "Say hello in French"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "speakers": True,
    }
    ask(browser_page, "Again")
    assert [(m["role"], m["content"]) for m in backend.requests[1]["messages"]] == [
        ("user", "Say hello in French"),
        ("assistant", "Bonjour à tous."),
        ("user", "Again"),
    ]


@pytest.mark.parametrize("slices", [1, 3])
def test_frames_cut_anywhere(browser_page: Any, backend: FakeBackend, slices: int) -> None:
    """Frames whose lines end in CR LF, cut within characters, line ends and comments."""
    text = "Añadir 漢字 😀 «fin»\r\nnext"
    backend.reply = [Said(char) for char in text]
    backend.slices = slices
    ask(browser_page)
    kept = browser_page.evaluate("""async () => {
        const open = indexedDB.open('octad');
        await new Promise((done) => (open.onsuccess = done));
        const all = open.result.transaction('talks').objectStore('talks').getAll();
        await new Promise((done) => (all.onsuccess = done));
        return Object.values(all.result[0].nodes).map((node) => node.content);
    }""")
    assert kept == ["Hello?", text]


def test_it_streams_and_stops(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = spoken("word " * 400)
    backend.pace = 0.02
    send(browser_page)
    browser_page.wait_for_selector(".answer .tok >> nth=3")
    assert browser_page.locator("#send").get_attribute("aria-label") == "Stop"
    browser_page.keyboard.press("Escape")
    browser_page.wait_for_selector("text=Stopped.")
    said = answers(browser_page)[0]
    assert said.startswith("word word")
    until(browser_page, "document.querySelector('#send').getAttribute('aria-label') === 'Send'")
    browser_page.wait_for_timeout(300)
    assert backend.cancelled == 1  # the server saw that nobody listens any more
    browser_page.reload()
    browser_page.wait_for_selector("text=Stopped.")
    assert answers(browser_page) == [said]


def test_a_reload_keeps_what_came(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = spoken("one two three four five")
    backend.break_after = None
    send(browser_page)
    browser_page.wait_for_selector("text=End of the answer", state="attached")
    backend.hold.clear()
    send(browser_page, "More")
    browser_page.wait_for_timeout(2500)  # saved every two seconds
    browser_page.reload()
    browser_page.wait_for_selector("text=This answer never came.")
    assert answers(browser_page)[0] == "one two three four five"
    backend.hold.set()


def test_again_and_branches(browser_page: Any, backend: FakeBackend) -> None:
    backend.reply = spoken("First answer.")
    ask(browser_page)
    backend.reply = spoken("Second answer.")
    browser_page.click("button[aria-label='Answer again']")
    browser_page.wait_for_selector("text=Second answer.")
    assert answers(browser_page) == ["Second answer."]
    assert backend.requests[0]["messages"] == backend.requests[1]["messages"]
    assert browser_page.locator(".answer .branches").inner_text().split() == ["2", "/", "2"]
    browser_page.click(".answer button[aria-label='Previous alternative']")
    assert answers(browser_page) == ["First answer."]
    ask(browser_page, "Go on")  # continues the first answer
    assert [m["content"] for m in backend.requests[-1]["messages"]] == ["Hello?", "First answer.", "Go on"]
    browser_page.reload()
    browser_page.wait_for_selector(".branches")
    assert answers(browser_page) == ["First answer.", "Second answer."]


def test_edit_makes_a_branch(browser_page: Any, backend: FakeBackend) -> None:
    ask(browser_page, "Where is Pariss?")
    browser_page.focus("#prompt")
    browser_page.keyboard.press("ArrowUp")
    browser_page.fill(".editor textarea", "Where is Paris?")
    backend.reply = spoken("In France.")
    browser_page.press(".editor textarea", "Enter")
    browser_page.wait_for_selector("text=In France.")
    assert browser_page.locator(".bubble").all_inner_texts() == ["Where is Paris?"]
    assert backend.requests[1]["messages"] == [{"role": "user", "content": "Where is Paris?"}]
    browser_page.click(".question button[aria-label='Previous alternative']")
    assert browser_page.locator(".bubble").all_inner_texts() == ["Where is Pariss?"]
    assert answers(browser_page) == ["Hello from the mixture."]


def test_an_enter_that_ends_a_composition_does_not_send(browser_page: Any, backend: FakeBackend) -> None:
    browser_page.fill("#prompt", "にほん")
    press = """(e, more) => e.dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true, ...more}))"""
    area = browser_page.locator("#prompt")
    area.evaluate(press, {"isComposing": True})
    area.evaluate(press, {"keyCode": 229})
    area.evaluate(press, {"shiftKey": True})
    browser_page.wait_for_timeout(200)
    assert backend.requests == []
    area.evaluate(press, {})
    browser_page.wait_for_selector(".answer")
    assert backend.requests[0]["messages"][0]["content"] == "にほん"


def test_a_real_composition(browser_page: Any, backend: FakeBackend) -> None:
    """Through chromium's own input method editor: Enter while it composes, then commit, then Enter."""
    input_method = browser_page.context.new_cdp_session(browser_page)
    browser_page.focus("#prompt")
    input_method.send("Input.imeSetComposition", {"text": "日本", "selectionStart": 2, "selectionEnd": 2})
    browser_page.evaluate("""() => document.querySelector('#prompt').addEventListener(
        'keydown', (event) => (window.composing = event.isComposing), {once: true})""")
    browser_page.keyboard.press("Enter")
    browser_page.wait_for_timeout(200)
    assert browser_page.evaluate("window.composing") is True
    assert backend.requests == []
    input_method.send("Input.insertText", {"text": "日本語"})
    browser_page.keyboard.press("Enter")
    browser_page.wait_for_selector(".answer")
    assert "日本語" in backend.requests[0]["messages"][0]["content"]


def test_conversations_are_found_renamed_deleted(browser_page: Any, backend: FakeBackend) -> None:
    page = browser_page
    for question, reply in (("Apples", "They grow on trees."), ("Boats", "They float on rivers.")):
        backend.reply = spoken(reply)
        page.click("#new-talk")
        ask(page, question)
    names = page.locator(".talk")
    assert names.all_inner_texts() == ["Boats", "Apples"]
    page.fill("#search", "GROW trees")
    until(page, "document.querySelectorAll('.talk').length === 1")
    assert names.all_inner_texts() == ["Apples"]
    names.first.click()
    page.wait_for_selector("text=They grow on trees.")
    page.fill("#search", "")
    until(page, "document.querySelectorAll('.talk').length === 2")
    page.click("button[aria-label='More for Apples']")
    page.click("[role=menuitem]:has-text('Rename')")
    page.fill("#talks input", "Fruit <b>")
    page.keyboard.press("Enter")
    page.wait_for_selector(".talk:has-text('Fruit <b>')")
    page.reload()
    page.wait_for_selector("h1:has-text('Fruit <b>')")
    page.click("button[aria-label='More for Boats']")
    page.click("[role=menuitem]:has-text('Delete')")
    page.click("dialog .danger")
    until(page, "document.querySelectorAll('.talk').length === 1")
    assert names.all_inner_texts() == ["Fruit <b>"]


def test_export_and_import_are_inverse(browser_page: Any, backend: FakeBackend, tmp_path: Path) -> None:
    page = browser_page
    backend.reply = [Said("Hel", "python", 0.75), Said("lo", "french", 0.5)]
    ask(page, "First")
    page.click("button[aria-label='Answer again']")
    page.wait_for_selector(".answer .branches")
    ask(page, "Second")
    first = export(page, tmp_path / "first.json")
    (talk,) = first["conversations"]
    assert [n["pieces"] for n in talk["nodes"].values() if n["role"] == "assistant"] == [
        [["Hel", 1, 0.75], ["lo", 2, 0.5]]
    ] * 3
    page.click("#more")
    page.click("[role=menuitem]:has-text('Delete all')")
    page.click("dialog .danger")
    page.wait_for_selector("#talks .note")
    page.set_input_files("#import-file", tmp_path / "first.json")
    page.wait_for_selector("text=1 conversation imported.")
    assert export(page, tmp_path / "second.json") == first
    page.set_input_files("#import-file", tmp_path / "first.json")
    page.wait_for_selector("text=0 conversations imported, 1 known already.")
    page.click(".talk")
    page.wait_for_selector(".answer .tok.e1:has-text('Hel')")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.update(format="other"), "holds no conversations"),
        (lambda f: f.update(version=9), "version 9"),
        (lambda f: f["conversations"][0].update(root={"children": ["gone"], "chosen": 0}), "is no tree"),
        (lambda f: f["conversations"][0].update(id="../x"), "has no id"),
        (lambda f: next(iter(f["conversations"][0]["nodes"].values())).update(role="root"), "of role"),
        (lambda f: next(iter(f["conversations"][0]["nodes"].values())).update(content=7), "without text"),
        (lambda f: f["conversations"].append(None), "is no object"),
    ],
)
def test_a_bad_file_changes_nothing(
    browser_page: Any, backend: FakeBackend, tmp_path: Path, change: Any, said: str
) -> None:
    ask(browser_page)
    file = export(browser_page, tmp_path / "good.json")
    before = json.dumps(file)
    change(file)
    (tmp_path / "bad.json").write_text(json.dumps(file))
    browser_page.set_input_files("#import-file", tmp_path / "bad.json")
    browser_page.wait_for_selector(f"#toast :text('{said}')")
    assert json.dumps(export(browser_page, tmp_path / "after.json")) == before


def export(page: Any, path: Path) -> dict[str, Any]:
    """All conversations, through the menu, as the file has them."""
    page.click("#more")
    with page.expect_download() as download:
        page.click("[role=menuitem]:has-text('Export all')")
    download.value.save_as(path)
    return json.loads(path.read_text())
