"""The report in a real browser, headless Chromium: no errors, sorting, themes, and no page wider than its screen."""

import html
import json
import re
import shutil
import subprocess
from typing import Any

import pytest
from sample_report import sample

from octad.report.files import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to look at the page with")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=8000"
)
PROBE = """
<script>
addEventListener("load", () => {
  const table = [...document.querySelectorAll("table")].find((t) => t.caption.textContent.startsWith("Bits per byte"));
  const header = table.tHead.rows[0].cells[1];
  const button = header.querySelector("button");
  const order = () => [...table.tBodies[0].rows].map((r) => r.cells[1].dataset.value);
  const state = () => ({ order: order(), sort: header.getAttribute("aria-sort") });
  const steps = [state()];
  button.focus();
  const focused = document.activeElement === button;
  button.click(); steps.push(state());
  button.click(); steps.push(state());
  const name = table.tHead.rows[0].cells[0];
  name.querySelector("button").click();
  const names = [...table.tBodies[0].rows].map((r) => r.cells[0].querySelector(".v").textContent);
  const theme = document.getElementById("theme");
  const colours = [0, 1, 2].map(() => {
    theme.click();
    return [document.documentElement.dataset.theme || "auto", getComputedStyle(document.body).backgroundColor];
  });
  for (const details of document.querySelectorAll("details")) details.open = true;
  const root = document.documentElement;
  const drawings = [...document.querySelectorAll("svg.forest, svg.scatter, svg.heat")];
  const wide = drawings.map((s) => s.getBoundingClientRect().width);
  const requests = performance.getEntriesByType("resource").map((r) => r.name);
  const cleared = header.getAttribute("aria-sort"), errors = window.failures;
  const questions = document.querySelector(".questions").closest(".scroll");
  const spill = questions.scrollWidth - questions.clientWidth;
  const hints = [...document.querySelectorAll(".scroll")].map((place) => {
    const note = place.previousElementSibling.getBoundingClientRect();
    const says = () => getComputedStyle(place).maskImage !== "none";
    const before = says();
    place.scrollLeft = place.scrollWidth;
    place.dispatchEvent(new Event("scroll"));
    return [place.scrollWidth > place.clientWidth, before, note.height > 0, says()];
  });
  const found = { hints, spill, steps, focused, names, cleared, colours, requests, errors,
    width: innerWidth, scroll: root.scrollWidth, narrowest: Math.min(...wide) };
  parent.postMessage(found, "*");
});
</script>
"""
FRAME = """<!doctype html><body><pre id="found"></pre><script>
const all = [];
const box = document.getElementById("found");
addEventListener("message", (e) => { all.push(e.data); box.textContent = JSON.stringify(all); });
</script>
<iframe src="probe.html" style="border:0;width:390px;height:900px"></iframe>
<iframe src="probe.html" style="border:0;width:1280px;height:900px"></iframe>
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What the page says of itself at the width of a telephone and of a desk, and the browser's log."""
    directory = tmp_path_factory.mktemp("report")
    long = "a-domain-with-a-very-long-name-and-no-place-to-break-it-at-all"
    report = json.loads(json.dumps(sample()).replace('"french"', json.dumps(long)))
    page = write_report(report, directory).read_text(encoding="utf-8")
    watch = "failures = []; addEventListener('error', (e) => failures.push(String(e.message)));"
    page = page.replace("<head>", f"<head><script>{watch}</script>", 1).replace(
        "</body>", PROBE + "</body>", 1
    )
    (directory / "probe.html").write_text(page, encoding="utf-8")
    (directory / "frame.html").write_text(FRAME, encoding="utf-8")
    command = [
        str(CHROMIUM),
        *FLAGS.split(),
        f"--user-data-dir={directory / 'profile'}",
        "--window-size=1400,2000",
    ]
    command += ["--dump-dom", (directory / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert shown, done.stderr[-2000:]
    found = json.loads(html.unescape(shown[1]) or "[]")
    return sorted(found, key=lambda f: f["width"]), done.stderr


def test_nothing_fails_and_nothing_is_fetched(seen: tuple[list[dict[str, Any]], str]) -> None:
    found, log = seen
    assert [f["width"] for f in found] == [390, 1280]
    assert [f["errors"] for f in found] == [[], []]
    assert [f["requests"] for f in found] == [[], []]
    assert "CONSOLE" not in log


def test_the_verdict_fits_a_desk(seen: tuple[list[dict[str, Any]], str]) -> None:
    """Without a bar to scroll it sideways."""
    assert seen[0][1]["spill"] == 0


def test_a_header_sorts_its_column(seen: tuple[list[dict[str, Any]], str]) -> None:
    for found in seen[0]:
        before, up, down = found["steps"]
        assert (before["sort"], up["sort"], down["sort"]) == (None, "ascending", "descending")
        values = [float(v) for v in before["order"]]
        assert values not in (sorted(values), sorted(values, reverse=True))
        assert [float(v) for v in up["order"]] == sorted(values)
        assert [float(v) for v in down["order"]] == sorted(values, reverse=True)
        assert found["names"] == sorted(found["names"])
        assert found["cleared"] is None  # another column sorts now
        assert found["focused"]


def test_no_screen_is_too_narrow(seen: tuple[list[dict[str, Any]], str]) -> None:
    for found in seen[0]:
        assert found["scroll"] <= found["width"]
        assert found["narrowest"] > 60


def test_a_table_that_is_cut_says_so(seen: tuple[list[dict[str, Any]], str]) -> None:
    """Its right edge fades until its end is reached, and a line above it says that there is more; no other does."""
    telephone, desk = ([tuple(hint) for hint in found["hints"]] for found in seen[0])
    assert set(telephone) == {(True, True, True, False), (False, False, False, False)}
    assert set(desk) == {(False, False, False, False)}


def test_light_and_dark_are_two_pages(seen: tuple[list[dict[str, Any]], str]) -> None:
    for found in seen[0]:
        colours = dict(found["colours"])
        assert list(colours) == ["light", "dark", "auto"]
        assert colours["light"] != colours["dark"]
        assert colours["auto"] in (colours["light"], colours["dark"])
