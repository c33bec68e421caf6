"""Judging: the function behind `octad.evaluate`, from a question to a verdict.

    verdict = octad.evaluate("tuned", {"french": "french/heldout.jsonl"}, require="mean<=oracle")
    verdict.holds

evaluate/ holds what judging is made of; here is the order of it: refuse what cannot be asked, compare on held-out text,
look at the routers, ask the tasks. See verbs.py for what paths, `progress` and `tell` may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octad.api.bars import Progress, Tell, bars, teller
from octad.api.outcomes import Verdict
from octad.api.verbs import WORTH_SAYING, Place
from octad.errors import RequestError
from octad.figures import duration

if TYPE_CHECKING:
    from octad.checkpoint.source import TensorSource
    from octad.evaluate.compare import Comparison, Settings
    from octad.evaluate.heldout import Texts
    from octad.evaluate.lineup import LineUp
    from octad.evaluate.results import Cache


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

    if data is None:
        _refuse_without_text(tasks, {"--require": require, "--dense": dense, "--quantize": quantize})
    keep_freed_memory()
    asking: dict[str, Any] = {"members": members, "limit": limit, "samples": samples}
    asking["weak_sandbox"] = weak_sandbox
    if tasks is None and (useless := [name for name, value in asking.items() if value]):
        option = useless[0].replace("_", "-")
        raise RequestError(f"--{option} speaks of tasks, of which there are none; give --tasks, too")
    source = open_source(fspath(model), quantised=True)
    if tasks is not None:
        one_for_tasks(source, shard, alone=data is None)
    if data is None:
        return Verdict({"tasks": _on_tasks(model, tasks, progress, asking)}, source)
    settings = Settings(tokens, window, seed, smallest=smallest, quantize=quantize, other_k=other_k)
    wanted = _Wanted(settings, dense, require, cache, shard, routing)
    found, checked, routed = _compare(source, data, wanted, progress, teller(tell))
    rows = _on_tasks(model, tasks, progress, asking)
    return Verdict(make_report(found, checked, routing=routed, tasks=rows, command=command), source)


def _refuse_without_text(tasks: object, options: Mapping[str, object]) -> None:
    """Raises RequestError where there is nothing to judge on, or an option speaks of text that there is not."""
    if tasks is None:
        raise RequestError("nothing to judge on; give --data domains.yaml, --tasks octad-code, or both")
    if given := [option for option, value in options.items() if value]:
        raise RequestError(f"{given[0]} speaks of held-out text, of which there is none; give --data, too")


def _on_tasks(
    model: Place, tasks: str | Sequence[str] | None, progress: Progress, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each task and contestant; none without tasks."""
    from octad.evaluate.tasks.run_tasks import run_tasks

    if tasks is None:
        return []
    parts = tasks.split(",") if isinstance(tasks, str) else tasks
    with bars(progress) as bar:
        return run_tasks(fspath(model), [p.strip() for p in parts if p.strip()], progress=bar, **options)


@dataclass(frozen=True)
class _Wanted:
    """What to compare with on held-out text beside the parts, and how. The fields are arguments of `evaluate`."""

    settings: Settings
    dense: Sequence[str]
    require: str | None
    cache: Place | None
    shard: bool | None
    routing: bool


def _compare(
    source: TensorSource,
    data: Place | Mapping[str, Any],
    wanted: _Wanted,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[Comparison, list[dict[str, Any]], dict[str, Any] | None]:
    """The comparison, the requirements, and what the routers do; of several processes only the first comes back."""
    from octad.dist import World
    from octad.evaluate.compare import compare
    from octad.evaluate.domains import domains_of
    from octad.evaluate.judge import must_spread
    from octad.evaluate.requirements import parse
    from octad.evaluate.results import Cache, default_directory
    from octad.staging import refuse_unwritable

    if wanted.cache is not None:  # the usual place is only used where it can be
        refuse_unwritable(Path(wanted.cache))
    requirements = parse(wanted.require) if wanted.require is not None else []
    domains = domains_of(data if isinstance(data, Mapping) else fspath(data))
    kept = Cache(Path(wanted.cache) if wanted.cache is not None else default_directory())

    def ready(texts: Texts, lineup: LineUp) -> None:
        for requirement in requirements:
            requirement.check_names(list(texts.domains), lineup)
        _say_how_long(source, texts, say)

    world = World.join()
    if spread := must_spread(source, world, wanted.shard):
        say(f"every model's weights lie over {world.size} processes")
    options: dict[str, Any] = {"dense": wanted.dense, "cache": kept, "world": world, "spread": spread}
    with bars(progress if world.leads else False) as bar, world.watched():
        found = compare(source, domains, wanted.settings, progress=bar, ready=ready, **options)
        if not world.leads:
            raise SystemExit(0)
        if wanted.routing and spread:
            say("the report's page has no routing: no process holds the whole model")
        routed = _routing(source, found, kept, bar) if wanted.routing and not spread else None
    return found, [requirement.check(found) for requirement in requirements], routed


def _say_how_long(source: TensorSource, texts: Texts, say: Callable[[str], None]) -> None:
    from octad.evaluate.estimate import judging_seconds

    if (seconds := judging_seconds(source.config, texts.total)) > WORTH_SAYING:
        text = f"{texts.total:,} tokens of {len(texts.domains)} domains"
        say(f"judging on {text}: about {duration(seconds)}, less where results are known already")


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
