"""Options that several verbs share, so that they read and mean the same everywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from octad.errors import RequestError
from octad.report import terminal

if TYPE_CHECKING:
    from octad.api.outcomes import Written

LARGEST = 2**63  # no seed is larger, and nothing that is counted
MAY_BE_EMPTY = ("system", "prompt")  # nothing is said; the prompt has words of its own for it
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")]
LastLine = Annotated[bool, typer.Option("--json", help="End with a line of JSON that says what was made.")]
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
Quantize = Annotated[
    str | None, typer.Option(help="Weights in int8, or int4: 4 bits, 8 where they cost most.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Experts in memory at most (300MB, 2GB); the others stay on the disk until a token needs them.",
    ),
]
Only = Annotated[str | None, typer.Option(help="Send every token to this expert.")]


class _Plain:
    """Whose --help is plain: flags take nothing, what has bounds is a number, brackets in a text are no markup."""

    params: list[Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for option in self.params:
            if getattr(option, "help", None):
                option.help = escape(option.help)

    def get_params(self, ctx: Any) -> list[Any]:
        """click's, --help among them."""
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for option in found:
            bounds = (getattr(option, "min", None), getattr(option, "max", None))
            if option.metavar is None and getattr(option, "is_flag", False):
                option.metavar = ""
            elif option.metavar is None and bounds != (None, None):
                option.metavar = "N"
        return found


class Verbs(_Plain, TyperGroup):
    """Commands under one name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """click's; who asks for another one, and for none that sounds like it, is told which there are."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            message = getattr(error, "message", None)
            if isinstance(message, str) and "Did you mean" not in message:
                error.message = f"{message} There are {', '.join(self.list_commands(ctx))}."  # type: ignore[attr-defined]
            raise


class Verb(_Plain, TyperCommand):
    """A command whose numbers are numbers and whose names name something: what nobody can compute with, or a variable of
    a shell that was not set, is refused as it is read, before anything is done or shown. Ranges are the options' own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """click's. Raises RequestError for a number that is not finite, or larger than anything, and for an empty text: a
        path would stand for the directory that the user is in, an address for all of the machine's."""
        empty = "." not in args and ("" in args or any(a.endswith("=") for a in args))
        rest = super().parse_args(ctx, args)
        for option in self.params:
            values = ctx.params.get(option.name)
            for value in values if isinstance(values, (list, tuple)) else [values]:
                if option.name not in MAY_BE_EMPTY and (value == "" or (empty and value == Path())):
                    raise RequestError(f"{option.opts[0]}: is empty; give a value, or leave it out")
                if isinstance(value, (int, float)) and not -LARGEST <= value < LARGEST:
                    shown = (
                        f"{value:.6g}"
                        if isinstance(value, float)
                        else f"a number of {len(str(value))} digits"
                    )
                    raise RequestError(f"{option.opts[0]}: found {shown}; expected a number below 2**63")
        return rest


def given(ctx: typer.Context, names: Sequence[str]) -> list[str]:
    """Which of these options the command line has."""
    return [
        name
        for name in names
        if getattr(ctx.get_parameter_source(name), "name", "") not in ("DEFAULT", "DEFAULT_MAP")
    ]


def refuse_given(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    """Raises RequestError, with these words behind its name, for the first of the options that the command line has."""
    for name in given(ctx, names):
        raise RequestError(f"--{name.replace('_', '-')}{why}")


def one_process(verb: str) -> None:
    """Raises RequestError among processes of torchrun: octad's engine is one process's."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError(
            f"{verb}: octad's engine runs in one process, and torchrun started several; what is too large for one GPU is"
            " answered by vLLM: octad serve MODEL --engine vllm --tensor-parallel-size N"
        )


def wrote(written: Written, *, as_json: bool, timed: bool = True) -> None:
    """The last line, or the last two: where it is and how long it took, and the same as JSON."""
    terminal.remark(f"wrote {written.path}" + (f" in {written.seconds:.1f} s" if timed else ""))
    if as_json:
        print(json.dumps(written.to_dict(), ensure_ascii=False))
