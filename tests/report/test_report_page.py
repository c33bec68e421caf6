"""The report's files: well-formed, self-contained, escaped, and of the same numbers as the JSON."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from sample_report import EVIL, StrictReader, numbers, read, routing, sample

from octad.errors import OutputError
from octad.figures import human, signed
from octad.guard import jsonable
from octad.report import svg
from octad.report.files import write_report
from octad.report.html import page
from octad.report.markdown import escaped, markdown
from octad.report.page import parts as sections
from octad.report.page import quality, routes
from octad.report.table import MOST_EXPERTS, judged

DENSE: dict[str, Any] = {
    "routing": None,
    "differences": [],
    "requirements": [],
    "tasks": [],
    "verdict": {"headline": "dense", "sentences": [], "questions": [], "worse_on": [], "advice": []},
    "contestants": [
        {"name": "model", "kind": "model", "bits_per_byte": {"python": 0.9, "french": 1.1}, "mean": 1.0}
    ],
}


def test_three_files_of_the_same_report(tmp_path: Path) -> None:
    report = sample()
    path = write_report(report, tmp_path / "deep" / "report")
    assert path == tmp_path / "deep" / "report" / "index.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["index.html", "report.json", "report.md"]
    assert read(path.parent / "report.json") == report
    (path.parent / "note.txt").write_text("mine")
    write_report(sample(model="another"), path.parent)
    assert read(path.parent / "report.json")["model"] == "another"
    assert (path.parent / "note.txt").read_text() == "mine"


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(OutputError, match=r"report: is a file; give a directory"):
        write_report(sample(), tmp_path / "report")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(sample(), tmp_path / "report" / "inside")


@pytest.mark.parametrize(
    "report",
    [
        sample(),
        sample(**DENSE),
        sample(routing=routing(("expert 0", "expert 1")), differences=[], requirements=[]),
        {"model": "nothing else"},
        {},
    ],
    ids=["whole", "dense", "foreign", "bare", "empty"],
)
def test_pages_are_well_formed_and_need_nothing_else(report: dict[str, Any]) -> None:
    html = page(report)
    reader = StrictReader(html)
    assert html.startswith("<!doctype html>")
    for tag, given in reader.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not given.keys() & {"src", "srcset", "data", "action", "xlink:href"}, (tag, given)
        assert (given.get("href") or "#").startswith("#"), given
    assert not re.search(r"@import|url\(|https?://|//cdn|fetch\(|XMLHttpRequest|import\(", html)
    ids = {given["id"] for _, given in reader.tags if given.get("id")}
    links = {given["href"] for _, given in reader.tags if given.get("href")}
    assert {link.removeprefix("#") for link in links if link} <= ids
    assert "None" not in "".join(reader.text)
    assert "None" not in markdown(report)


def test_every_number_of_the_tables_is_in_the_json() -> None:
    report = sample()
    values = StrictReader(page(report)).values
    known = set(numbers(report))
    derived = {
        "Nats per token": {statistics.fmean(c["nats_per_token"].values()) for c in report["contestants"]},
        "Share of the choices, mean over layers": {0.875, 0.125, 0.5625, 0.4375},
        "Routers by domain": {0.875, 0.85, 0.375, 0.4375, 0.09375},
        "Routers by layer, mean over domains": {0.8125, 0.75, 0.3125, 0.5, 0.95, 0.15625},
    }
    assert set(derived) <= set(values)
    assert {"Bits per byte of held-out text", "Price", "mean<=oracle", "Questions and answers"} <= set(values)
    for caption, found in values.items():
        for value in found:
            near = known | derived.get(caption, set())
            assert any(math.isclose(value, k, abs_tol=1e-6) for k in near), (caption, value)
    means = [c["mean"] for c in report["contestants"]]
    assert [v for v in values["Bits per byte of held-out text"] if v in means] == means


def test_markdown_has_the_figures_of_the_page() -> None:
    text = markdown(sample())
    assert "| mixture top-2 | 0.8650 | **0.7099** | 1.0202 |" in text
    assert "| french member | 0.9989 | 0.9877 | **1.0101** |" in text
    assert "| soup | −0.0866 \\[−0.0911, −0.0821\\] | better −4.3 % |" in text
    assert "- mean\\<=oracle: fails" in text
    assert "- french is never chosen in layer 2" in text
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", row)) >= 3


def evil() -> dict[str, Any]:
    """A report in which every string that comes from outside is hostile."""
    words = {
        "python": EVIL,
        "french": "a\"b'c&<i>|`*",
        "mixture top-2": "</style><b>",
        "soup": "]]><svg/onload=1>",
    }
    text = json.dumps(sample())
    for old, new in words.items():
        text = text.replace(f'"{old}"', json.dumps(new))
    report: dict[str, Any] = json.loads(text)
    report["routing"]["top_tokens"][EVIL] = [{"text": "</code><script>1</script>", "count": 5, "lift": 2.0}]
    report["routing"]["examples"][0]["tokens"][0]["text"] = "</span><script>2</script>\x00"
    report["verdict"] |= {"headline": EVIL, "sentences": [EVIL], "advice": [EVIL]}
    return report | {"command": EVIL + "```", "model": EVIL, "made": EVIL}


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    path = write_report(evil(), tmp_path)
    html = path.read_text(encoding="utf-8")
    reader = StrictReader(html)
    tags = [tag for tag, _ in reader.tags]
    assert (tags.count("script"), tags.count("style")) == (1, 1)
    assert not {"i", "b"} & {tag for tag, given in reader.tags if given} - {"b"}
    assert not any(name.startswith("on") for _, given in reader.tags for name in given)
    shown = "".join(reader.text)
    assert EVIL in shown
    assert "</code><script>1</script>" in shown
    assert "</span><script>2</script>\ufffd" in shown
    assert "\x00" not in html
    outside = re.sub(r"\\[<>]", "", (tmp_path / "report.md").read_text(encoding="utf-8"))
    fenced = outside.split("````")
    assert "<" not in fenced[0] + fenced[2]


def test_numbers_that_are_none_are_missing_everywhere(tmp_path: Path) -> None:
    report = sample()
    report["contestants"][0]["bits_per_byte"]["python"] = math.nan
    report["contestants"][1]["mean"] = math.inf
    report["differences"][0] |= {"difference": math.nan, "low": math.nan, "high": math.nan}
    report["routing"]["entropy"]["python"] = [math.nan, math.nan]
    report["routing"]["confidence"]["python"] = [math.nan, 0.9]
    path = write_report(report, tmp_path)
    html = path.read_text(encoding="utf-8")
    StrictReader(html)
    assert not re.search(r"\bnan\b|\binf\b|NaN|Infinity", html.partition("<script>")[0])
    assert read(tmp_path / "report.json")["contestants"][0]["bits_per_byte"]["python"] is None
    assert jsonable({1: (math.inf, "a\ud800")}) == {"1": [None, "a\ufffd"]}


def test_the_front_is_who_nobody_beats() -> None:
    front = {p.name: p.front for p in quality.points(sample())}
    # the soup is as cheap as the members and better; the oracle is better still, but nobody can run it
    assert front == {"python": False, "french": False, "soup": True, "oracle": False, "mixture top-2": True}
    dense = sample(**DENSE)
    assert quality.points(dense) == []
    assert quality.scatter(dense) is None


def test_answers_follow_the_interval() -> None:
    assert [judged(-2, -1), judged(-1, 1), judged(1, 2), judged(None, 1)] == [
        "better",
        "unclear",
        "worse",
        "unclear",
    ]
    assert judged(1, 2, lower_is_better=False) == "better"
    report = sample()
    assert sections.status(report) == ("unclear", "yes to 1 of 2 questions")
    report["verdict"]["questions"][1]["answer"] = "no"
    assert sections.status(report) == ("worse", "yes to 1 of 2 questions")
    report["verdict"]["questions"] = report["verdict"]["questions"][:1]
    assert sections.status(report) == ("better", "yes to 1 of 1 questions")


def test_unclear_says_to_which_side() -> None:
    def told(relative: float) -> str:
        cell = quality.is_better({"relative": relative, "low": -1.0, "high": 1.0, "answer": "unclear"})
        return f"{cell.text} {cell.small}"

    assert [told(0.0019), told(-0.012), told(0.0)] == [
        "unclear (0.19 % worse)",
        "unclear (1.2 % better)",
        "unclear ",
    ]


def test_tasks_say_which_way_is_better() -> None:
    scores = {"a": {"value": 0.5, "low": 0.4, "high": 0.6}, "b": {"value": 0.75}, "c": {"value": None}}
    differences = [{"of": "a", "against": "b", "difference": -0.25, "low": -0.3, "high": -0.2}]
    task = {"name": "t", "kind": "choice", "metric": "accuracy", "examples": 4, "scores": scores}

    def rows(**more: Any) -> list[list[str]]:
        (panel,) = sections.tasks({"tasks": [task | more]})
        return [
            [*(f"{c.text}{'*' if c.mark == 'best' else ''}" for c in r if c.plot is None)]
            for r in panel.table.rows
        ]

    assert rows() == [["b", "0.750*"], ["a", "0.500"], ["c", "", "–"]]
    assert rows(higher_is_better=False)[0] == ["a", "0.500*"]
    assert [r[1] for r in rows(higher_is_better=None)[:2]] == ["0.500", "0.750"]
    assert rows(differences=differences)[0] == ["b", "0.750*", "worse"]
    assert rows(differences=differences, higher_is_better=False)[1] == ["b", "0.750", "better"]
    noted = sections.tasks({"tasks": [task | {"chance": 0.25, "notes": {"a": "moved"}}]})[0].table
    assert noted.note == "by chance 0.250; a: moved"


def test_figures_are_written_for_people() -> None:
    assert [human(v, even=True) for v in (692_000_000, 1_080_000_000, 999_600, 520, 61.3)] == [
        "692 M",
        "1.08 B",
        "1.00 M",
        "520",
        "61.3",
    ]
    assert human(1_384_190_400, "B") == "1.38 GB"
    assert [signed(v) for v in (-0.01234, 0.01234, 0.0, -0.00001)] == [
        "−0.0123",
        "+0.0123",
        "0.0000",
        "0.0000",
    ]
    assert escaped("a|b\n<c>&`d`") == "a\\|b \\<c\\>&amp;\\`d\\`"


def test_scales_are_linear_or_logarithmic() -> None:
    scale = svg.Scale(-1.0, 3.0)
    assert [scale.at(v) for v in (-1, 0, 3, 99)] == [0, 25, 100, 100]
    assert scale.ticks(4) == [-1, 0, 1, 2, 3]
    log = svg.Scale(1.0, 100.0, True)
    assert [log.at(v) for v in (1, 10, 100)] == [0, 50, 100]
    assert log.ticks(7) == [1, 2, 5, 10, 20, 50, 100]
    assert svg.labels([-0.05, 0.0, 0.1]) == ["−0.05", "0", "0.10"]
    assert svg.Scale.of([], zero=False).ticks()


def test_labels_of_the_scatter_plot_keep_apart() -> None:
    points = [svg.Point(f"p{i}", "mixture", 1e8, 1.0 + i * 1e-4, False, f"label {i}") for i in range(6)]
    drawn = str(svg.scatter([*points, svg.Point("q", "soup", 1e9, 2.0, True, "far")], "told"))
    heights = [float(y) for y in re.findall(r'<text class="label mixture" x="[^"]+" y="([\d.]+)"', drawn)]
    assert len(heights) == 6
    assert all(b - a >= svg.LABEL for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False))


def test_many_experts_are_cut_to_those_in_use() -> None:
    names = [f"expert {e}" for e in range(40)]
    row = [0.0] * 40
    row[3], row[38] = 0.25, 0.75
    found = routing() | {"experts": names, "share": {"a": [row, row]}}
    shown = routes.shown_experts(found)
    assert len(shown) == MOST_EXPERTS
    assert {3, 38} <= set(shown)
    assert routes.shares(found).note == "the 16 most used of 40 experts"


def test_words_of_a_passage_have_one_speaker() -> None:
    (passage,) = routes.passages(routing())
    assert [(w.space, w.text, w.speaker, w.first) for w in passage.words] == [
        ("", "def", 0, True),
        ("", " étés", 1, True),
        ("\n    ", "return", 0, True),
    ]
    assert passage.speakers == [(0, "python", "60 %"), (1, "french", "40 %")]


def test_dead_layers_are_told_in_ranges() -> None:
    dead = [{"layer": n, "expert": "a"} for n in (9, 3, 4, 5)] + [{"layer": 1, "expert": "b"}]
    assert routes.dead({"dead": dead}) == [("a", "layers 3–5, 9"), ("b", "layer 1")]
