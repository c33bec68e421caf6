"""The report's dict as tables and plots: the verdict, differences, quality beside price, requirements, tasks, settings.

    sections.bits(report), sections.price(report), sections.differences(report)

Each function takes the whole report and answers None (or an empty list) where it holds nothing of the kind: a dense model
has no routers, a mixture that octad did not make no members. Routing has a file of its own, routes.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from octad.evaluate.page import svg
from octad.evaluate.page.tables import (
    Cell,
    Column,
    Table,
    human,
    interval,
    judged,
    mean,
    number,
    percent,
    signed,
)

Report = Mapping[str, Any]
MEAN = "mean"
ANSWERS = {"yes": "better", "no": "worse", "unclear": "unclear"}
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


# ---- the verdict ---------------------------------------------------------------------------------------------


def questions(report: Report) -> Table | None:
    """The questions of the verdict with their answers."""
    asked = (report.get("verdict") or {}).get("questions") or []
    if not asked:
        return None
    scale = svg.Scale.of(
        v for q in asked for v in (q.get("difference"), q.get("low"), q.get("high")) if v is not None
    )
    columns = [
        Column("question"),
        Column("answer"),
        Column("difference, bits per byte", plot=True, hint="left of the line: the mixture is better"),
        Column("difference", numeric=True),
    ]
    rows = []
    for q in asked:
        mark = ANSWERS.get(q.get("answer"), "unclear")
        rows.append(
            [
                Cell(q["question"], small=f"against {q['against']}" if q.get("against") else ""),
                Cell(q.get("answer") or "unclear", mark=f"chip {mark}"),
                *_difference_cells(q, scale, mark, q["question"]),
            ]
        )
    return Table("Questions and answers", columns, rows, axis=svg.axis(scale), kind="forest questions")


def status(report: Report) -> tuple[str, str] | None:
    """What all the questions together say: a mark, and words."""
    asked = (report.get("verdict") or {}).get("questions") or []
    if not asked:
        return None
    answers = [q.get("answer") for q in asked]
    mark = "worse" if "no" in answers else "better" if set(answers) == {"yes"} else "unclear"
    return mark, f"yes to {answers.count('yes')} of {len(answers)} questions"


def worse_on(report: Report) -> Table | None:
    """Where the mixture loses."""
    cases = (report.get("verdict") or {}).get("worse_on") or []
    if not cases:
        return None
    columns = [Column("domain"), Column("against"), Column("bits per byte more", numeric=True)]
    rows = [
        [
            Cell(c["domain"]),
            Cell(c["against"]),
            Cell(signed(c["difference"]), c["difference"], small=interval(c.get("low"), c.get("high"))),
        ]
        for c in cases
    ]
    return Table("Domains on which it is worse", columns, rows)


# ---- differences ---------------------------------------------------------------------------------------------


def _difference_cells(d: Mapping[str, Any], scale: svg.Scale, mark: str, label: str) -> list[Cell]:
    """The drawing, and the figure with its interval."""
    value, low, high = d.get("difference"), d.get("low"), d.get("high")
    if value is None:
        return [Cell(""), Cell(number(None))]
    told = f"{label}: {signed(value)} {interval(low, high)}, {mark}"
    return [
        Cell("", plot=svg.whisker(scale, value, low, high, mark, told)),
        Cell(signed(value), value, small=interval(low, high)),
    ]


@dataclass(frozen=True)
class Panel:
    """One forest plot; `key`: whether it is among those that are shown first."""

    title: str
    table: Table
    key: bool


def differences(report: Report) -> list[Panel]:
    """A forest plot of the means against every contestant, for each contestant that is compared (of several, the first
    is the key)."""
    found = [d for d in report.get("differences") or [] if d.get("domain") == MEAN]
    subjects = list(dict.fromkeys(str(d["of"]) for d in found))
    return [
        Panel(
            of,
            _forest([d for d in found if d["of"] == of], "against", f"{of}: difference of the mean"),
            at == 0,
        )
        for at, of in enumerate(subjects)
    ]


def domain_differences(report: Report) -> list[Panel]:
    """For each opponent a forest plot of the domains; opponents that are no members are the key ones."""
    found = report.get("differences") or []
    pairs = list(dict.fromkeys((str(d["of"]), str(d["against"])) for d in found if d.get("domain") != MEAN))
    panels = []
    for of, against in pairs:
        rows = [d for d in found if d["of"] == of and d["against"] == against]
        rows.sort(key=lambda d: d["domain"] != MEAN)
        key = kind_of(report, against) != "member" and of == pairs[0][0]
        panels.append(
            Panel(f"{of} against {against}", _forest(rows, "domain", f"{of} against {against}"), key)
        )
    return panels


def _forest(rows: Sequence[Mapping[str, Any]], by: str, caption: str) -> Table:
    scale = svg.Scale.of(
        v for d in rows for v in (d.get("difference"), d.get("low"), d.get("high")) if v is not None
    )
    columns = [
        Column(by),
        Column("bits per byte", plot=True),
        Column("difference", numeric=True),
        Column("it is"),
    ]
    cells = []
    for d in rows:
        mark = judged(d.get("low"), d.get("high"))
        relative = d.get("relative")
        share = f"{signed(100 * relative, 1)} %" if relative is not None else ""
        told = Cell(mark, relative, mark=f"chip {mark}", small=share)
        cells.append([Cell(str(d[by])), *_difference_cells(d, scale, mark, str(d[by])), told])
    marks = ["mean" if by == "domain" and d["domain"] == MEAN else "" for d in rows]
    return Table(caption, columns, cells, axis=svg.axis(scale), kind="forest", marks=marks)


# ---- quality and price ---------------------------------------------------------------------------------------


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
                *(Cell(human(c["price"].get(k), unit), c["price"].get(k)) for k, _, unit in used),
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
    told = f"bits per byte over {axis[1]}: " + "; ".join(f"{p.name} {p.y:.4f} at {human(p.x)}" for p in found)
    kinds = [k for k in svg.KINDS if any(p.kind == k for p in found)]
    legend = [(svg.key(svg.KINDS[k], f"mark {k}"), k) for k in kinds]
    return Scatter(svg.scatter(found, told), axis[1], legend)


# ---- requirements, tasks, settings ---------------------------------------------------------------------------


def requirements(report: Report) -> list[Table]:
    """A table for each requirement, of its cases."""
    tables = []
    for r in report.get("requirements") or []:
        columns = [
            Column("left"),
            Column("bits per byte", numeric=True),
            Column("right"),
            Column("bits per byte", numeric=True),
            Column("holds"),
        ]
        rows = [
            [
                Cell(c["left"]),
                Cell(number(c["left_value"]), c["left_value"]),
                Cell(c["right"]),
                Cell(number(c["right_value"]), c["right_value"]),
                _holds(c["holds"]),
            ]
            for c in r.get("cases") or []
        ]
        tables.append(Table(r["text"], columns, rows, note="holds" if r["holds"] else "fails"))
    return tables


def _holds(holds: bool) -> Cell:
    return Cell("holds" if holds else "fails", mark=f"chip {'better' if holds else 'worse'}")


def tasks(report: Report) -> list[Panel]:
    """A table a task: each contestant's score with its interval, best first. Scores: more is better."""
    panels = []
    for t in report.get("tasks") or []:
        scores = sorted((t.get("scores") or {}).items(), key=lambda s: -(s[1].get("value") or 0))
        numbers = [
            v for _, s in scores for v in (s.get("value"), s.get("low"), s.get("high")) if v is not None
        ]
        scale = svg.Scale.of(numbers)
        most = max((s["value"] for _, s in scores if s.get("value") is not None), default=None)
        columns = [
            Column("contestant"),
            Column(t.get("metric") or "score", plot=True),
            Column("score", numeric=True),
        ]
        rows = [[Cell(n), *_score_cells(n, s, scale, most)] for n, s in scores]
        title = f"{t['name']}: {t.get('metric') or 'score'}, {t.get('examples') or '?'} examples ({t.get('kind')})"
        panels.append(
            Panel(t["name"], Table(title, columns, rows, axis=svg.axis(scale), kind="forest"), True)
        )
    return panels


def _score_cells(name: str, s: Mapping[str, Any], scale: svg.Scale, most: float | None) -> list[Cell]:
    value, low, high = s.get("value"), s.get("low"), s.get("high")
    if value is None:
        return [Cell(""), Cell(number(None))]
    between = "" if low is None or high is None else f"[{number(low, 3)}, {number(high, 3)}]"
    plot = svg.whisker(scale, value, low, high, "score", f"{name}: {number(value, 3)} {between}")
    return [
        Cell("", plot=plot),
        Cell(number(value, 3), value, "best" if value == most else "", small=between),
    ]


def domains(report: Report) -> Table | None:
    """How much text was judged."""
    keys = ("documents", "windows", "tokens", "bytes")
    rows = [
        [Cell(str(d["name"])), *(Cell(f"{d[k]:,}" if d.get(k) is not None else "–", d.get(k)) for k in keys)]
        for d in report.get("domains") or []
    ]
    return Table("Text", [Column("domain"), *(Column(k, numeric=True) for k in keys)], rows) if rows else None


def settings(report: Report) -> list[tuple[str, str]]:
    """Settings and machine, in words."""
    machine = report.get("machine") or {}
    facts = {k.replace("_", " "): v for k, v in (report.get("settings") or {}).items()}
    if "level" in facts and isinstance(facts["level"], float):
        facts["level"] = percent(facts["level"])
    facts |= {
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "GPU": machine.get("gpu") or "none",
    }
    if machine.get("memory_gb") is not None:
        facts["memory"] = f"{machine['memory_gb']:.1f} GB"
    facts |= {"octad": report.get("octad"), "made": report.get("made")}
    return [
        (k, f"{v:,}" if isinstance(v, int) and k != "seed" else str(v))
        for k, v in facts.items()
        if v is not None
    ]
