"""octad.json: how a mixture came to be, beside its weights.

    made = Provenance.of(source)          # None where octad did not make it
    made.names, made.recipe["router"], made.experts[3]["files"]

`experts` has one entry for each expert, in order: its name; `model`, as the recipe says it; `path`, where that was
found; kind ("base", "adapter" or "checkpoint"); exact; held: {"exact", "lost": {"attention": 0.12, ...}, "sentence"},
whether the mixture holds the member as it is, the distance of what it does not hold, and that in words (see
combine/members.py); the calibration's tokens and windows; files with their digests. Only the names must be there: whoever
needs more says so.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octad.checkpoint.source import TensorSource
from octad.errors import CheckpointError
from octad.guard import exists, read_object

PROVENANCE = "octad.json"
FORMAT = 1
# what a comparison calls its own contestants: no expert should be called so (combine refuses it, evaluate renames it)
TAKEN = re.compile(r"soup|ensemble|oracle|member|mixture( top-\d+)?", re.IGNORECASE)


@dataclass
class Provenance:
    """The recipe as plain data, what identifies the base, one entry an expert, and what was changed since."""

    recipe: dict[str, Any]
    base: dict[str, Any]
    experts: list[dict[str, Any]]
    edits: list[str] = field(default_factory=list)
    format: int = FORMAT

    @classmethod
    def of(cls, source: TensorSource) -> Provenance | None:
        """What lies beside a source's weights; None where nothing does.

        Raises CheckpointError where it is damaged, or of a mixture with another number of experts."""
        path = source.directory / PROVENANCE if source.directory is not None else None
        if path is None or not path.is_file():
            return None
        try:
            found = cls._checked(read_object(path))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            reason = (
                str(error).removeprefix(f"{path}: ") if isinstance(error, CheckpointError) else repr(error)
            )
            raise CheckpointError(
                f"{path}: damaged ({reason}); combine again, or remove it to use the weights alone"
            ) from None
        if source.config.is_moe and len(found.experts) != source.config.num_experts:
            raise CheckpointError(
                f"{path}: names {len(found.experts)} experts, the weights have {source.config.num_experts};"
                " it belongs to another checkpoint: remove it"
            )
        return found

    @classmethod
    def _checked(cls, raw: dict[str, Any]) -> Provenance:
        """Raises KeyError, TypeError or ValueError where something is missing or of the wrong kind."""
        experts = [dict(entry) for entry in raw["experts"]]
        for entry in experts:
            entry["name"] = str(entry["name"])
        edits = [str(edit) for edit in raw.get("edits", [])]
        return cls(
            dict(raw.get("recipe", {})),
            dict(raw.get("base", {})),
            experts,
            edits,
            _whole(raw.get("format", 1)),
        )

    @property
    def names(self) -> list[str]:
        """The experts' names, in order."""
        return [entry["name"] for entry in self.experts]

    def method(self, section: str) -> str | None:
        """The method that the recipe names for "router" or "shared"."""
        value = self.recipe.get(section)
        return value.get("method") if isinstance(value, dict) else value

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.__dict__, indent=2, ensure_ascii=False) + "\n"


def found_at(label: str) -> str:
    """Where a model lies, for whoever wants to open it again from elsewhere; a hub id or bundled name as it is."""
    path = Path(label).expanduser()
    return str(path.resolve()) if exists(path) else label


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"format should be a whole number, found {value!r}")
    return value
