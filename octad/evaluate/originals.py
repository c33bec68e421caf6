"""The members that a mixture was made of, found again where they lay: for judging those that it does not hold exactly.

    source = original(made, made.experts[3])         # raises CheckpointError with the reason: moved, changed, ...

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
        return _base(made)
    path = _recorded_path(record)
    member = open_member(path, _base(made)) if needs_base(path) else open_source(path)
    _check_digests(member, record)
    return member


def _base(made: Provenance) -> TensorSource:
    base = open_source(_recorded_path(made.base))
    _check_digests(base, made.base)
    return base


def _recorded_path(record: Mapping[str, Any]) -> str:
    path = record.get("path") or record.get("label")
    if not path:
        raise CheckpointError("octad.json does not say where it lay")
    return str(path)


def _check_digests(source: TensorSource, record: Mapping[str, Any]) -> None:
    if source.provenance().get("files") != record.get("files"):
        raise CheckpointError(f"{source.label}: changed since the mixture was made")
