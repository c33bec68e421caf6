"""Combining, training, judging, looking: the functions behind `octad.NAME`, one a verb of the command line.

    octad.combine("recipe.yaml", "mixture")
    octad.train({"task": "tune", "model": "mixture", ...}, "tuned")
    octad.evaluate("tuned", {"french": "french/heldout.jsonl"})

What was written comes back as Written, which is a path; what was found as Verdict or Inspection. Paths in a dict are
relative to the current directory, those in a file to the file. `progress`: True for bars where somebody can see them, a
function that takes a stage and the share done, or False. `tell`: a function that takes lines for the user. A mistake of
the user's is an OctadError, whose text is one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from octad.api.bars import Progress, Tell, bars, teller
from octad.api.outcomes import Verdict, Written
from octad.errors import OutputError, RequestError
from octad.report.terminal import life

if TYPE_CHECKING:
    from octad.checkpoint.inspect import Inspection
    from octad.checkpoint.source import TensorSource
    from octad.combine.preflight import Plan
    from octad.combine.recipe import Recipe
    from octad.evaluate.compare import Comparison
    from octad.evaluate.heldout import Texts
    from octad.evaluate.lineup import LineUp
    from octad.evaluate.results import Cache

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
    loaded = branch_of(config if isinstance(config, Mapping) else fspath(config))
    for key in loaded.unused_keys(ray=ray):
        say(f"{_label(config)}: no effect: {key}")
    carry_out, asked = fan_out if ray else in_turn, chosen(loaded, only)
    check_text(loaded, asked)
    if not ray and (seconds := branch_seconds(loaded, asked)) > WORTH_SAYING:
        say(f"{len(asked)} specialists of {loaded.base}: about {duration(seconds)} for all their steps")
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


def evaluate(
    model: Place,
    data: Place | Mapping[str, Any] | None = None,
    *,
    tokens: int = 4096,
    window: int = 512,
    dense: Sequence[str] = (),
    require: str | None = None,
    seed: int = 0,
    smallest: float = 0.002,
    quantize: str | None = None,
    other_k: bool = True,
    routing: bool = False,
    tasks: str | Sequence[str] | None = None,
    members: bool = False,
    limit: int | None = None,
    samples: int | None = None,
    weak_sandbox: bool = False,
    cache: Place | None = None,
    shard: bool | None = None,
    command: str | None = None,
    progress: Progress = True,
    tell: Tell = None,
) -> Verdict:
    """Judge a mixture beside everything it is made of on held-out text, on tasks, or both. `data`: a file of domains, or
    {name: files}; `quantize`: all with weights rounded so; `other_k`: the mixture with other numbers of experts a token,
    too; `routing`: look at the routers, for the report's page; `shard`: weights lie over all processes of torchrun (None:
    where one cannot hold them). Raises OctadError.

    >>> verdict = octad.evaluate("mixture", {"one": "one.jsonl"}, tokens=200, window=32, require="mean<=member*9")
    >>> verdict.holds, list(verdict.to_pandas().columns)
    (True, ['one', 'mean'])
    """
    from octad.checkpoint.load import open_source
    from octad.dist import keep_freed_memory
    from octad.evaluate.compare import Settings
    from octad.evaluate.judge import one_for_tasks
    from octad.evaluate.record import make_report
    from octad.evaluate.tasks.run_tasks import run_tasks

    if data is None and tasks is None:
        raise RequestError("nothing to judge on; give --data domains.yaml, --tasks octad-code, or both")
    if data is None and (require or dense or quantize):
        option = "--require" if require else "--dense" if dense else "--quantize"
        raise RequestError(f"{option} speaks of held-out text, of which there is none; give --data, too")
    keep_freed_memory()
    model = fspath(model)
    parts = tasks.split(",") if isinstance(tasks, str) else tasks or ()
    names = [name.strip() for name in parts if name.strip()]
    options: dict[str, Any] = {
        "members": members,
        "limit": limit,
        "samples": samples,
        "weak_sandbox": weak_sandbox,
    }

    def rows() -> list[dict[str, Any]]:
        if tasks is None:
            return []
        with bars(progress) as bar:
            return run_tasks(model, names, progress=bar, **options)

    source = open_source(model, quantised=True)
    if tasks is not None:
        one_for_tasks(source, shard, alone=data is None)
    if data is None:
        return Verdict({"tasks": rows()}, source)
    settings = Settings(
        tokens=tokens, window=window, seed=seed, smallest=smallest, quantize=quantize, other_k=other_k
    )
    found, checked, routed = _compare(
        source, data, settings, dense, require, cache, progress, teller(tell), routing=routing, shard=shard
    )
    return Verdict(make_report(found, checked, routing=routed, tasks=rows(), command=command), source)


def _compare(
    source: TensorSource,
    data: Place | Mapping[str, Any],
    settings: Any,
    dense: Sequence[str],
    require: str | None,
    cache: Place | None,
    progress: Progress,
    say: Callable[[str], None],
    *,
    routing: bool,
    shard: bool | None,
) -> tuple[Comparison, list[dict[str, Any]], dict[str, Any] | None]:
    """The comparison, the requirements, and what the routers do; of several processes only the first comes back."""
    from octad.dist import World
    from octad.evaluate.compare import compare
    from octad.evaluate.domains import domains_of
    from octad.evaluate.estimate import judging_seconds
    from octad.evaluate.judge import must_spread
    from octad.evaluate.requirements import parse
    from octad.evaluate.results import Cache, default_directory
    from octad.figures import duration

    wanted = parse(require) if require is not None else []
    domains = domains_of(data if isinstance(data, Mapping) else fspath(data))
    kept = Cache(Path(cache) if cache is not None else default_directory())

    def ready(texts: Texts, lineup: LineUp) -> None:
        for requirement in wanted:
            requirement.check_names(list(texts.domains), lineup)
        if (seconds := judging_seconds(source.config, texts.total)) > WORTH_SAYING:
            known = "less where results are known already"
            say(
                f"judging on {texts.total:,} tokens of {len(texts.domains)} domains: about {duration(seconds)}, {known}"
            )

    world = World.join()
    if spread := must_spread(source, world, shard):
        say(f"every model's weights lie over {world.size} processes")
    options: dict[str, Any] = {"dense": dense, "cache": kept, "world": world, "spread": spread}
    with bars(progress if world.leads else False) as bar, world.watched():
        found = compare(source, domains, settings, progress=bar, ready=ready, **options)
        if not world.leads:
            raise SystemExit(0)
        if routing and spread:
            say("the report's page has no routing: no process holds the whole model")
        routed = _routing(source, found, kept, bar) if routing and not spread else None
    return found, [requirement.check(found) for requirement in wanted], routed


def _routing(source: TensorSource, found: Comparison, cache: Cache, progress: Any) -> dict[str, Any] | None:
    """What the routers do, from the cache where it is known; None for a dense model."""
    if not source.config.is_moe:
        return None
    from octad.checkpoint.load import load_tokenizer
    from octad.evaluate.contestants import fast_model
    from octad.evaluate.results import Content, key_of
    from octad.evaluate.routing import collect_routing

    texts, names = found.texts, found.lineup.experts
    quantize = found.settings.quantize
    about = ["routing", Content(source).everything(), texts.digest, list(texts.domains), names, found.dtype]
    key = key_of(*about, *([quantize] if quantize else []))
    if (known := cache.get_plain(key)) is not None:
        return known
    total, done = sum(len(w.ids) for w in texts.windows), 0

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress("routing", min(1.0, done / total))

    model, tokenizer = fast_model(source, quantize=quantize), load_tokenizer(source)
    routing: dict[str, Any] | None = collect_routing(model, tokenizer, texts.domains, names, progress=tick)
    cache.put_plain(key, routing)
    return routing
