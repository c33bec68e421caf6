"""octad combine, octad expert add|replace|remove, octad quantize: the verbs that write a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from octad.cli.options import Domains, Model, Output, Overwrite, ShardSize, Tokens, Window, shard_bytes
from octad.errors import OutputError
from octad.report import terminal

expert_app = typer.Typer(
    help="Change one expert of a mixture without refitting the others.", no_args_is_help=True
)

Mixture = Annotated[Path, typer.Argument(help="A mixture made by octad combine.")]
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
) -> None:
    """Make one mixture out of the members of a recipe."""
    from octad.cli.combine_view import show_plan
    from octad.combine.build import combine as carry_out
    from octad.combine.build import expected_seconds
    from octad.combine.preflight import preflight
    from octad.combine.recipe import Recipe
    from octad.dist import keep_freed_memory

    keep_freed_memory()
    loaded = Recipe.load(recipe)
    if output is None and not dry_run:
        raise OutputError(f"{recipe}: no output given; add -o DIRECTORY (or --dry-run)")
    limit = shard_bytes(shard_size)
    plan = preflight(loaded, None if dry_run else output, overwrite=overwrite)
    show_plan(plan, expected_seconds(plan))
    if dry_run or output is None:
        return
    started = time.monotonic()
    with terminal.progress_bar() as progress:
        path = carry_out(plan, output, overwrite=overwrite, max_shard_bytes=limit, progress=progress)
    _wrote(path, started)


@expert_app.command()
def add(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The new expert's name.")],
    model: Annotated[str, typer.Option(help="Its weights: a checkpoint or an adapter.")],
    data: Data = None,
    output: Output = None,
    base: Base = None,
) -> None:
    """Add an expert (in place, or to --output)."""
    from octad.combine.edit import add_expert
    from octad.combine.recipe import ExpertSpec

    started = time.monotonic()
    spec = ExpertSpec.of(name, model, tuple(data or ()))
    with terminal.progress_bar() as progress:
        path = add_expert(mixture, spec, output, base=base, progress=progress, tell=terminal.tell)
    _wrote(path, started)


@expert_app.command()
def replace(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The expert to replace.")],
    model: Annotated[str, typer.Option(help="Its new weights: a checkpoint or an adapter.")],
    data: Data = None,
    output: Output = None,
    base: Base = None,
) -> None:
    """Replace an expert (in place, or to --output)."""
    from octad.combine.edit import replace_expert
    from octad.combine.recipe import ExpertSpec

    started = time.monotonic()
    spec = ExpertSpec.of(name, model, tuple(data or ()))
    with terminal.progress_bar() as progress:
        path = replace_expert(mixture, name, spec, output, base=base, progress=progress, tell=terminal.tell)
    _wrote(path, started)


@expert_app.command()
def remove(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The expert to remove.")],
    output: Output = None,
    base: Base = None,
) -> None:
    """Remove an expert (in place, or to --output)."""
    from octad.combine.edit import remove_expert

    started = time.monotonic()
    with terminal.progress_bar() as progress:
        path = remove_expert(mixture, name, output, base=base, progress=progress, tell=terminal.tell)
    _wrote(path, started)


def quantize(
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
) -> None:
    """Write a checkpoint with its weights rounded to 8 or 4 bits: smaller, quick to load, fast to run. With --data it
    tells what that costs, here and in the output's model card."""
    from octad.checkpoint.load import open_source
    from octad.cli.combine_view import show_rounding
    from octad.dist import keep_freed_memory
    from octad.evaluate.domains import read_domains
    from octad.evaluate.heldout import read_texts
    from octad.evaluate.rounding import quantize_and_judge

    if output is None:
        raise OutputError(f"{model}: no output given; add -o DIRECTORY")
    keep_freed_memory()
    started, source = time.monotonic(), open_source(model)
    texts = read_texts(source, read_domains(data), tokens=tokens, window=window).domains if data else {}
    options: dict[str, Any] = {"overwrite": overwrite, "max_shard_bytes": shard_bytes(shard_size)}
    options |= {"records": records}
    with terminal.progress_bar() as progress:
        path, bits = quantize_and_judge(source, output, to, texts, progress=progress, **options)
    if bits:
        show_rounding(bits)
    _wrote(path, started)


def _wrote(path: Path, started: float) -> None:
    terminal.say(f"wrote {path} in {time.monotonic() - started:.1f} s")
