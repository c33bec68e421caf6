"""`octad evaluate --tasks`: what came out, as tables with intervals or as JSON.

show(verdict.report["tasks"])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from octad.report import terminal
from octad.report.table import Table


def tell(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """The rows of all tasks, for a person or a program."""
    if as_json:
        print(json.dumps({"tasks": rows}, indent=2, ensure_ascii=False))
    else:
        show(rows)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One table a measure: a contestant a line, best first where there is a best, with the difference to the first."""
    for row in rows:
        terminal.out.print()
        terminal.out.print(terminal.table(_table(row)))
    for name, note in (rows[0]["notes"] if rows else {}).items():
        terminal.out.print(Text(f"  {name}: {note}"), style="dim")
    for wall in dict.fromkeys(row["sandbox"] for row in rows if "sandbox" in row):
        terminal.out.print(f"\nprograms ran behind walls ({wall})", style="dim")


def _table(row: Mapping[str, Any]) -> Table:
    chance = f", guessing {row['chance']:.3f}" if row["chance"] is not None else ""
    caption = f"{row['name']}: {row['metric']}, {row['examples']} examples{chance}; 95 % intervals"
    differences = {d["against"]: d for d in row["differences"]}
    of = row["differences"][0]["of"] if row["differences"] else ""
    titles = ["", f">{row['metric']}", ">interval"]
    titles += [f">{of} less this", ">interval"] if differences else []
    cells = []
    for name, score in _ordered(row):
        line = [name, f"{score['value']:.3f}", f"{score['low']:.3f}-{score['high']:.3f}"]
        if differences:
            d = differences.get(name)
            line += [f"{d['difference']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}"] if d else ["", ""]
        cells.append(line)
    return Table.of(caption, titles, cells, marks=["mixture" * (line[0] == of) for line in cells])


def _ordered(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Contestants with their scores, the best first; as they came where neither end is better."""
    scores, better = list(row["scores"].items()), row["higher_is_better"]
    if better is None:
        return scores
    return sorted(scores, key=lambda entry: -entry[1]["value"] if better else entry[1]["value"])
