"""What the functions of octad give back: what was written and where, and what a comparison found.

written = octad.combine("recipe.yaml", "mixture")     # a path, with what is to be said of it
verdict = octad.evaluate(written, "domains.yaml")     # in a notebook: a sentence and a table
verdict.headline, verdict.to_pandas(), verdict.save("report")
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octad.errors import RequestError
from octad.figures import duration
from octad.guard import jsonable
from octad.report.page import quality
from octad.report.table import Table

if TYPE_CHECKING:
    from octad.checkpoint.source import TensorSource

LOG = "log.jsonl"  # of a training run


class Written(os.PathLike[str]):
    """Something on disk that octad made: where it is, how long it took, and facts by name. It can be given wherever a
    path is expected."""

    def __init__(self, path: Path, seconds: float, **facts: Any) -> None:
        self.path, self.seconds, self.facts = path, seconds, facts

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        state = "" if self.finished else "stopped and saved: "
        return f"<{state}{self.path}, {duration(self.seconds)}>"

    @property
    def finished(self) -> bool:
        """False where training was asked to stop: the same call goes on."""
        return bool(self.facts.get("finished", True))

    def records(self) -> list[dict[str, Any]]:
        """What a training run noted every few steps, oldest first; [] where there is no log."""
        log = self.path / LOG
        lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):  # cut short by a kill, or damaged
                continue
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the last line of a command with --json."""
        return {"output": str(self.path), "seconds": round(self.seconds, 1)} | dict(jsonable(self.facts))


class Verdict:
    """What an evaluation found. `report` is all of it as plain data, the same as in report.json."""

    def __init__(self, report: Mapping[str, Any], source: TensorSource) -> None:
        self.report, self.source = report, source

    @property
    def headline(self) -> str:
        """The verdict in a sentence."""
        found = self.report.get("verdict") or {}
        return str(found.get("headline") or "")

    @property
    def sentences(self) -> list[str]:
        """What else is to be said, and what to try next."""
        found = self.report.get("verdict") or {}
        return [*found.get("sentences", ()), *found.get("advice", ())]

    @property
    def holds(self) -> bool:
        """Whether everything that `require` asked for is true."""
        return all(entry["holds"] for entry in self.report.get("requirements") or ())

    def table(self) -> Table | None:
        """A row a contestant, best first, with what it costs; None where there was nothing to compare."""
        return quality.standing(self.report) or quality.bits(self.report)

    def to_pandas(self) -> Any:
        """Bits per byte as a DataFrame: a row a contestant, a column a domain, and `mean`. Raises RequestError where
        pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise RequestError("to_pandas needs pandas: pip install pandas") from None
        rows = {c["name"]: dict(c["bits_per_byte"]) | {"mean": c["mean"]} for c in self.report["contestants"]}
        return pandas.DataFrame.from_dict(rows, orient="index")

    def to_dict(self) -> dict[str, Any]:
        """`report`, as a dict of its own."""
        return dict(self.report)

    def save(self, directory: str | Path) -> Path:
        """Write the page, Markdown and JSON; gives the page's path. Raises OutputError."""
        from octad.report.files import write_report

        return write_report(self.report, Path(directory))

    def write_card(self) -> Path:
        """Put the verdict into the model card. Raises OutputError where the model has no directory."""
        from octad.evaluate.card import write_verdict

        return write_verdict(self.source, self.report)

    def __repr__(self) -> str:
        return f"<Verdict on {self.report.get('model', self.source.label)}: {self.headline}>"

    def __str__(self) -> str:
        from rich.console import Console

        from octad.report.verdict_blocks import render

        page = Console(file=io.StringIO(), width=100)
        for part in render(self.report) if self.report.get("verdict") else ():
            page.print(part)
        written = page.file
        assert isinstance(written, io.StringIO)
        return written.getvalue().strip("\n")

    def _repr_html_(self) -> str:
        from octad.report.html import table

        found = self.table()
        shown = table(found) if found is not None else ""
        return f"<p><b>{escape(self.headline)}</b></p>{shown}"
