"""octad evaluate: the verb that judges a mixture beside its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from octad.cli.options import Domains, Json, Tokens, Window, refuse_given

OF_TEXT = ("tokens", "window", "smallest", "seed", "cache")


def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A mixture (or any model).")],
    data: Domains = None,
    tokens: Tokens = 4096,
    window: Window = 512,
    dense: Annotated[
        list[str] | None, typer.Option(help="A dense model to compare with; may be repeated.")
    ] = None,
    require: Annotated[
        str | None, typer.Option(help="Exit with 1 unless it holds: mean<=oracle, every<=member*1.01")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Directory for a page, Markdown and JSON.")] = None,
    card: Annotated[
        bool | None, typer.Option("--card/--no-card", help="Put the verdict into the model card.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where results are kept. [default: ~/.cache/octad]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 0,
    smallest: Annotated[
        float, typer.Option(min=0, max=1, help="Share of its bits per byte below which a difference is none.")
    ] = 0.002,
    quantize: Annotated[
        str | None, typer.Option(help="Judge all with weights in int8: sooner, nearly as exact.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks by name or file, with commas: octad-code,my.yaml.")
    ] = None,
    members: Annotated[
        bool, typer.Option("--members", help="Tasks for each member and the soup too.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=2, help="The first N examples of each task.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each programming problem.")] = None,
    weak_sandbox: Annotated[
        bool, typer.Option("--weak-sandbox", help="Run programs also where the kernel cannot confine them.")
    ] = False,
    shard: Annotated[
        bool | None, typer.Option("--shard/--no-shard", help="Weights over all processes of torchrun.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge a mixture beside its members, their soup, ensemble and oracle: bits per byte of held-out text, and tasks."""
    from octad.cli import evaluation as commands_evaluate

    if data is None and tasks is not None:
        refuse_given(ctx, OF_TEXT, " speaks of held-out text, of which there is none; give --data, too")
    options: dict[str, Any] = {"tokens": tokens, "window": window, "seed": seed, "smallest": smallest}
    options["quantize"] = quantize
    options |= {"dense": dense or [], "require": require, "cache": cache, "tasks": tasks}
    options |= {"members": members, "limit": limit, "samples": samples, "weak_sandbox": weak_sandbox}
    options["shard"] = shard
    commands_evaluate.evaluate(model, data, commands_evaluate.Outputs(report, card, as_json), **options)
