"""demo.json: what a demonstration of one's own base was asked for, so that the same command goes on and another does not
spoil what is there.

    note(Path("demo-base"), {"asked": {...}, "pace": 2.1, "steps": 280}); begun_before(Path("demo-base"), asked)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octad.errors import OutputError
from octad.guard import read_object
from octad.project.layout_text import TUNE
from octad.staging import explained, replace_file

RECORD = "demo.json"


def is_fresh(output: Path) -> bool:
    """Whether nothing was begun there. Raises OutputError where something else lies there."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return True
    if not (output / RECORD).is_file():
        raise OutputError(
            f"{output}: holds something that octad demo --base did not make; choose another --output"
        )
    return False


def begun_before(output: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was noted when the same demonstration was prepared; None where nothing was, or not to the end. Raises
    OutputError where another one was."""
    if not (output / RECORD).is_file():
        return None
    before = read_object(output / RECORD)
    then = before.get("asked")
    plain = json.loads(json.dumps(dict(asked), default=str))
    if not isinstance(then, dict) or (changed := [key for key in plain if then.get(key) != plain[key]]):
        what = ", ".join(changed) if isinstance(then, dict) else "everything"
        raise OutputError(
            f"{output}: was begun with something else for {what}; give the same, or choose another --output"
        )
    prepared = "pace" in before and (output / TUNE).is_file()  # the last file that is written
    return before if prepared else None


def note(output: Path, facts: Mapping[str, Any]) -> None:
    """Write it down. Raises OutputError."""
    with explained(output):
        output.mkdir(parents=True, exist_ok=True)
    replace_file(output / RECORD, json.dumps(dict(facts), indent=2, default=str) + "\n")
