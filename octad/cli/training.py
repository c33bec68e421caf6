"""octad train and octad branch: the verbs with which models learn. The same command goes on where a run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octad.cli.options import LastLine, Output, wrote
from octad.errors import OutputError
from octad.report import terminal

if TYPE_CHECKING:
    from octad.api.outcomes import Written


def train(
    config: Annotated[Path, typer.Argument(help="What to train (YAML): task tune or pretrain.")],
    output: Output = None,
    as_json: LastLine = False,
) -> None:
    """Tune a mixture (router, repair or all), or pre-train a model. The same command resumes."""
    with terminal.waiting("getting PyTorch ready"):
        from octad.api import verbs

    _conclude(verbs.train(config, _given(config, output), tell=terminal.tell), as_json=as_json)


def branch(
    config: Annotated[Path, typer.Argument(help="A base and the specialists to make of it (YAML).")],
    output: Output = None,
    only: Annotated[str | None, typer.Option(help="Train this specialist alone.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="All at once, over a Ray cluster.")] = False,
    as_json: LastLine = False,
) -> None:
    """Train specialists of one base, one after another or over a cluster. The same command resumes."""
    with terminal.waiting("getting PyTorch ready"):
        from octad.api import verbs

    made = verbs.branch(config, _given(config, output), only=only, ray=ray, tell=terminal.tell)
    _conclude(made, as_json=as_json)


def _given(config: Path, output: Path | None) -> Path:
    """Where a run goes. Raises OutputError where nothing is given."""
    if output is None:
        raise OutputError(f"{config}: no output given; add -o DIRECTORY")
    return output


def _conclude(made: Written, *, as_json: bool) -> None:
    """The last line; a run that was asked to stop ends with 130, as after any interruption."""
    if made.finished:
        if terminal.leads():
            wrote(made, as_json=as_json, timed=False)
        return
    terminal.tell(f"stopped and saved; the same command goes on from {made.path}")
    raise SystemExit(130)
