"""`octad evaluate --tasks`: run the tasks with a progress bar, print a table with intervals, or JSON.

rows = run(model, "humaneval,octad-choice", members=True)      # the rows of the report's "tasks"
show(rows)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from octad.dist import keep_freed_memory
from octad.report import terminal


def tell(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """The rows of all tasks, for a person or a program."""
    if as_json:
        print(json.dumps({"tasks": rows}, indent=2, ensure_ascii=False))
    else:
        show(rows)


def run(model: str | Path, tasks: str, **options: Any) -> list[dict[str, Any]]:
    """The rows of all tasks (names and files, separated by commas); options as in run_tasks."""
    from octad.evaluate.tasks.run_tasks import run_tasks

    keep_freed_memory()
    references = [name.strip() for name in tasks.split(",") if name.strip()]
    with terminal.progress_bar() as progress:
        return run_tasks(model, references, progress=progress, **options)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One table a measure: a contestant a line, best first where there is a best, with the difference to the first."""
    for row in rows:
        chance = f", guessing {row['chance']:.3f}" if row["chance"] is not None else ""
        title = f"{row['name']}: {row['metric']}, {row['examples']} examples{chance}; 95 % intervals"
        terminal.out.print(Text(f"\n{title}", style="italic"), soft_wrap=True)
        terminal.out.print(_table(row))
    for name, note in (rows[0]["notes"] if rows else {}).items():
        terminal.out.print(Text(f"  {name}: {note}"), style="dim")
    for wall in dict.fromkeys(row["sandbox"] for row in rows if "sandbox" in row):
        terminal.out.print(f"\nprograms ran behind walls ({wall})", style="dim")


def _table(row: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    differences = {d["against"]: d for d in row["differences"]}
    of = row["differences"][0]["of"] if row["differences"] else ""
    table.add_column("", no_wrap=True)
    table.add_column(row["metric"], justify="right")
    table.add_column("interval", justify="right")
    if differences:
        table.add_column(f"{of} less this", justify="right")
        table.add_column("interval", justify="right")
    for name, score in _ordered(row):
        cells = [f"{score['value']:.3f}", f"{score['low']:.3f}-{score['high']:.3f}"]
        if other := differences.get(name):
            cells += [f"{other['difference']:+.3f}", f"{other['low']:+.3f} to {other['high']:+.3f}"]
        table.add_row(Text(name), *cells, style="cyan" if name == of else None)
    return table


def _ordered(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Contestants with their scores, the best first; as they came where neither end is better."""
    scores, better = list(row["scores"].items()), row["higher_is_better"]
    if better is None:
        return scores
    return sorted(scores, key=lambda entry: -entry[1]["value"] if better else entry[1]["value"])
