"""Quality beside price: bits per byte of every contestant and domain, what each costs, and the plot of the two.

    quality.bits(report), quality.price(report), quality.scatter(report)

None where the report holds nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from octad.report import svg
from octad.report.figures import human, mean, number
from octad.report.table import Cell, Column, Table

Report = Mapping[str, Any]
PRICES = (
    ("total_parameters", "parameters", ""),
    ("active_parameters", "active", ""),
    ("flops_per_token", "FLOPs / token", ""),
    ("bytes", "weights", "B"),
    ("tokens_per_second", "tokens / s", ""),
    ("peak_memory_bytes", "peak memory", "B"),
)


def contestants(report: Report) -> list[dict[str, Any]]:
    """Those with a figure on some domain."""
    return [c for c in report.get("contestants") or [] if c.get("bits_per_byte")]


def domain_names(report: Report) -> list[str]:
    """Of the domains table, else in the order of the first contestant."""
    listed = [str(d["name"]) for d in report.get("domains") or []]
    rows = contestants(report)
    return listed or (list(rows[0]["bits_per_byte"]) if rows else [])


def mean_of(contestant: Mapping[str, Any]) -> float | None:
    """The mean that the report gives, else of its domains."""
    if contestant.get("mean") is not None:
        return float(contestant["mean"])
    return mean(contestant["bits_per_byte"].values())


def kind_of(report: Report, name: str) -> str:
    """A contestant's kind; "model" for an unknown one."""
    return next((str(c.get("kind")) for c in report.get("contestants") or [] if c["name"] == name), "model")


def bits(report: Report, measure: str = "bits_per_byte") -> Table | None:
    """A row a contestant, a column a domain; the best of each column is marked."""
    rows, names = contestants(report), domain_names(report)
    if not rows:
        return None
    values = [[c.get(measure, {}).get(d) for d in names] for c in rows]
    means = [mean_of(c) if measure == "bits_per_byte" else mean(v) for c, v in zip(rows, values, strict=True)]
    table = [[first, *line] for first, line in zip(means, values, strict=True)]
    best = [min((v for v in column if v is not None), default=None) for column in zip(*table, strict=True)]
    columns = [Column("contestant"), Column("mean", numeric=True), *(Column(d, numeric=True) for d in names)]
    cells = [
        [
            Cell(c["name"], small=_kind(c)),
            *(
                Cell(number(v), v, "best" if v is not None and v == b else "")
                for v, b in zip(line, best, strict=True)
            ),
        ]
        for c, line in zip(rows, table, strict=True)
    ]
    title = "Bits per byte of held-out text" if measure == "bits_per_byte" else "Nats per token"
    notes = "; ".join(f"{c['name']}: {c['note']}" for c in rows if c.get("note"))
    return Table(title, columns, cells, notes, kind="wide", marks=[str(c.get("kind") or "") for c in rows])


def _kind(contestant: Mapping[str, Any]) -> str:
    """What it is, where its name does not say so."""
    kind = str(contestant.get("kind") or "")
    return "" if kind in str(contestant["name"]) else kind


def price(report: Report) -> Table | None:
    """What each contestant costs, beside its quality; columns that nobody fills are left out."""
    rows = [c for c in contestants(report) if c.get("price")]
    used = [p for p in PRICES if any(c["price"].get(p[0]) is not None for c in rows)]
    if not used:
        return None
    columns = [Column("contestant"), Column("bits per byte", numeric=True), Column("Pareto")]
    columns += [Column(title, numeric=True) for _, title, _ in used]
    front = {p.name for p in points(report) if p.front}
    cells = []
    for c in rows:
        average, on_front = mean_of(c), c["name"] in front
        cells.append(
            [
                Cell(c["name"], small=_kind(c)),
                Cell(number(average), average),
                Cell("yes" if on_front else "", mark="chip better" if on_front else ""),
                *(Cell(human(c["price"].get(k), unit, even=True), c["price"].get(k)) for k, _, unit in used),
            ]
        )
    return Table("Price", columns, cells, kind="wide", marks=[str(c.get("kind") or "") for c in rows])


def price_axis(report: Report) -> tuple[str, str] | None:
    """What the scatter plot has across: the first measure that two contestants have."""
    for key, title in (("active_parameters", "active parameters"), ("flops_per_token", "FLOPs per token")):
        if sum(bool((c.get("price") or {}).get(key)) for c in contestants(report)) >= 2:
            return key, title
    return None


def points(report: Report) -> list[svg.Point]:
    """The contestants of the scatter plot. The oracle is drawn but on no front: nobody can run it without being told."""
    axis = price_axis(report)
    if axis is None:
        return []
    placed = [
        (c, float(c["price"][axis[0]]), average)
        for c in contestants(report)
        if (c.get("price") or {}).get(axis[0]) and (average := mean_of(c)) is not None
    ]
    runnable = [(x, y) for c, x, y in placed if c.get("kind") != "oracle"]
    members = [y for c, _, y in placed if c.get("kind") == "member"]
    found = []
    for c, x, y in placed:
        beaten = any((a <= x and b < y) or (a < x and b <= y) for a, b in runnable)
        kind = str(c.get("kind") or "model")
        label = str(c["name"]) if kind != "member" else ""
        if kind == "member" and y in (min(members), max(members)):
            label = f"{c['name']} ({'best' if y == min(members) else 'worst'} member)"
        found.append(svg.Point(str(c["name"]), kind, x, y, kind != "oracle" and not beaten, label))
    return found


@dataclass(frozen=True)
class Scatter:
    """The drawing, what is across, and the marks that it uses as (mark, word)."""

    plot: Markup
    across: str
    legend: list[tuple[Markup, str]]


def scatter(report: Report) -> Scatter | None:
    """Quality over price."""
    axis, found = price_axis(report), points(report)
    if axis is None:
        return None
    told = f"bits per byte over {axis[1]}: " + "; ".join(
        f"{p.name} {p.y:.4f} at {human(p.x, even=True)}" for p in found
    )
    kinds = [k for k in svg.KINDS if any(p.kind == k for p in found)]
    legend = [(svg.key(svg.KINDS[k], f"mark {k}"), k) for k in kinds]
    return Scatter(svg.scatter(found, told), axis[1], legend)
