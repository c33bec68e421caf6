"""octad evaluate: judge, tell the verdict, write it where it belongs, and say by the exit code what does not hold."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octad.cli import tasks as commands_tasks
from octad.dist import World, keep_freed_memory
from octad.report import terminal

if TYPE_CHECKING:
    from octad.checkpoint.source import TensorSource
    from octad.evaluate.compare import Comparison, Settings
    from octad.evaluate.heldout import Texts
    from octad.evaluate.lineup import LineUp
    from octad.evaluate.results import Cache


@dataclass(frozen=True)
class Outputs:
    """Where results go. `card`: whether the verdict goes into the model card; None: where octad made the model and no
    verdict on more text is in it."""

    report: Path | None = None
    cache: Path | None = None
    card: bool | None = None
    as_json: bool = False


def evaluate(
    model: str,
    data: Path,
    settings: Settings,
    outputs: Outputs,
    dense: Sequence[str] = (),
    require: str | None = None,
    tasks: Callable[[], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """The comparison and all that follows from it; ends with exit code 1 where a requirement does not hold. `tasks` is
    run after the comparison, and its rows go into the report."""
    from octad.checkpoint.load import open_source
    from octad.evaluate.compare import compare
    from octad.evaluate.domains import read_domains
    from octad.evaluate.requirements import parse
    from octad.evaluate.results import Cache, default_directory

    wanted = parse(require) if require is not None else []
    domains, kept = read_domains(data), Cache(outputs.cache or default_directory())

    def check(texts: Texts, lineup: LineUp) -> None:
        for requirement in wanted:
            requirement.check_names(list(texts.domains), lineup)

    keep_freed_memory()
    source = open_source(model, quantised=True)
    world = World.join()
    with terminal.progress_bar(quiet=not world.leads) as progress:
        found = compare(
            source,
            domains,
            settings,
            dense=dense,
            cache=kept,
            world=world,
            progress=progress,
            ready=check,
        )
        if not world.leads:
            raise SystemExit(0)
        routing = _routing(source, found, kept, progress) if outputs.report else None
    checked = [requirement.check(found) for requirement in wanted]
    return _conclude(source, found, checked, routing, tasks() if tasks else [], outputs)


def _conclude(
    source: TensorSource,
    found: Comparison,
    checked: list[dict[str, Any]],
    routing: dict[str, Any] | None,
    tasks: list[dict[str, Any]],
    outputs: Outputs,
) -> dict[str, Any]:
    """Print, write the page and the card."""
    from octad.evaluate.card import may_write, write_verdict
    from octad.evaluate.record import make_report
    from octad.report.verdict_blocks import render

    command = shlex.join(["octad", *(Path(part).name for part in sys.argv[1:])])  # nobody's directories
    made = make_report(found, checked, routing=routing, tasks=tasks, command=command)
    if outputs.as_json:
        print(json.dumps(made, indent=2))
    else:
        for part in render(made):
            terminal.out.print(part)
        commands_tasks.show(tasks)
    tell = terminal.err.print if outputs.as_json else terminal.out.print
    if outputs.report is not None:
        from octad.report.files import write_report

        tell(f"wrote {write_report(made, outputs.report)}", soft_wrap=True, markup=False)
    if outputs.card or (outputs.card is None and may_write(source, found.texts.total)):
        tell(f"wrote the verdict into {write_verdict(source, made)}", soft_wrap=True, markup=False)
    if not all(requirement["holds"] for requirement in checked):
        raise SystemExit(1)
    return made


def _routing(source: TensorSource, found: Comparison, cache: Cache, progress: Any) -> dict[str, Any] | None:
    """What the routers do, from the cache where it is known; None for a dense model."""
    if not source.config.is_moe:
        return None
    from octad.checkpoint.load import load_tokenizer
    from octad.evaluate.contestants import fast_model
    from octad.evaluate.results import Content, key_of
    from octad.evaluate.routing import collect_routing

    texts, names = found.texts, found.lineup.experts
    key = key_of(
        "routing", Content(source).everything(), texts.digest, list(texts.domains), names, found.dtype
    )
    if (known := cache.get_plain(key)) is not None:
        return known
    total, done = sum(len(w.ids) for w in texts.windows), 0

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress("routing", min(1.0, done / total))

    model, tokenizer = fast_model(source), load_tokenizer(source)
    routing: dict[str, Any] | None = collect_routing(model, tokenizer, texts.domains, names, progress=tick)
    cache.put_plain(key, routing)
    return routing
