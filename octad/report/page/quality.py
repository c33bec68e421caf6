"""Quality beside price: bits per byte of every contestant and domain, what each costs, and the plot of the two.

    quality.bits(report), quality.price(report), quality.scatter(report)

None where the report holds nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from octad.figures import human, mean, number, share
from octad.report import svg
from octad.report.table import Cell, Column, Table, judged

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


# ---- who is better -------------------------------------------------------------------------------------------

ANSWERS = {"yes": "better", "no": "worse", "same": "same", "unclear": "unclear"}
EXPLAINED = (
    "oracle: the best part for each kind of text, told which kind it is; soup: one model, the mean of the parts' weights;"
    " ensemble: all parts run and are weighed; bits per byte: how badly a text is foreseen, less is better."
)


def standing(report: Report) -> Table | None:
    """Who is better, best first, and at what price: the table beside the verdict."""
    rows = sorted(contestants(report), key=lambda c: mean_of(c) or 0.0)
    if not rows:
        return None
    found = {d["against"]: d for d in _of_own(report) if d.get("domain") == "mean"}
    titles = ["contestant", ">bits/byte", f"{own(report)} is", ">active", ">tokens/s"]
    cells = [
        [
            Cell(c["name"], small=_kind(c)),
            Cell(number(mean_of(c)), mean_of(c)),
            is_better(found.get(c["name"])),
            _price_cell(c, "active_parameters"),
            _price_cell(c, "tokens_per_second"),
        ]
        for c in rows
    ]
    marks = [str(c.get("kind") or "") if c["name"] == own(report) else "" for c in rows]
    note = EXPLAINED if any(c.get("kind") == "oracle" for c in rows) else EXPLAINED.rpartition("; ")[2]
    return Table.of("Who is better, mean over the kinds of text", titles, cells, note=note, marks=marks)


def standing_by_domain(report: Report) -> Table | None:
    """The mixture on each kind of text beside the member that is best there."""
    rows = contestants(report)
    mine = next((c for c in rows if c["name"] == own(report)), None)
    members = [c for c in rows if c.get("kind") == "member"]
    if mine is None or not members:
        return None
    soup = next((c for c in rows if c.get("kind") == "soup"), None)
    found = {d["domain"]: d for d in _of_own(report) if d.get("against") == "oracle"}
    titles = ["text", f">{own(report)}", ">best member", "the mixture is", *([">soup"] if soup else [])]
    cells = []
    for domain in domain_names(report):
        known = [c for c in members if c["bits_per_byte"].get(domain) is not None]
        best = min(known, key=lambda c: float(c["bits_per_byte"][domain]), default=None)
        theirs = _bits_cell(best, domain, best["name"] if best else "")
        row = [Cell(domain), _bits_cell(mine, domain), theirs, is_better(found.get(domain))]
        cells.append([*row, _bits_cell(soup, domain)] if soup else row)
    return Table.of("By kind of text, bits per byte", titles, cells)


def own(report: Report) -> str:
    """The contestant that the verdict is about."""
    named = report.get("own") or next((str(d["of"]) for d in report.get("differences") or []), None)
    return str(named or "the model")


def _of_own(report: Report) -> list[Mapping[str, Any]]:
    return [d for d in report.get("differences") or [] if d["of"] == own(report)]


def answer(d: Mapping[str, Any]) -> str:
    """better, worse, same or unclear: as the verdict found it, else by the interval."""
    return ANSWERS.get(str(d.get("answer")), judged(d.get("low"), d.get("high")))


def is_better(d: Mapping[str, Any] | None) -> Cell:
    """8.6 % better, as good, unclear (0.3 % worse)."""
    if d is None or d.get("relative") is None:
        return Cell("")
    mark, size = answer(d), share(abs(d["relative"]))
    if mark == "unclear":
        side = "worse" if d["relative"] > 0 else "better"
        return Cell(mark, d["relative"], "chip unclear", small=f"({size} {side})" if d["relative"] else "")
    return Cell("as good" if mark == "same" else f"{size} {mark}", d["relative"], f"chip {mark}")


def _bits_cell(c: Mapping[str, Any] | None, domain: str, small: str = "") -> Cell:
    value = c["bits_per_byte"].get(domain) if c else None
    return Cell(number(value), value, small=small)


def _price_cell(c: Mapping[str, Any], key: str) -> Cell:
    value = (c.get("price") or {}).get(key)
    return Cell(human(value), value)


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
