"""What the commands print: tables, colours, progress. Only the command line uses it.

Results go to stdout, progress to stderr; without a terminal there is no colour and no moving bar.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from octad.checkpoint.inspect_view import human, sparkline

if TYPE_CHECKING:
    from octad.combine.preflight import Plan

out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False)
# The first is the terminal's own text colour, whatever its background; no two of the others are shades of one colour.
COLOURS = ("default", "green", "cyan", "magenta", "yellow", "bright_red", "bright_blue", "sandy_brown")


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr with time left; call it with a stage's name and the share done, 0 to 1.

    It appears with the first call (never, where `quiet`), and vanishes where the work inside fails."""
    columns = (TextColumn("{task.description:12}"), BarColumn(40), TextColumn("{task.percentage:3.0f} %"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err)
    tasks: dict[str, TaskID] = {}

    def update(stage: str, done: float) -> None:
        if quiet:
            return
        bar.start()  # not before there is something to show; harmless when started
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=1.0)
        bar.update(tasks[stage], completed=done)

    try:
        yield update
    except BaseException:
        bar.live.transient = True  # an error is one line, with no half-full bar above it
        err.quiet = not err.is_terminal  # rich would leave an empty line in a file
        raise
    finally:
        if tasks:
            bar.stop()
        err.quiet = False


def say(line: str) -> None:
    """One line on stdout as it is: names and paths may hold brackets, and be longer than the terminal is wide."""
    out.print(line, markup=False, soft_wrap=True)


def show_plan(plan: Plan, seconds: float) -> None:
    """The pre-flight: members beside the base, what will be written, how long it will take."""
    table = Table(
        title=Text(f"members beside {plan.recipe.base}"), title_justify="left", box=None, pad_edge=False
    )
    for column in ("expert", "kind", "ffn distance", "by layer", "attention", "norms", "embeddings", "held"):
        table.add_column(column, no_wrap=True)
    for report in plan.reports:
        d = report.distances
        ffn = d.get("ffn", [])
        table.add_row(
            Text(report.name),
            report.kind,
            _distance(ffn),
            sparkline(ffn, max(ffn)) if ffn else "",
            *(_distance(d.get(group)) for group in ("attention", "norms", "embeddings")),
            {True: "exactly", False: "feed-forward only", None: "not measured"}[report.exact],
        )
    out.print(table)
    for report in plan.reports:
        for note in report.notes:
            say(f"  {report.name}: {note}")
    for note in plan.notes:
        say(f"  {note}")
    if margin := max(report.margin for report in plan.reports):
        out.print(
            f"  distances are from a sample of each tensor: within {margin:.1%} of the whole, 95 times in 100"
        )
    total, active = plan.config.num_parameters(), plan.config.num_parameters(active=True)
    out.print(
        f"\n{plan.config.model_type}, {plan.config.num_experts} experts, top-{plan.config.num_experts_per_tok}: "
        f"{total / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M active; "
        f"{human(plan.output_bytes, 'B')} on disk; about {seconds:.0f} s"
    )


def _distance(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    return f"{sum(values) / len(values):.4f}"


def show_rounding(bits: Mapping[str, tuple[float, float]]) -> None:
    """Bits per byte of each domain before and after weights were rounded."""
    table = Table(title="bits per byte, held-out text", title_justify="left", box=None, pad_edge=False)
    for column in ("text", "before", "rounded", "change"):
        table.add_column(column, justify="left" if column == "text" else "right")
    mean = [sum(pair[side] for pair in bits.values()) / len(bits) for side in (0, 1)]
    for name, (before, after) in {**bits, "mean": (mean[0], mean[1])}.items():
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}")
    out.print(table)


def speaker_style(speaker: int | None) -> str:
    """The colour of an expert."""
    return COLOURS[(speaker or 0) % len(COLOURS)]
