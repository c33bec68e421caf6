"""The stages of `octad make`: what each depends on, where it puts its result, and whether that is done already.

    stages = Record(directory); stages.is_done("combine", key, directory / "mixture" / "config.json")

A key is a digest of everything that a stage reads: settings, text by content, weights by content. A stage is done where
the record has this very key for it and its result is there; names and dates of files play no part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octad.errors import OctadError, OutputError
from octad.fingerprint import digest_of
from octad.guard import read_object
from octad.staging import replace_file
from octad.text.corpus import TextFiles, open_all

RECORD = "made.json"


def key_of(*parts: Any) -> str:
    """A digest of plain data."""
    return digest_of(parts, default=str)[:32]


def text_key(references: Sequence[str]) -> Any:
    """What changes when these texts do. Raises DataError where one is missing."""
    return [part.digest() for part in open_all(references)]


def domains_key(domains: Mapping[str, Sequence[Path] | TextFiles]) -> Any:
    """The same of all domains."""
    found = {name: t if isinstance(t, TextFiles) else TextFiles(t) for name, t in domains.items()}
    return {name: [text_key([str(f) for f in t.files]), t.field] for name, t in found.items()}


class Record:
    """made.json: the key of everything that was begun, and whether it was finished."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / RECORD
        try:
            self.stages = dict(read_object(self.path).get("stages", {})) if self.path.exists() else {}
        except (OctadError, TypeError, ValueError):
            self.stages = {}  # damaged: everything is looked at anew

    def begun(self, stage: str) -> dict[str, Any] | None:
        """What was noted when this stage was begun last; None where it never was."""
        found = self.stages.get(stage)
        return found if isinstance(found, dict) else None

    def is_done(self, stage: str, key: str, result: Path) -> bool:
        """Whether it was finished with this key, and its result is there."""
        found = self.begun(stage)
        return found is not None and found.get("key") == key and bool(found.get("done")) and result.exists()

    def note(self, stage: str, key: str, *, done: bool, **facts: Any) -> None:
        """Begun, or finished."""
        self.stages[stage] = {"key": key, "done": done, **facts}
        replace_file(self.path, json.dumps({"stages": self.stages}, indent=2) + "\n")


def refuse_foreign(record: Record, stage: str, output: Path, marker: str) -> None:
    """Raises OutputError where something lies in a stage's place that no stage, and octad at all, did not make."""
    if (
        output.exists()
        and record.begun(stage) is None
        and not (output / marker).exists()
        and any(output.iterdir())
    ):
        raise OutputError(f"{output}: holds something that octad did not make; move it away")
