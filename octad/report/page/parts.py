"""The report's dict as tables and plots: the verdict, differences, requirements, tasks, settings.

    sections.questions(report), sections.differences(report), sections.tasks(report)

Each function takes the whole report and answers None (or an empty list) where it holds nothing of the kind: a dense model
has no routers, a mixture that octad did not make no members. Quality and price, and routing, have files of their own:
quality.py, routes.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octad.figures import change, interval, number, percent, signed
from octad.report import svg
from octad.report.page.quality import ANSWERS, Report, answer, kind_of
from octad.report.table import Cell, Column, Table, judged

MEAN = "mean"


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
        mark = ANSWERS.get(str(q.get("answer")), "unclear")
        rows.append(
            [
                Cell(q["question"], small=f"against {q['against']}" if q.get("against") else ""),
                Cell("as good" if mark == "same" else q.get("answer") or "unclear", mark=f"chip {mark}"),
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
        mark = answer(d)
        relative = d.get("relative")
        share = change(relative, 1) if relative is not None else ""
        told = Cell("as good" if mark == "same" else mark, relative, mark=f"chip {mark}", small=share)
        cells.append([Cell(str(d[by])), *_difference_cells(d, scale, mark, str(d[by])), told])
    marks = ["mean" if by == "domain" and d["domain"] == MEAN else "" for d in rows]
    return Table(caption, columns, cells, axis=svg.axis(scale), kind="forest", marks=marks)


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
    """A table a measure of a task: each contestant's score with its interval, best first, and how the mixture does."""
    return [Panel(str(t["name"]), _task(t), True) for t in report.get("tasks") or []]


def _task(t: Mapping[str, Any]) -> Table:
    """`higher_is_better` (true where it is not said; null: neither), `chance`, `differences` and `notes` are taken where
    they are there."""
    rising = t.get("higher_is_better", True)
    scores = sorted((t.get("scores") or {}).items(), key=lambda s: _rank(s[1].get("value"), rising))
    numbers = [v for _, s in scores for v in (s.get("value"), s.get("low"), s.get("high")) if v is not None]
    scale = svg.Scale.of(numbers, zero=rising is not False)
    known = [s["value"] for _, s in scores if s.get("value") is not None]
    best = None if rising is None or not known else (max if rising else min)(known)
    compared = {d["against"]: d for d in t.get("differences") or []}
    metric = str(t.get("metric") or "score")
    columns = [Column("contestant"), Column(metric, plot=True), Column("score", numeric=True)]
    columns += [Column(f"{next(iter(compared.values()))['of']} is")] if compared else []
    rows = [
        [
            Cell(n),
            *_score_cells(n, s, scale, best),
            *([_compared(compared.get(n), rising)] if compared else []),
        ]
        for n, s in scores
    ]
    title = f"{t['name']}: {metric}, {t.get('examples') or '?'} examples ({t.get('kind')})"
    told = [f"by chance {number(t['chance'], 3)}"] if t.get("chance") is not None else []
    told += ["lower is better"] if rising is False else []
    told += [f"{name}: {note}" for name, note in (t.get("notes") or {}).items()]
    return Table(title, columns, rows, "; ".join(told), axis=svg.axis(scale), kind="forest scores")


def _rank(value: float | None, rising: bool | None) -> tuple[bool, float]:
    """Best first, unknown last; in the order given where nothing is better."""
    if value is None or rising is None:
        return value is None, 0.0
    return False, -value if rising else value


def _compared(d: Mapping[str, Any] | None, rising: bool | None) -> Cell:
    """Whether the mixture is better than this contestant."""
    if d is None or d.get("difference") is None:
        return Cell("")
    mark = judged(d.get("low"), d.get("high"), lower_is_better=rising is False)
    return Cell(mark, d["difference"], f"chip {mark}", signed(d["difference"], 3))


def _score_cells(name: str, s: Mapping[str, Any], scale: svg.Scale, best: float | None) -> list[Cell]:
    value, low, high = s.get("value"), s.get("low"), s.get("high")
    if value is None:
        return [Cell(""), Cell(number(None))]
    between = "" if low is None or high is None else f"[{number(low, 3)}, {number(high, 3)}]"
    plot = svg.whisker(scale, value, low, high, "score", f"{name}: {number(value, 3)} {between}")
    return [
        Cell("", plot=plot),
        Cell(number(value, 3), value, "best" if value == best else "", small=between),
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
