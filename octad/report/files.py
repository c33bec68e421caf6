"""The verdict as files: a page for people, Markdown for repositories, JSON for programs, all of the same numbers.

    write_report(report, Path("report"))        # report/index.html, report/report.md, report/report.json

The page is one file that needs no network and no other file. Each file appears whole or not at all; files of an earlier
report are replaced, and others in the directory left alone. Numbers that are none (NaN, infinite) become null, and
characters that no file may hold (control characters, halves of pairs) U+FFFD.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octad.errors import OutputError
from octad.report.html import page
from octad.report.markdown import markdown
from octad.staging import explained, replace_file

UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


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


def jsonable(value: Any) -> Any:
    """The same with string keys, lists for tuples, and None for numbers that are none."""
    if isinstance(value, Mapping):
        return {jsonable(str(k)): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, str):
        return UNFIT.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
