"""The report: everything that an evaluation found, as one plain dict for JSON, the page, the card and other programs.

    report = make_report(comparison, requirements, routing=None, tasks=[], command="octad evaluate ...")

Values that are not known are None, lists that have nothing in them are empty; report.py draws a page of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from octad.evaluate.compare import Comparison, Difference, Row
from octad.evaluate.verdict import make_verdict
from octad.guard import jsonable
from octad.machine import hardware


def make_report(
    found: Comparison,
    requirements: Sequence[Mapping[str, Any]] = (),
    *,
    routing: Mapping[str, Any] | None = None,
    tasks: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
) -> dict[str, Any]:
    """Plain data, ready for json.dumps."""
    settings = found.settings
    report: dict[str, Any] = jsonable(
        {
            "octad": version("octad"),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": found.model,
            "command": command,
            "settings": {
                "tokens": settings.tokens,
                "window": settings.window,
                "dtype": found.dtype,
                "seed": settings.seed,
                "resamples": settings.resamples,
                "level": settings.level,
                "smallest": settings.smallest,
                "quantize": settings.quantize,
            },
            "machine": machine(),
            "domains": found.texts.facts(),
            "contestants": [_contestant(found, row) for row in found.rows.values()],
            "differences": [_difference(d) for d in found.differences],
            "routing": routing,
            "load": {d: found.shares(d) for d in found.domains} if found.load is not None else None,
            "experts": found.lineup.experts,
            "experts_per_token": int(found.own.rpartition("-")[2]) if found.mixtures else None,
            "own": found.own,
            "tasks": list(tasks),
            "verdict": make_verdict(found),
            "requirements": list(requirements),
        }
    )
    return report


def machine() -> dict[str, Any]:
    """CPU, cores, GPU and memory."""
    facts = hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "cpu": facts["cpu"],
        "cores": facts["cores"],
        "gpu": facts.get("gpu"),
        "memory_gb": round(facts["memory_bytes"] / 1e9, 1),
    }


def _contestant(found: Comparison, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "note": row.note,
        "bits_per_byte": found.bits[row.name],
        "nats_per_token": found.nats[row.name],
        "mean": found.mean(row.name),
        "price": row.price.to_dict(),
    }


def _difference(d: Difference) -> dict[str, Any]:
    return {
        "of": d.of,
        "against": d.against,
        "domain": d.domain,
        "difference": d.interval.value,
        "low": d.interval.low,
        "high": d.interval.high,
        "relative": d.relative,
        "answer": d.answer,
    }
