"""A picture of a run at its end: how loss, load and routers went. From log.jsonl alone, so it can be drawn at any time.

    draw_run(Path("tuned"))        # "drew tuned/routing.svg", or why there is none

Four panels: bits per byte of each domain (training, and held-out where there is some), the experts' share of the choices
by layer at the end, the worst imbalance (MaxVio) of the layers over the steps, the routers' entropy and what was dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from octad.errors import OctadError
from octad.guard import parse_json
from octad.report.plot import Line, document, lines
from octad.report.svg import heat
from octad.staging import replace_file
from octad.train.telemetry import LOG

PICTURE = "routing.svg"
Record = dict[str, Any]


def draw_run(run: Path) -> str:
    """Draw a run's log into its directory; the line to tell the user."""
    records = read_log(run / LOG)
    told = [record for record in records if record.get("layers")]
    if not told:
        return f"no routing to draw in {run / LOG}"
    try:
        replace_file(run / PICTURE, document(_panels(records, told)))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return f"no {PICTURE}: {run / LOG} holds what no run writes"
    return f"drew {run / PICTURE}"


def _panels(records: Sequence[Record], told: Sequence[Record]) -> list[tuple[str, Any]]:
    """Titles and drawings."""
    last = told[-1]["layers"]
    dead = [f"expert {e} of layer {n}" for n, layer in enumerate(last) for e in layer["dead"]]
    loads = f"share of the choices at step {told[-1]['step']}" + (
        f"; dead: {', '.join(dead)}" if dead else ""
    )
    return [
        (
            "bits per byte (thin: training, dots: held-out)",
            lines(_bits(records), "bits per byte", x_title="step"),
        ),
        (loads, _loads(last)),
        ("MaxVio: largest load over the mean load, less 1", _by_step(told, _violations)),
        ("routers, mean of layers", _by_step(told, _routers)),
    ]


def read_log(path: Path) -> list[Record]:
    """The records by step; of a step that was taken again after an interruption, the last. A line that is none (a kill
    cut it short) is left out."""
    found: dict[tuple[int, bool], Record] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(OctadError):
            record = parse_json(line, LOG)
            if isinstance(record, dict) and isinstance(step := record.get("step"), int):
                found[step, "held_out" in record] = record
    return [found[key] for key in sorted(found)]


def _bits(records: Sequence[Record]) -> list[Line]:
    """Each domain's line of training, and of what was held out."""
    series = []
    for key in ("bits_per_byte", "held_out"):
        for number, name in enumerate(sorted({n for r in records for n in r.get(key, {})})):
            rows = [r for r in records if name in r.get(key, {})]
            steps, values, judged = [r["step"] for r in rows], [r[key][name] for r in rows], key == "held_out"
            series.append(Line(name if judged else "", steps, values, number, thin=not judged, dots=judged))
    if not any(line.name for line in series):  # nothing was held out: the lines of training have the legend
        series = [Line(name, s.x, s.y, s.colour) for s, name in zip(series, _names(records), strict=True)]
    return series


def _names(records: Sequence[Record]) -> list[str]:
    return sorted({n for r in records for n in r.get("bits_per_byte", {})})


def _loads(layers: Sequence[Record]) -> Any:
    shares = [layer["share"] for layer in layers]
    experts = [f"expert {e}" for e in range(len(shares[0]))]
    by_expert = [list(row) for row in zip(*shares, strict=True)]
    peak = max(map(max, shares)) or 1.0
    return heat(by_expert, experts, range(len(layers)), "share of the choices", peak, named=True)


def _by_step(records: Sequence[Record], of: Callable[[Sequence[Record]], dict[str, float]]) -> Any:
    """Lines of what a function finds in each record's layers; of those that are never above zero none."""
    steps, found = [r["step"] for r in records], [of(r["layers"]) for r in records]
    names = [name for name in found[0] if any(row[name] for row in found)]
    series = [Line(n, steps, [row[n] for row in found], dashed=n == UNDECIDED) for n in names]
    return lines(series, "routers", x_title="step", zero=True)


UNDECIDED = "undecided"


def _violations(layers: Sequence[Record]) -> dict[str, float]:
    worst = [layer["max_violation"] for layer in layers]
    return {"worst layer": max(worst), "mean of layers": sum(worst) / len(worst)}


def _routers(layers: Sequence[Record]) -> dict[str, float]:
    return {
        "entropy, nats": sum(layer["entropy"] for layer in layers) / len(layers),
        UNDECIDED: math.log(len(layers[0]["share"])),
        "dropped, share of choices": sum(layer["dropped"] for layer in layers) / len(layers),
        "dead experts, all layers": sum(len(layer["dead"]) for layer in layers),
    }
