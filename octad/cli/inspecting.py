"""octad inspect, octad bench, octad version: the verbs that look at a model or a machine and change nothing."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from octad.cli.options import Json, Memory, Model, one_process
from octad.errors import RequestError
from octad.report import terminal


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint, .gguf file, hub id or bundled base.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Measure the experts' distance from this model.")
    ] = None,
    machine: Annotated[
        bool,
        typer.Option(
            "--machine", help="Show the machine instead: its processor, the kernels that run on it."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a model is made of, or a machine."""
    if machine == (model is not None) or (machine and against):
        raise RequestError("inspect: give either a model (with --against, if you like) or --machine")
    if machine:
        show_machine(as_json)
    else:
        show_model(str(model), against, as_json)


def show_machine(as_json: bool) -> None:
    """The processor and the kernels that run on it."""
    from octad.cli.machine_view import machine, render

    found = machine()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        terminal.out.print(render(found))


def show_model(model: str, against: str | None, as_json: bool) -> None:
    """A model, and its distance from another."""
    from octad.checkpoint.inspect import inspect as look
    from octad.checkpoint.load import open_source
    from octad.cli.inspect_view import render

    with terminal.progress_bar(quiet=not terminal.err.is_terminal) as bar:
        source = open_source(model, quantised=True)
        found = look(source, open_source(against, quantised=True) if against else None, bar)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        terminal.out.print(render(found))


def bench(
    model: Model,
    peer: Annotated[
        list[str] | None, typer.Option(help="Measure beside it: transformers, llama.cpp; may be repeated.")
    ] = None,
    llama_bench: Annotated[
        str | None, typer.Option(help="llama.cpp's llama-bench, where it is not on the PATH.")
    ] = None,
    gguf: Annotated[
        list[Path] | None, typer.Option(help="A file for llama.cpp to run; may be repeated.")
    ] = None,
    quantize: Annotated[
        list[str] | None, typer.Option(help="none, int8 or int4; may be repeated. [default: none]")
    ] = None,
    memory: Memory = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute's worth: 2 repeats of 128 tokens and 16, up to 4 users.")
    ] = False,
    prompt_lengths: Annotated[str | None, typer.Option(help="Tokens to read. [default: 128,512]")] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens to write behind. [default: 128,1024]")] = None,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Users at once; 1 is always measured. [default: 1,4,16]")
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that each user writes. [default: 64]")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Repeats of every measurement. [default: 5]")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to read, in place of octad's own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure speed and memory, as a share of the machine's limits and beside other programs; the last line is JSON."""
    from octad.bench.bench import run
    from octad.bench.cases import QUICK, BenchOptions, whole_numbers
    from octad.bench.results_table import live, render

    one_process("bench")
    lengths = {"prompt_lengths": prompt_lengths, "contexts": contexts, "batch_sizes": batch_sizes}
    options: dict[str, Any] = dict(QUICK) if quick else {}
    options |= {name: whole_numbers(name, value) for name, value in lengths.items() if value is not None}
    counts = {"decode_tokens": decode_tokens, "repeat": repeat, "memory": memory}
    options |= {name: value for name, value in counts.items() if value is not None}
    options |= {"peers": tuple(peer or ()), "gguf": tuple(gguf or ()), "llama_bench": llama_bench}
    options |= {"quantize": tuple(quantize or ["none"]), "text": text, "device": device}
    asked = BenchOptions(model, **options)
    command = shlex.join(["octad", *(Path(part).name for part in sys.argv[1:])])  # nobody's directories
    with live(terminal.err) as tell:
        results = run(asked, tell, command=command)
    if not as_json:
        for part in render(results):
            terminal.out.print(part)
    print(json.dumps(results))


def version() -> None:
    """Print the versions that a bug report needs."""
    from importlib.metadata import version as installed

    print(json.dumps({name: installed(name) for name in ("octad", "torch", "safetensors", "tokenizers")}))
