"""What `octad combine` and `octad quantize` show: the members beside the base, and what rounding costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from octad.figures import change, human, percent, sparkline
from octad.model import cost
from octad.report import terminal
from octad.report.table import Table

if TYPE_CHECKING:
    from octad.combine.preflight import Plan


def show_plan(plan: Plan, seconds: float) -> None:
    """The pre-flight: members beside the base, what will be written, how long it will take."""
    titles = [
        "expert",
        "kind",
        ">ffn distance",
        ">attention",
        ">norms",
        ">embeddings",
        ">head",
        "held",
        "by layer",
    ]
    rows = []
    for report in plan.reports:
        d = report.distances
        ffn, others = (
            d.get("ffn", []),
            (d.get(group) for group in ("attention", "norms", "embeddings", "head")),
        )
        held = {True: "exactly", False: "in part", None: "not measured"}[report.exact]
        layers = sparkline(ffn, max(ffn)) if ffn else ""
        rows.append([report.name, report.kind, _distance(ffn), *map(_distance, others), held, layers])
    terminal.out.print(terminal.table(Table.of(f"members beside {plan.recipe.base}", titles, rows)))
    for report in plan.reports:
        lines = [] if report.exact or not report.sentence or report.kind == "base" else [report.sentence]
        for note in (*lines, *report.notes):
            terminal.say(f"  {report.name}: {note}")
    for note in plan.notes:
        terminal.say(f"  {note}")
    if margin := max(report.margin for report in plan.reports):
        terminal.out.print(
            f"  distances are from a sample of each tensor: within {percent(margin, 1)} of the whole, 95 times in 100"
        )
    total, active = cost.parameters(plan.config), cost.parameters(plan.config, active=True)
    terminal.out.print(
        f"\n{plan.config.model_type}, {plan.config.num_experts} experts, top-{plan.config.num_experts_per_tok}: "
        f"{human(total)} parameters, {human(active)} active; "
        f"{human(plan.output_bytes, 'B')} on disk; about {seconds:.0f} s"
    )


def _distance(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    return f"{sum(values) / len(values):.4f}"


def show_rounding(bits: Mapping[str, tuple[float, float]]) -> None:
    """Bits per byte of each domain before and after weights were rounded."""
    mean = [sum(pair[side] for pair in bits.values()) / len(bits) for side in (0, 1)]
    rows = [
        [name, f"{before:.4f}", f"{after:.4f}", change(after / before - 1)]
        for name, (before, after) in {**bits, "mean": (mean[0], mean[1])}.items()
    ]
    titles = ["text", ">before", ">rounded", ">change"]
    terminal.out.print(terminal.table(Table.of("bits per byte, held-out text", titles, rows)))
