"""The verdict as files: a page for people, Markdown for repositories, JSON for programs, all of the same numbers.

    write_report(report, Path("report"))        # report/index.html, report/report.md, report/report.json

The page is one file that needs no network and no other file. Each file appears whole or not at all; files of an earlier
report are replaced, and others in the directory left alone. Numbers that are none (NaN, infinite) become null, and
characters that no file may hold (control characters, halves of pairs) U+FFFD.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octad.errors import OutputError
from octad.guard import jsonable
from octad.report.html import page
from octad.report.markdown import markdown
from octad.staging import explained, replace_file


def write_report(report: Mapping[str, Any], directory: Path) -> Path:
    """Write the three files and return the page's path. Raises OutputError where that cannot be done."""
    clean = jsonable(report)
    files = {
        "report.json": json.dumps(clean, ensure_ascii=False, indent=2, allow_nan=False) + "\n",
        "report.md": markdown(clean),
        "index.html": page(clean),
    }
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"{directory}: is a file; give a directory for the report")
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        replace_file(directory / name, text)
    return directory / "index.html"
