"""The verdict at a terminal: a short paragraph, then the figures beside the price.

    for part in render(report): console.print(part)

Takes the report's dict (record.py), so that what is printed is what is in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]
MOST_EXPERTS = (
    12  # columns that a terminal has room for; of more experts those are shown that some text chooses most
)
ANSWERS = {"yes": "green", "no": "red", "unclear": "yellow"}


def render(report: Report, colours: Sequence[str]) -> Iterator[RenderableType]:
    """Table of figures, load, verdict, requirements. `colours`: of the experts."""
    yield figures(report)
    if report.get("load"):
        yield load(report, colours)
    yield verdict(report)
    if report["requirements"]:
        yield requirements(report["requirements"])


def figures(report: Report) -> Table:
    """One row a contestant, one column a domain, then what it costs; the best of a column in bold."""
    domains, rows = report["domains"], report["contestants"]
    counts = sorted(d["tokens"] for d in domains)
    table = _table(f"bits per byte, held-out text, {_range(counts[0], counts[-1])} tokens a domain")
    table.add_column("", no_wrap=True)
    for column in (*(d["name"] for d in domains), "mean", "active", "tokens/s"):
        table.add_column(escape(column), justify="right")
    names = [d["name"] for d in domains]
    best = {name: min(row["bits_per_byte"][name] for row in rows) for name in names}
    lowest = min(row["mean"] for row in rows)
    for row in rows:
        cells = [_figure(row["bits_per_byte"][name], best[name]) for name in names]
        price = row["price"]
        cost = (_millions(price["active_parameters"]), _rounded(price["tokens_per_second"]))
        style = "cyan" if row["kind"] == "mixture" else None
        table.add_row(escape(row["name"]), *cells, _figure(row["mean"], lowest), *cost, style=style)
    return table


def load(report: Report, colours: Sequence[str]) -> Table:
    """The share of choices that each expert gets, by domain, over all layers; those chosen least in one column."""
    rows, experts = report["load"], report["experts"]
    most = [max(shares[e] for shares in rows.values()) for e in range(len(experts))]
    shown = sorted(sorted(range(len(experts)), key=lambda e: -most[e])[:MOST_EXPERTS])
    table = _table("\nshare of choices per expert, mean over layers")
    table.add_column("text", no_wrap=True)
    for e in shown:
        table.add_column(escape(experts[e]), justify="right", style=colours[e % len(colours)], no_wrap=True)
    if left := len(experts) - len(shown):
        table.add_column(f"{left} others", justify="right", no_wrap=True)
    for domain, shares in rows.items():
        cells = [shares[e] for e in shown]
        cells += [1 - sum(cells)] if left else []
        table.add_row(escape(domain), *(f"{100 * share:.0f} %" for share in cells))
    return table


def verdict(report: Report) -> Group:
    """Headline, answers, sentences, advice."""
    found = report["verdict"]
    parts: list[RenderableType] = [Text(f"\n{found['headline']}", style="bold")]
    parts += [_answer(question) for question in found["questions"]]
    parts.append(Text(" ".join(found["sentences"])))
    if found["advice"]:
        parts.append(Text("\nwhat to try next", style="bold"))
        parts += [Text(f"  - {line}") for line in found["advice"]]
    return Group(*parts)


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


def _answer(question: Mapping[str, Any]) -> Text:
    against = f" ({question['against']})" if question["question"].startswith("better than every") else ""
    low, high = (f"{v:+.4f}" if v is not None else "?" for v in (question["low"], question["high"]))
    return Text.assemble(
        f"  {question['question']:27}",
        (f"{question['answer']:8}", ANSWERS[question["answer"]]),
        f"{question['difference']:+.4f}  [{low}, {high}]{against}",
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def _figure(value: float, best: float) -> str:
    return f"[bold]{value:.4f}[/]" if value == best else f"{value:.4f}"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f} M" if count >= 1e6 else f"{count:,}"


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
