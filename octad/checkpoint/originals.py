"""The members that a mixture was made of, found again where they lay: to judge those that it does not hold exactly, and
to combine again where one of them changes.

    source = original(made, made.experts[3])         # raises CheckpointError with the reason: moved, changed, ...

    base = original_base(made)

A member whose attention is not the base's is in the mixture with its feed-forward nets alone. Whoever asks if the
mixture is better than its members means the members themselves, so these are opened at the path that octad.json
recorded, and taken only where their files still have the recorded digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octad.checkpoint.load import needs_base, open_member, open_source
from octad.checkpoint.provenance import Provenance
from octad.checkpoint.source import TensorSource
from octad.errors import CheckpointError


def original(made: Provenance, record: Mapping[str, Any]) -> TensorSource:
    """The member behind one entry of octad.json. Raises CheckpointError where it is not there as it was."""
    if record.get("kind") == "base":
        return original_base(made)
    path = recorded_path(record)
    member = open_member(path, original_base(made)) if needs_base(path) else open_source(path)
    check_digests(member, record)
    return member


def original_base(made: Provenance) -> TensorSource:
    """The base. Raises CheckpointError where it is not there as it was."""
    base = open_source(recorded_path(made.base))
    check_digests(base, made.base)
    return base


def recorded_path(record: Mapping[str, Any]) -> str:
    """Where one entry of octad.json says that it lay. Raises CheckpointError where it does not."""
    path = record.get("path") or record.get("label")
    if not path:
        raise CheckpointError("octad.json does not say where it lay")
    return str(path)


def check_digests(source: TensorSource, record: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the files are not those that octad.json recorded."""
    if source.provenance().get("files") != record.get("files"):
        raise CheckpointError(f"{source.label}: changed since the mixture was made")
