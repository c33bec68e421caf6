"""octad demo: the whole road on models that come with octad, or on a base of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octad.errors import RequestError

DEFAULT, OWN = Path("demo-output"), Path("demo-base")


def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to put it. [default: demo-output, with --base demo-base]"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Make all of it of this dense model: seven specialists first."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="With --base: a folder with a file or folder of text for each specialist."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="With --base: of training for each specialist. [default: 10]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="The same, in steps of training.")] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="With --base: quick, full (4,096 tokens a kind) or none. [default: quick]"),
    ] = None,
) -> None:
    """Combine eight real models, judge the mixture, let it write: models that come with octad, or made of --base."""
    given = {"--text": text, "--minutes": minutes, "--steps": steps, "--judge": judge}
    if base is None:
        if alone := next((option for option, value in given.items() if value is not None), None):
            raise RequestError(f"demo: {alone} is for a base of your own; give --base MODEL, too")
        from octad.demo.demo import run

        run(output or DEFAULT)
        return
    from octad.demo.own_base import Wish, demonstrate

    wish = Wish(base, text, minutes, steps)
    if not demonstrate(wish, output or OWN, judge=judge or "quick"):
        raise SystemExit(130)
