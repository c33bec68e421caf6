"""octad train and octad branch: the verbs with which models learn. The same command goes on where a run stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from octad.cli.options import Output
from octad.errors import OutputError
from octad.report import terminal


def train(
    config: Annotated[Path, typer.Argument(help="What to train (YAML): task tune or pretrain.")],
    output: Output = None,
) -> None:
    """Tune a mixture (router, repair or all), or pre-train a model. The same command resumes."""
    from octad.dist import keep_freed_memory
    from octad.train.learner import tune_learner
    from octad.train.pretrain import pretrain_learner
    from octad.train.routing_plot import draw_run
    from octad.train.run_config import TuneConfig, load_config
    from octad.train.trainer import Outcome, Trainer

    keep_freed_memory(any_size=True)
    loaded = load_config(config)
    run = _run_directory(config, output, loaded.unused_keys())
    learner = tune_learner(loaded) if isinstance(loaded, TuneConfig) else pretrain_learner(loaded)
    trainer = Trainer(learner, run, terminal.tell)
    with _bars(quiet=not trainer.world.leads) as progress:
        trainer.progress = partial(progress, "training")
        outcome = trainer.fit()
    if outcome is Outcome.FINISHED and learner.routers and trainer.world.leads:
        terminal.tell(draw_run(run))
    _tell_outcome(run, stopped=outcome is Outcome.STOPPED)


def branch(
    config: Annotated[Path, typer.Argument(help="A base and the specialists to make of it (YAML).")],
    output: Output = None,
    only: Annotated[str | None, typer.Option(help="Train this specialist alone.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="All at once, over a Ray cluster.")] = False,
) -> None:
    """Train specialists of one base, one after another or over a cluster. The same command resumes."""
    from octad.dist import keep_freed_memory
    from octad.train.branch import branch as in_turn
    from octad.train.fanout import fan_out
    from octad.train.run_config import load_branch
    from octad.train.trainer import Outcome

    keep_freed_memory(any_size=True)
    loaded = load_branch(config)
    run = _run_directory(config, output, loaded.unused_keys(ray=ray))
    carry_out = fan_out if ray else in_turn
    with _bars() as progress:
        outcome = carry_out(loaded, run, echo=terminal.tell, progress=progress, only=only)
    _tell_outcome(run, stopped=outcome is Outcome.STOPPED)


def _bars(*, quiet: bool = False) -> AbstractContextManager[Callable[[str, float], None]]:
    """A bar for every run, on a terminal alone: a file gets the lines of the log."""
    return terminal.progress_bar(quiet=quiet or not terminal.err.is_terminal)


def _run_directory(config: Path, output: Path | None, unused: Iterable[str]) -> Path:
    """Where a run goes; tells which settings have no effect. Raises OutputError where nothing is given."""
    for key in unused:
        terminal.tell(f"{config}: no effect: {key}")
    if output is None:
        raise OutputError(f"{config}: no output given; add -o DIRECTORY")
    return output


def _tell_outcome(run: Path, *, stopped: bool) -> None:
    """The last line; a run that was asked to stop ends with 130, as after any interruption."""
    if not stopped:
        if terminal.leads():
            terminal.say(f"wrote {run}")
        return
    terminal.tell(f"stopped and saved; the same command goes on from {run}")
    raise SystemExit(130)
