"""octad plan: how to train a model that no machine here holds, or whether and how fast a machine serves it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octad.cli.options import Json, refuse_given
from octad.errors import RequestError
from octad.report import terminal

if TYPE_CHECKING:
    from octad.model.config import ModelConfig

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
# beyond what anybody trains on or holds in one conversation
LONGEST = 100_000_000
MOST_TOKENS, LARGEST_BATCH = "10000T", "10B"
TRAINING, SERVING = ("tokens", "window", "batch"), ("context", "users", "precision", "host")


def plan(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A name (8x7b, 8x220b), config.json, checkpoint, recipe or hub id.")
    ],
    hardware: Annotated[
        str, typer.Option(help="A device, with how many a node has: h100x8, rtx4090.")
    ] = "h100x8",
    nodes: Annotated[int, typer.Option(min=1, max=1_000_000, help="Nodes of the cluster.")] = 1,
    tokens: Annotated[str, typer.Option(help="Tokens to train on: 13T, 500B.")] = "1T",
    window: Annotated[int, typer.Option(min=1, max=LONGEST, help="Tokens of a training window.")] = 4096,
    batch: Annotated[str, typer.Option(help="Tokens of a training step.")] = "16M",
    serve: Annotated[bool, typer.Option("--serve", help="Plan for answering instead of training.")] = False,
    context: Annotated[
        int, typer.Option(min=1, max=LONGEST, help="Tokens of a conversation, with --serve.")
    ] = 4096,
    users: Annotated[int, typer.Option(min=1, max=1_000_000, help="At once, with --serve.")] = 1,
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp8, int8, int4, q8_0 or q4_0, with --serve. [default: all]")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The host for experts that do not fit, with --serve.")
    ] = "desktop",
    experts: Annotated[
        int | None, typer.Option(min=2, max=4096, help="Make a mixture of so many of a dense model.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts a token.")] = None,
    hardware_file: Annotated[
        Path | None, typer.Option(help="Devices of your own (YAML), in the form of octad's table.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan before anything is bought: parameters, memory, time, money, energy; nothing is loaded."""
    from octad.cli.plan_view import render
    from octad.plan.hardware import find_cluster
    from octad.plan.memory import PRECISIONS
    from octad.plan.reply import serve_answer, train_answer
    from octad.plan.shapes import readings

    beside = f": has no effect {'with' if serve else 'without'} --serve; leave it out"
    refuse_given(ctx, TRAINING if serve else SERVING, beside)
    if precision is not None and precision not in PRECISIONS:
        raise RequestError(f"--precision: found {precision!r}, allowed: {', '.join(PRECISIONS)}")
    cluster = find_cluster(hardware, nodes, hardware_file)
    found = readings(model, experts, top_k, _opened)
    if serve:
        behind = find_cluster(host, 1, hardware_file)
        answer = serve_answer(found, cluster, context=context, users=users, bits=precision, host=behind)
    else:
        wanted, together = count(tokens, "--tokens", MOST_TOKENS), count(batch, "--batch", LARGEST_BATCH)
        answer = train_answer(found, cluster, tokens=wanted, window=window, batch=together)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    for part in render(answer):
        terminal.out.print(part)


def _opened(reference: str) -> ModelConfig:
    """The config of a GGUF file, by its metadata alone, or of a bundled base, by the checkpoint's own reader."""
    if reference.endswith(".gguf"):
        from octad.checkpoint.gguf.header import GGUFHeader
        from octad.checkpoint.gguf.metadata import config_of

        return config_of(GGUFHeader.read(Path(reference).expanduser()))
    from octad.checkpoint.load import open_source

    return open_source(reference).config


def count(text: str, option: str, most: str) -> float:
    """13T, 500B, 16M, 4096: how many. Raises RequestError for what is no such number, is below 1 or above `most`."""
    found, largest = _number(text), _number(most) or 0.0
    if found is None or found < 1:
        raise RequestError(f"{option}: found {text!r}; expected a number such as 13T, 500B or 4096")
    if found > largest:
        raise RequestError(f"{option}: found {text!r}; expected {most} at most")
    return found


def _number(text: str) -> float | None:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([kmbgt]?)", text.strip().lower())
    return None if match is None else float(match[1]) * _PREFIXES[match[2]]
