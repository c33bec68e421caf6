"""Options that several verbs share, so that they read and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octad.errors import OutputError

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
ShardSize = Annotated[float, typer.Option(help="Largest weight file, in GB.")]
Model = Annotated[str, typer.Argument(help="A checkpoint, .gguf file, hub id or bundled base.")]
Domains = Annotated[Path | None, typer.Option("--data", help="YAML with `domains: {name: file}`.")]
Tokens = Annotated[int, typer.Option(min=2, help="Held-out tokens a domain.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of context at most.")]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
]
MinP = Annotated[float, typer.Option(help="Leave out tokens this many times less likely than the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Quantize = Annotated[str | None, typer.Option(help="Weights in int8 or int4.")]
Only = Annotated[str | None, typer.Option(help="Send every token to this expert.")]


def shard_bytes(shard_size: float) -> float:
    """Bytes of `shard_size` GB. Raises OutputError for a size that is none."""
    if not shard_size > 0:
        raise OutputError(f"--shard-size is {shard_size:g} GB; give a size above 0")
    return shard_size * 1e9
