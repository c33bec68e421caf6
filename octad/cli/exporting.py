"""octad export: a model in the form that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octad.cli.options import LastLine, Model, Overwrite, wrote
from octad.errors import OutputError
from octad.report import terminal


def export(
    model: Model,
    to: Annotated[str, typer.Option(help="hf, gguf or compressed-tensors.")] = "hf",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; gguf: file.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="gguf: f32, f16, bf16, q8_0, q4_0, ...; compressed-tensors: int8 or int4."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="hf: float32, bfloat16 or float16.")] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="hf: a head of its own beside the embeddings.")
    ] = False,
    top_k: Annotated[int | None, typer.Option(help="hf: experts a token.")] = None,
    member: Annotated[str | None, typer.Option(help="This expert alone, as a dense model.")] = None,
    engine: Annotated[str | None, typer.Option("--for", help="An engine's own needs: sglang.")] = None,
    overwrite: Overwrite = False,
    shard_size: Annotated[
        float | None, typer.Option(help="Largest weight file, in GB. [default: 5.0]")
    ] = None,
    as_json: LastLine = False,
) -> None:
    """Write a model for other engines: GGUF (llama.cpp, Ollama), rounded weights (vLLM), the hub's layout, one expert."""
    from octad.api.forms import export as carry_out

    if output is None:
        raise OutputError(f"{model}: no output given; add -o PATH")
    written = carry_out(
        model,
        output,
        to,
        quantize=quantize,
        dtype=dtype,
        untie=untie,
        top_k=top_k,
        member=member,
        engine=engine,
        overwrite=overwrite,
        shard_size=shard_size,
        tell=terminal.tell,
    )
    for note in written.facts["notes"]:
        terminal.say(note)
    wrote(written, as_json=as_json)
