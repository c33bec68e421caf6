"""Combining, training, looking: the functions behind `octad.NAME`, one a verb of the command line (judging: verdicts.py).

    octad.combine("recipe.yaml", "mixture")
    octad.train({"task": "tune", "model": "mixture", ...}, "tuned")

What was written comes back as Written, which is a path; what was found as Inspection. Paths in a dict are
relative to the current directory, those in a file to the file. `progress`: True for bars where somebody can see them, a
function that takes a stage and the share done, or False. `tell`: a function that takes lines for the user. A mistake of
the user's is an OctadError, whose text is one line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from octad.api.bars import Progress, Tell, bars, teller
from octad.api.outcomes import Written
from octad.errors import OutputError, RequestError
from octad.report.terminal import life
from octad.staging import refuse_unwritable

if TYPE_CHECKING:
    from octad.checkpoint.inspect import Inspection
    from octad.combine.preflight import Plan
    from octad.combine.recipe import Recipe

Place = str | PathLike[str]
WORTH_SAYING = 5.0  # seconds: what takes longer is announced


def check(
    recipe: Recipe | Place | Mapping[str, Any], output: Place | None = None, *, overwrite: bool = False
) -> Plan:
    """Open and measure the members of a recipe and refuse what cannot be combined, before any work. With `output`, also
    that a mixture can be written there. Raises OctadError.

    >>> plan = octad.check("recipe.yaml")
    >>> [member.name for member in plan.reports]
    ['general', 'one', 'two']
    """
    from octad.combine.conversations import check as check_questions
    from octad.combine.own_text import check as check_writers
    from octad.combine.preflight import preflight
    from octad.combine.recipe import Recipe
    from octad.dist import keep_freed_memory

    keep_freed_memory()
    given = recipe if isinstance(recipe, (Recipe, Mapping)) else fspath(recipe)
    plan = preflight(Recipe.of(given), None if output is None else fspath(output), overwrite=overwrite)
    check_questions(plan)
    check_writers(plan)
    return plan


def combine(
    recipe: Recipe | Plan | Place | Mapping[str, Any],
    output: Place,
    *,
    overwrite: bool = False,
    shard_size: float = 5.0,
    progress: Progress = True,
    tell: Tell = None,
) -> Written:
    """Make one mixture out of the members of a recipe: a file, the same as a dict, or what `check` gave. `shard_size`: of
    the largest weight file, in GB. Raises OctadError.

    >>> mixture = octad.combine("recipe.yaml", "mixture")
    >>> mixture.facts["experts"]
    ['general', 'one', 'two']
    """
    from octad.api.interviewing import interview
    from octad.combine.build import combine as carry_out
    from octad.combine.preflight import Plan

    limit = shard_bytes(shard_size)
    plan = recipe if isinstance(recipe, Plan) else check(recipe, output, overwrite=overwrite)
    started = time.monotonic()
    with bars(progress) as bar:
        interview(plan, bar)
        options: dict[str, Any] = {"overwrite": overwrite, "max_shard_bytes": limit, "tell": teller(tell)}
        path = carry_out(plan, Path(output), progress=bar, **options)
    names = [report.name for report in plan.reports]
    return Written(path, time.monotonic() - started, experts=names, bytes=plan.output_bytes)


def edit_expert(
    change: Literal["add", "replace", "remove"],
    mixture: Place,
    name: str,
    model: Place | None = None,
    data: Place | Sequence[Place] = (),
    output: Place | None = None,
    *,
    base: Place | None = None,
    progress: Progress = True,
    tell: Tell = None,
) -> Written:
    """Add, replace or remove one expert of a mixture, in place or to `output`, without refitting the others. `data`:
    calibration text of a newcomer. Raises OctadError.

    >>> octad.edit_expert("add", "mixture", "three", "two", "two.jsonl", "four-experts").facts
    {'change': 'add', 'expert': 'three'}
    """
    from octad.combine.edit import add_expert, remove_expert, replace_expert
    from octad.combine.recipe import ExpertSpec

    started, to = time.monotonic(), None if output is None else Path(output)
    files = [data] if isinstance(data, (str, PathLike)) else data
    with bars(progress) as bar:
        options: dict[str, Any] = {
            "base": None if base is None else fspath(base),
            "progress": bar,
            "tell": teller(tell),
        }
        if change == "remove":
            path = remove_expert(mixture_path(mixture), name, to, **options)
        elif model is None:
            raise RequestError(f"{change} {name!r}: needs a model")
        else:
            spec = ExpertSpec.of(name, fspath(model), tuple(fspath(file) for file in files))
            act = add_expert if change == "add" else partial(replace_expert, name=name)
            path = act(mixture_path(mixture), spec=spec, output=to, **options)
    return Written(path, time.monotonic() - started, change=change, expert=name)


def mixture_path(mixture: Place) -> Path:
    """A mixture's directory."""
    return Path(fspath(mixture))


def shard_bytes(shard_size: float) -> float:
    """Bytes of `shard_size` GB. Raises OutputError for a size that is none."""
    if not shard_size > 0:
        raise OutputError(f"--shard-size is {shard_size:g} GB; give a size above 0")
    return shard_size * 1e9


def train(
    config: Place | Mapping[str, Any], output: Place, *, progress: Progress = True, tell: Tell = None
) -> Written:
    """Tune a mixture (routers, repair or all of it), or pre-train a model; the same call goes on where a run stopped.
    Raises OctadError.

    >>> octad.train("tune.yaml", "tuned", progress=False).finished
    True
    """
    from octad.dist import keep_freed_memory
    from octad.train.forecast import check_sources
    from octad.train.learner import tune_learner
    from octad.train.pretrain import pretrain_learner
    from octad.train.routing_plot import draw_run
    from octad.train.run_config import TuneConfig, config_of
    from octad.train.trainer import Outcome, Trainer

    keep_freed_memory(any_size=True)
    started, run, say = time.monotonic(), Path(output), teller(tell)
    refuse_unwritable(run)  # before anything is opened
    loaded = config_of(config if isinstance(config, Mapping) else fspath(config))
    for key in loaded.unused_keys():
        say(f"{_label(config)}: no effect: {key}")
    check_sources(loaded)
    with life.doing("opening the model and its text"):
        learner = tune_learner(loaded) if isinstance(loaded, TuneConfig) else pretrain_learner(loaded)
        trainer = Trainer(learner, run, say)
    with bars(progress if trainer.world.leads else False) as bar:
        trainer.progress = partial(bar, "training")
        outcome = trainer.fit()
    finished = outcome is Outcome.FINISHED
    if finished and learner.routers and trainer.world.leads:
        say(draw_run(run))
    return Written(run, time.monotonic() - started, finished=finished, steps=trainer.step)


def branch(
    config: Place | Mapping[str, Any],
    output: Place,
    *,
    only: str | None = None,
    ray: bool = False,
    progress: Progress = True,
    tell: Tell = None,
    beside: bool = True,
) -> Written:
    """Train specialists of one base, one after another or, with `ray`, over a cluster; the same call goes on where it
    stopped. `beside`: all of them done, write recipe.yaml (and domains.yaml, of held-out text) beside them. Raises
    OctadError.

    >>> octad.branch("branch.yaml", "specialists", progress=False).facts["experts"]
    ['one', 'two']
    """
    from octad.dist import keep_freed_memory
    from octad.figures import duration
    from octad.project.beside import write_beside
    from octad.train.branch import branch as in_turn
    from octad.train.branch import chosen
    from octad.train.fanout import fan_out
    from octad.train.forecast import branch_seconds, check_text
    from octad.train.run_config import branch_of
    from octad.train.trainer import Outcome

    keep_freed_memory(any_size=True)
    started, run, say = time.monotonic(), Path(output), teller(tell)
    refuse_unwritable(run)  # before anything is opened
    loaded = branch_of(config if isinstance(config, Mapping) else fspath(config))
    for key in loaded.unused_keys(ray=ray):
        say(f"{_label(config)}: no effect: {key}")
    carry_out, asked = fan_out if ray else in_turn, chosen(loaded, only)
    check_text(loaded, asked)
    if not ray and (seconds := branch_seconds(loaded, asked)) > WORTH_SAYING:
        many = f"{len(asked)} specialist{'s' * (len(asked) != 1)}"
        say(f"{many} of {loaded.base}: about {duration(seconds)} for all steps")
    with bars(progress) as bar:
        outcome = carry_out(loaded, run, echo=say, progress=bar, only=only)
    finished = outcome is Outcome.FINISHED
    if finished and only is None and beside:
        for note in write_beside(loaded, run):
            say(note)
    return Written(run, time.monotonic() - started, finished=finished, experts=[s.name for s in asked])


def _label(config: Place | Mapping[str, Any]) -> str:
    return "config" if isinstance(config, Mapping) else fspath(config)


def inspect(model: Place, against: Place | None = None) -> Inspection:
    """What a model is made of and, with `against`, how far each expert is from that model. Raises OctadError.

    >>> octad.inspect("mixture").experts
    3
    """
    from octad.checkpoint.inspect import inspect as look
    from octad.checkpoint.load import open_source

    source = open_source(fspath(model), quantised=True)
    return look(source, open_source(fspath(against), quantised=True) if against is not None else None)
