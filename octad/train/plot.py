"""A picture of a run at its end: how loss, load and routers went. From log.jsonl alone, so it can be drawn at any time.

    draw_run(Path("tuned"))        # "drew tuned/routing.svg", or why there is none

Four panels: bits per byte of each domain (training, and held-out where there is some), the experts' share of the choices
by layer at the end, the worst imbalance (MaxVio) of the layers over the steps, the routers' entropy and what was dropped.
Needs matplotlib (extra `report`); without it a line says so and nothing else is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octad.train.telemetry import LOG

PICTURE = "routing.svg"
Record = dict[str, Any]


def draw_run(run: Path) -> str:
    """Draw a run's log into its directory; the line to tell the user."""
    records = read_log(run / LOG)
    if not any(record.get("layers") for record in records):
        return f"no routing to draw in {run / LOG}"
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {PICTURE}: drawing needs matplotlib: pip install 'octad[report]'"
    with mpl.rc_context({"svg.hashsalt": "octad", "font.size": 8}):  # the same log gives the same file
        figure = Figure(figsize=(10, 7), layout="constrained")
        panels = figure.subplots(2, 2).flatten()
        told = [record for record in records if record.get("layers")]
        for draw, panel in zip((_bits, _loads, _violations, _entropy), panels, strict=True):
            draw(panel, records if draw is _bits else told)
        figure.savefig(run / PICTURE, metadata={"Date": None})
    return f"drew {run / PICTURE}"


def read_log(path: Path) -> list[Record]:
    """The records by step; of a step that was taken again after an interruption, the last."""
    found: dict[tuple[int, bool], Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        record = json.loads(line)
        found[int(record["step"]), "held_out" in record] = record
    return [found[key] for key in sorted(found)]


def _bits(panel: Any, records: Sequence[Record]) -> None:
    for number, name in enumerate(sorted({n for r in records for n in r.get("bits_per_byte", {})})):
        rows = [r for r in records if name in r.get("bits_per_byte", {})]
        panel.plot(
            [r["step"] for r in rows],
            [r["bits_per_byte"][name] for r in rows],
            f"C{number}",
            lw=0.6,
            alpha=0.6,
        )
    for number, name in enumerate(sorted({n for r in records for n in r.get("held_out", {})})):
        rows = [r for r in records if name in r.get("held_out", {})]
        steps, values = [r["step"] for r in rows], [r["held_out"][name] for r in rows]
        panel.plot(steps, values, f"C{number}", marker=".", ms=3, lw=1, label=name)
    panel.set(title="bits per byte (thin: training, dotted: held-out)", xlabel="step")
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=6, ncols=2)


def _loads(panel: Any, records: Sequence[Record]) -> None:
    share = [layer["share"] for layer in records[-1]["layers"]]
    image = panel.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=max(map(max, share)))
    panel.set(title=f"share of the choices at step {records[-1]['step']}", xlabel="expert", ylabel="layer")
    panel.yaxis.get_major_locator().set_params(integer=True)
    panel.figure.colorbar(image, ax=panel)
    for n, layer in enumerate(records[-1]["layers"]):
        for e in layer["dead"]:
            panel.text(e, n, "dead", ha="center", va="center", color="white", fontsize=6)


def _violations(panel: Any, records: Sequence[Record]) -> None:
    steps = [r["step"] for r in records]
    worst = [[layer["max_violation"] for layer in r["layers"]] for r in records]
    panel.plot(steps, [max(row) for row in worst], label="worst layer")
    panel.plot(steps, [sum(row) / len(row) for row in worst], label="mean of layers")
    panel.set(title="MaxVio: largest load over the mean load, less 1", xlabel="step", ylim=(0, None))
    panel.legend(fontsize=6)


def _entropy(panel: Any, records: Sequence[Record]) -> None:
    steps, experts = [r["step"] for r in records], len(records[-1]["layers"][0]["share"])
    entropies = [[layer["entropy"] for layer in r["layers"]] for r in records]
    panel.plot(steps, [sum(row) / len(row) for row in entropies], label="entropy, nats")
    panel.axhline(math.log(experts), color="grey", lw=0.5, ls="--", label="undecided")
    dropped = [sum(layer["dropped"] for layer in r["layers"]) / len(r["layers"]) for r in records]
    if any(dropped):
        panel.plot(steps, dropped, label="dropped, share of choices")
    dead = [sum(len(layer["dead"]) for layer in r["layers"]) for r in records]
    if any(dead):
        panel.plot(steps, dead, label="dead experts, all layers")
    panel.set(title="routers, mean of layers", xlabel="step")
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    panel.legend(fontsize=6)
