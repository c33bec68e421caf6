"""octad combine, octad expert add|replace|remove, octad quantize: the verbs that write a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from octad.cli.options import (
    Domains,
    LastLine,
    Model,
    Output,
    Overwrite,
    ShardSize,
    Tokens,
    Verb,
    Verbs,
    Window,
    refuse_given,
    wrote,
)
from octad.errors import OutputError
from octad.report import terminal

expert_app = typer.Typer(
    cls=Verbs, help="Change one expert of a mixture without refitting the others.", no_args_is_help=True
)

Mixture = Annotated[Path, typer.Argument(help="A mixture made by octad combine.")]
Weights = Annotated[str, typer.Option(help="Its weights: a checkpoint or an adapter.")]
Data = Annotated[list[str] | None, typer.Option("--data", help="Calibration text; may be repeated.")]
Base = Annotated[str | None, typer.Option("--base", help="The mixture's base, where it cannot be found.")]


def combine(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and measure the members, write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    shard_size: ShardSize = 5.0,
    as_json: LastLine = False,
) -> None:
    """Make one mixture out of the members of a recipe."""
    from octad.api import verbs
    from octad.cli.combine_view import show_plan
    from octad.combine.build import expected_seconds
    from octad.combine.recipe import Recipe

    loaded = Recipe.load(recipe)
    if output is None and not dry_run:
        raise OutputError(f"{recipe}: no output given; add -o DIRECTORY (or --dry-run)")
    verbs.shard_bytes(shard_size)
    with terminal.waiting("opening and measuring the members"):
        plan = verbs.check(loaded, None if dry_run else output, overwrite=overwrite)
    if terminal.leads():
        show_plan(plan, expected_seconds(plan))
    if dry_run or output is None:
        return
    options: dict[str, Any] = {"progress": terminal.leads(), "tell": terminal.tell}
    written = verbs.combine(plan, output, overwrite=overwrite, shard_size=shard_size, **options)
    if terminal.leads():
        wrote(written, as_json=as_json)


def _edit(change: str, *place: Any, as_json: bool, **options: Any) -> None:
    from octad.api import verbs

    wrote(verbs.edit_expert(change, *place, tell=terminal.tell, **options), as_json=as_json)  # type: ignore[arg-type]


@expert_app.command(cls=Verb)
def add(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The new expert's name.")],
    model: Weights,
    data: Data = None,
    output: Output = None,
    base: Base = None,
    as_json: LastLine = False,
) -> None:
    """Add an expert (in place, or to --output)."""
    _edit("add", mixture, name, model, data or (), output, base=base, as_json=as_json)


@expert_app.command(cls=Verb)
def replace(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The expert to replace.")],
    model: Weights,
    data: Data = None,
    output: Output = None,
    base: Base = None,
    as_json: LastLine = False,
) -> None:
    """Replace an expert (in place, or to --output)."""
    _edit("replace", mixture, name, model, data or (), output, base=base, as_json=as_json)


@expert_app.command(cls=Verb)
def remove(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The expert to remove.")],
    output: Output = None,
    base: Base = None,
    as_json: LastLine = False,
) -> None:
    """Remove an expert (in place, or to --output)."""
    _edit("remove", mixture, name, output=output, base=base, as_json=as_json)


def quantize(
    ctx: typer.Context,
    model: Model,
    output: Output = None,
    to: Annotated[str, typer.Option(help="int8 or int4.")] = "int8",
    data: Domains = None,
    tokens: Tokens = 4096,
    window: Window = 512,
    overwrite: Overwrite = False,
    shard_size: ShardSize = 5.0,
    records: Annotated[
        bool,
        typer.Option(
            "--records/--no-records",
            help="Write packed.octad, too: octad maps it in place of packing weights, and reads experts from it.",
        ),
    ] = True,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A file like that of --data, of other text: what int4 is rounded for. [default: the mixture's own]"
        ),
    ] = None,
    as_json: LastLine = False,
) -> None:
    """Write a checkpoint with its weights rounded to 8 or 4 bits, smaller and faster; --data: tell what that costs."""
    from octad.api.forms import quantize as carry_out
    from octad.cli.combine_view import show_rounding

    if output is None:
        raise OutputError(f"{model}: no output given; add -o DIRECTORY")
    if data is None:
        why = " speaks of text to judge on, of which there is none; give --data, too"
        refuse_given(ctx, ("tokens", "window"), why)
    options: dict[str, Any] = {"overwrite": overwrite, "shard_size": shard_size, "records": records}
    options |= {"calibrate": calibrate, "tell": terminal.tell}
    written = carry_out(model, output, to, data=data, tokens=tokens, window=window, **options)
    if written.facts["bits_per_byte"]:
        show_rounding(written.facts["bits_per_byte"])
    wrote(written, as_json=as_json)
