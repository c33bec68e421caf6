"""One table in the terminal, HTML and Markdown: the same cells, and none of them cut at any width."""

import io

import pytest
from rich.console import Console
from sample_report import EVIL, StrictReader

from octad.report import html, markdown, terminal
from octad.report.table import Cell, Column, Table

WIDE = Table.of(
    "Bits per byte",
    ["contestant", *(f">domain {d}" for d in range(9)), "said"],
    [
        [f"member {m}", *(f"{m}.{d}234" for d in range(9)), "as it was before it joined the others here"]
        for m in (1, 2)
    ],
    note="a note",
)


def printed(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal.table(table))
    return console.export_text()


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_a_terminal_of_any_width_shows_every_figure(width: int) -> None:
    text = printed(WIDE, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in WIDE.rows:
        for cell in row[:-1]:
            assert cell.text in text
    words = " ".join(text.split())
    assert "as it was" in words
    assert words.endswith("a note")
    first = [line for line in text.splitlines() if line.startswith("member 1")]
    assert len(first) == text.count("contestant")  # each part says whose figures they are


def test_columns_of_numbers_stand_on_the_right_and_drawings_are_left_out() -> None:
    table = Table(
        "",
        [Column("a"), Column("n", numeric=True), Column("plot", plot=True)],
        [[Cell("x"), Cell("1"), Cell("?")], [Cell("y"), Cell("100"), Cell("?")]],
    )
    assert printed(table, 80).splitlines() == ["a    n", "x    1", "y  100"]
    assert markdown.table(table) == "| a | n |\n|---|--:|\n| x | 1 |\n| y | 100 |"


def test_numbers_stand_below_each_other_whatever_is_behind_them() -> None:
    table = Table.of(
        "", ["a", ">n"], [["x", Cell("9.5", small="much longer")], ["y", Cell("120.5", small="b")]]
    )
    assert printed(table, 80).split("\n")[1:3] == ["x    9.5 much longer", "y  120.5 b          "]


def test_a_row_of_bars_is_not_broken() -> None:
    bars = "▁▂▃▄▅▆▇█" * 4
    table = Table.of("", ["expert", ">a long heading", ">another heading", "layers"], [["x", "1", "2", bars]])
    assert bars in printed(table, 50)


def test_markup_of_no_kind_is_taken_from_cells() -> None:
    table = Table.of("[bold]c[/]", ["a"], [[f"[red]{EVIL}|`"]])
    assert f"[red]{EVIL}|`" in printed(table, 80)
    reader = StrictReader(html.table(table))
    assert EVIL in "".join(reader.text)
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    assert "<script>" not in markdown.table(table)


def test_the_marks_of_cells_are_colours_in_a_terminal() -> None:
    table = Table.of(
        "",
        ["a"],
        [[Cell("yes", mark="chip better", small="[1, 2]")], [Cell("7", speaker=1)]],
        marks=["mixture", ""],
    )
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(terminal.table(table))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[32myes" in text  # green
    assert "yes\x1b[0m\x1b[2;36m [1, 2]" in text or "[1, 2]" in text
    assert "\x1b[32m7" in text  # the second speaker's colour
