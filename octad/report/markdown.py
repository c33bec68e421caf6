"""The report as Markdown: the page's tables without its drawings, as GitHub and model cards show them.

text = markdown(report)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from octad.report.page import parts as sections
from octad.report.page import quality, routes
from octad.report.table import Cell, Table

SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$])")


def markdown(report: Mapping[str, Any]) -> str:
    """The whole document."""
    verdict = report.get("verdict") or {}
    parts = [f"# {escaped(verdict.get('headline') or report.get('model') or 'Report')}"]
    parts.append(" ".join(escaped(s) for s in verdict.get("sentences") or []))
    parts += _tables([quality.standing(report), quality.standing_by_domain(report)])
    parts += _tables([sections.questions(report), sections.worse_on(report)])
    if advice := verdict.get("advice"):
        parts += ["## What to try next", "\n".join(f"- {escaped(a)}" for a in advice)]
    parts += ["## Quality and price"]
    parts += _tables([panel.table for panel in sections.differences(report)])
    parts += _tables([quality.bits(report), quality.price(report)])
    if found := sections.requirements(report):
        parts += [
            "## Requirements",
            "\n".join(f"- {escaped(t.caption)}: {t.note}" for t in found),
            *_tables(found),
        ]
    if report.get("routing"):
        parts += ["## Routing", *_routing(report["routing"])]
    if tasks := sections.tasks(report):
        parts += ["## Tasks", *_tables([panel.table for panel in tasks])]
    parts += ["## How it was measured", *_tables([sections.domains(report)])]
    parts += ["\n".join(f"- {escaped(k)}: {escaped(v)}" for k, v in sections.settings(report))]
    if report.get("command"):
        parts += [_code(str(report["command"]))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _routing(routing: Mapping[str, Any]) -> list[str]:
    parts = _tables([routes.shares(routing), routes.by_domain(routing)])
    lines = [f"- {escaped(name)} is never chosen in {layers}" for name, layers in routes.dead(routing)]
    lines += [f"- nearly the same weights: {escaped(pair)}" for pair in routes.twins(routing)]
    lines += [
        f"- {escaped(name)} likes to read: " + ", ".join(escaped(token) for token, _ in tokens)
        for _, name, tokens in routes.top_tokens(routing)
    ]
    return [*parts, "\n".join(lines)]


def _tables(tables: Sequence[Table | None]) -> list[str]:
    shown = [t for t in tables if t is not None and t.rows]
    return [
        f"**{escaped(t.caption)}**\n\n{table(t)}" + (f"\n\n{escaped(t.note)}" if t.note else "")
        for t in shown
    ]


def table(t: Table) -> str:
    """A pipe table; plots are left out, numbers stand on the right."""
    used = [i for i, column in enumerate(t.columns) if not column.plot]
    lines = ["| " + " | ".join(escaped(t.columns[i].title) for i in used) + " |"]
    lines += ["|" + "|".join("--:" if t.columns[i].numeric else "---" for i in used) + "|"]
    lines += ["| " + " | ".join(_cell(row[i]) for i in used) + " |" for row in t.rows]
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    if cell.mark == "best" and text:
        text = f"**{text}**"
    return f"{text} {escaped(cell.small)}".strip()


def escaped(text: object) -> str:
    """Text on one line that Markdown and HTML leave alone."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split())).replace("&", "&amp;")


def _code(text: str) -> str:
    """A fenced block that the text cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
