"""The verdict at a terminal: a sentence, who is better and where, whom the router chose, what else is to be said.

    for part in render(report): console.print(part)

Takes the report's dict (evaluate/record.py), so that what is printed is what is in the files, and the tables of the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from octad.figures import percent
from octad.report.page import quality, routes
from octad.report.table import Cell, Column, Table, busiest
from octad.report.terminal import table

Report = Mapping[str, Any]


def render(report: Report, *, brief: bool = False) -> Iterator[RenderableType]:
    """Sentence, tables, sentences, advice, requirements; `brief`: of the sentences the first, and no advice, which the
    report's page has."""
    found = report["verdict"]
    yield Text(f"\n{found['headline']}", style="bold")
    for t in (quality.standing(report), quality.standing_by_domain(report), load(report, noted=not brief)):
        if t is not None:
            yield Text()
            yield table(t)
    yield Text("\n" + "\n".join(found["sentences"][: 1 if brief else None]))
    if found["advice"] and not brief:
        yield Text("\nwhat to try next", style="bold")
        yield from (Text(f"- {line}") for line in found["advice"])
    if report["requirements"]:
        yield requirements(report["requirements"])


def load(report: Report, *, noted: bool = True) -> Table | None:
    """The share of choices that each expert gets, by kind of text, over all layers; those chosen least in one column."""
    rows, experts = report.get("load"), report.get("experts") or []
    if not rows:
        return None
    shown = busiest([max(shares[e] for shares in rows.values()) for e in range(len(experts))])
    columns = [Column("text"), *(Column(experts[e], numeric=True, speaker=e) for e in shown)]
    if left := len(experts) - len(shown):
        columns.append(Column(f"{left} others", numeric=True))
    cells = []
    for domain, shares in rows.items():
        values = [shares[e] for e in shown]
        values += [1 - sum(values)] if left else []
        cells.append([Cell(domain), *(Cell(percent(v), v) for v in values)])
    return Table(
        "Who is chosen: each expert's share, mean over the layers",
        columns,
        cells,
        routes.most_possible(report) if noted else "",
    )


def requirements(found: Sequence[Mapping[str, Any]]) -> Group:
    """Each in one line with its numbers: the case that fails most, or the closest one."""
    return Group(Text(""), *(_requirement(entry) for entry in found))


def _requirement(entry: Mapping[str, Any]) -> Text:
    pick = min if entry["holds"] else max
    case = pick((c for c in entry["cases"] if c["holds"] == entry["holds"]), key=_distance)
    word, style = ("true", "green") if entry["holds"] else ("untrue", "red")
    failed = sum(not c["holds"] for c in entry["cases"])
    count = f" ({failed} of {len(entry['cases'])} domains)" if failed and len(entry["cases"]) > 1 else ""
    return Text.assemble(
        ("required: ", ""),
        (entry["text"], "bold"),
        (f": {word}", style),
        f"{count}: {case['left']} {case['left_value']:.4f}, {case['right']} {case['right_value']:.4f}",
    )


def _distance(case: Mapping[str, Any]) -> float:
    return abs(float(case["left_value"]) - float(case["right_value"]))
