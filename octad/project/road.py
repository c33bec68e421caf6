"""`octad make`: the whole road in one directory: specialists, mixture, verdict, and where asked for a repair.

    make("mine")                # branch.yaml, recipe.yaml, domains.yaml, tune.yaml -> specialists/, mixture/, report/
    make("mine", repair=True)   # and tuned/, tuned-report/

Each stage is skipped where nothing that it reads has changed since it was done (stages.py). A killed or interrupted run
goes on where it was: a specialist at its last saved step. One whose text or settings changed is trained again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from octad.api import verbs, verdicts
from octad.api.bars import Progress, Report, Tell, bars, teller
from octad.api.outcomes import Verdict, Written
from octad.checkpoint.load import open_member, open_source
from octad.checkpoint.provenance import PROVENANCE
from octad.combine.recipe import Recipe
from octad.dist import compute_dtype, product_rate
from octad.errors import OctadError, RecipeError
from octad.evaluate.card import may_write
from octad.evaluate.domains import read_domains
from octad.figures import duration
from octad.model import cost
from octad.project.layout_text import BRANCH, DOMAINS, RECIPE, TUNE
from octad.project.stages import Record, domains_key, key_of, refuse_foreign, text_key
from octad.telling import quiet
from octad.train.branch import train_specialist
from octad.train.forecast import branch_seconds, check_text
from octad.train.run_config import BranchConfig, SpecialistSpec, load_branch, load_config
from octad.train.trainer import Outcome

SPECIALISTS, MIXTURE, REPORT, TUNED = "specialists", "mixture", "report", "tuned"


@dataclass
class Road:
    """One run of make: the directory, what was done before, who listens, and how long each stage may take."""

    place: Path
    tokens: int
    record: Record
    say: Callable[[str], None]
    bar: Report = quiet
    judge: bool = True
    pace: float | None = None
    expected: dict[str, float] = field(default_factory=dict)
    over: float = 0.0  # seconds of stages that are done, by the forecast
    done: list[str] = field(default_factory=list)

    def reached(self, stage: str, share: float) -> None:
        """How far all of it is, with this share of one stage done."""
        total = sum(self.expected.values())
        if total:
            self.bar("all of it", min(1.0, (self.over + share * self.expected.get(stage, 0.0)) / total))

    def passed(self, stage: str) -> None:
        """A stage is over."""
        self.over += self.expected.get(stage, 0.0)
        self.done.append(stage)
        self.reached("", 0.0)

    def within(self, stage: str) -> Report:
        """A progress function for a stage of which only the time that it takes is known."""
        begun, most = time.monotonic(), max(1.0, self.expected.get(stage, 1.0))

        def update(part: str, done: float) -> None:
            self.bar(part, done)
            self.reached(stage, min(0.99, (time.monotonic() - begun) / most))

        return update


def make(
    directory: PathLike[str] | str,
    *,
    repair: bool = False,
    tokens: int = 4096,
    dry_run: bool = False,
    judge: bool = True,
    pace: float | None = None,
    progress: Progress = True,
    tell: Tell = None,
) -> Written:
    """Go the whole road in a directory that `init` began; what is done already is skipped. `tokens` of each domain are
    judged on (`judge`: whether at all); `pace`: seconds that a step of training takes, where that was measured;
    `dry_run`: only say what would be done. `facts["headline"]` is the verdict. Raises OctadError.

    >>> octad.make("mine", tokens=200, progress=False).facts["done"]
    ['branch law', 'branch sea', 'combine', 'evaluate']
    >>> octad.make("mine", tokens=200, progress=False).facts["done"]
    []
    """
    started, place = time.monotonic(), Path(directory)
    if not (place / RECIPE).is_file() and not (place / BRANCH).is_file():
        if not place.exists():
            raise RecipeError(f"{place}: no such directory; `octad init {place}` begins one")
        if not place.is_dir():
            raise RecipeError(f"{place}: is no directory; give one that `octad init` began")
        raise RecipeError(f"{place}: holds no {BRANCH} and no {RECIPE}; `octad init {place}` writes them")
    road = Road(place, tokens, Record(place), teller(tell), judge=judge, pace=pace)
    config = load_branch(place / BRANCH) if (place / BRANCH).is_file() else None
    recipe = Recipe.load(place / RECIPE)
    for name in (
        DOMAINS,
        *([TUNE] if repair else []),
    ):  # a mistake in the last file is seen before the first stage
        read_domains(place / name) if name == DOMAINS else load_config(place / name)
    if config is not None:
        check_text(config, config.experts)
    waiting = _forecast(road, config, recipe)
    if dry_run:
        return Written(place, 0.0, would_do=waiting)
    with bars(progress) as road.bar:
        road.bar("all of it", 0.0)  # above the stages
        if config is not None and not _branch(road, config):
            return Written(place, time.monotonic() - started, finished=False, done=road.done)
        key = _combine(road)
        headline = _evaluate(road, MIXTURE, REPORT, key) if judge else ""
        if repair and not (headline := _repair(road, key)):
            return Written(place, time.monotonic() - started, finished=False, done=road.done)
        road.bar("all of it", 1.0)
    made, report = (TUNED, f"{TUNED}-{REPORT}") if repair else (MIXTURE, REPORT)
    facts: dict[str, Any] = {"done": road.done, "headline": headline, "mixture": str(place / made)}
    facts |= {"report": str(place / report / "index.html")} if judge else {}
    return Written(place, time.monotonic() - started, **facts)


# ---- before work ----------------------------------------------------------------------------------------------


def _forecast(road: Road, config: BranchConfig | None, recipe: Recipe) -> list[str]:
    """Say what will be done and about how long it takes; the stages that are not done yet."""
    keys = _specialist_keys(road, config) if config is not None else {}
    waiting = [
        s for s in (config.experts if config is not None else ()) if not _trained(road, s, keys[s.name])
    ]
    if config is not None:
        road.expected |= {f"branch {s.name}": _seconds(road, config, s) for s in waiting}
    dense = open_source(recipe.resolve(recipe.base)).config
    count, rate = len(recipe.experts), 0.4 * product_rate(compute_dtype(), seconds=0.1)
    combining = 2 * cost.body_parameters(dense) * recipe.router.tokens * count / rate
    if waiting or _combine_state(road)[1]:
        road.expected["combine"] = combining + count * cost.parameters(dense) * 2 / 0.5e9
    domains = len(read_domains(road.place / DOMAINS))
    judging = domains * road.tokens * count * 3 * cost.flops_per_token(dense) / rate
    if road.judge and (
        road.expected
        or not road.record.is_done(REPORT, _report_key(road, _combine_state(road)[0]), road.place / REPORT)
    ):
        road.expected["evaluate"] = judging
    known = [s.name for s in config.experts if s not in waiting] if config is not None else []
    if known:
        road.say(f"done before: {', '.join(known)}")
    for stage, seconds in road.expected.items():
        road.say(f"to do: {stage}, {_about(seconds)}")
    if len(road.expected) > 1:
        road.say(f"{_about(sum(road.expected.values()))} in all on this machine")
    return list(road.expected)


def _seconds(road: Road, config: BranchConfig, specialist: SpecialistSpec) -> float:
    """Of training a specialist."""
    if road.pace is None:
        return branch_seconds(config, [specialist])
    return road.pace * (specialist.steps or config.steps)


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds >= 1 else "a moment"


# ---- specialists -------------------------------------------------------------------------------------------------


def _specialist_keys(road: Road, config: BranchConfig) -> dict[str, dict[str, Any]]:
    """What each depends on: text, settings, and the steps apart, since more of them go on from what there is."""
    settings = config.model_dump(
        mode="json", exclude={"experts", "steps", "save", "log_every", "retries", "ray", "keep"}
    )
    keep = config.keep
    settings |= {"keep": keep.model_dump(exclude={"data"})} if keep is not None else {}
    base = open_source(config.resolve(config.base)).provenance().get("files")
    found = {}
    for s in config.experts:
        read = (s.data, s.held_out, *([keep.data] if keep is not None else []))
        texts = [text_key([config.resolve(r) for r in part]) for part in read]
        own = s.model_dump(mode="json", exclude={"steps", "data", "held_out"})
        found[s.name] = {"rest": key_of(base, settings, texts, own), "steps": s.steps or config.steps}
    return found


def _trained(road: Road, specialist: SpecialistSpec, key: dict[str, Any]) -> bool:
    run = road.place / SPECIALISTS / specialist.name
    result = next(
        (p for n in ("adapter_config.json", "config.json") if (p := run / n).is_file()), run / "none"
    )
    return road.record.is_done(f"branch {specialist.name}", key_of(key), result)


def _branch(road: Road, config: BranchConfig) -> bool:
    """Train what is not trained; False where it was asked to stop."""
    keys = _specialist_keys(road, config)
    for specialist in config.experts:
        stage, key = f"branch {specialist.name}", keys[specialist.name]
        if _trained(road, specialist, key):
            continue
        run = road.place / SPECIALISTS / specialist.name
        before = road.record.begun(stage)
        if before is not None and (
            before.get("rest") != key["rest"] or before.get("steps", 0) > key["steps"]
        ):
            road.say(f"{specialist.name}: its text or settings changed; it is trained anew")
            shutil.rmtree(run, ignore_errors=True)
        road.record.note(stage, key_of(key), done=False, **key)

        def update(name: str, share: float, stage: str = stage) -> None:
            road.bar(stage, share)
            road.reached(stage, share)

        outcome = train_specialist(config, specialist, road.place / SPECIALISTS, road.say, update)
        if outcome is Outcome.STOPPED:
            return False
        road.record.note(stage, key_of(key), done=True, **key)
        road.passed(stage)
    return True


# ---- the mixture -----------------------------------------------------------------------------------------------------


def _combine_state(road: Road) -> tuple[str, bool]:
    """The key of the mixture, and whether it has to be made; "" and True while members are missing."""
    recipe = Recipe.load(road.place / RECIPE)
    try:
        base = open_source(recipe.resolve(recipe.base))
        members = []
        for spec in recipe.experts:
            reference = spec.model if spec.model == "base" else recipe.resolve(spec.model)
            member = open_member(reference, base) if reference != "base" else base
            text = text_key([recipe.resolve(file) for file in spec.data])
            members.append([spec.name, spec.field, member.provenance().get("files"), text])
    except OctadError:
        return "", True
    key = key_of(recipe.model_dump(mode="json", exclude={"experts"}), members)
    return key, not road.record.is_done("combine", key, road.place / MIXTURE / PROVENANCE)


def _combine(road: Road) -> str:
    """Make the mixture where it is not there; its key."""
    key, needed = _combine_state(road)
    output = road.place / MIXTURE
    if not needed:
        return key
    refuse_foreign(road.record, "combine", output, PROVENANCE)
    written = verbs.combine(road.place / RECIPE, output, overwrite=True, progress=road.within("combine"))
    road.record.note("combine", key, done=True)
    road.say(f"wrote {written} in {duration(written.seconds)}")
    road.passed("combine")
    return key


# ---- the verdict -------------------------------------------------------------------------------------------------------


def _report_key(road: Road, model: str) -> str:
    return key_of(model, domains_key(read_domains(road.place / DOMAINS)), road.tokens)


def _evaluate(road: Road, model: str, report: str, model_key: str) -> str:
    """Judge and write the page where that is not done; the verdict in a sentence."""
    key, page = _report_key(road, model_key), road.place / report / "index.html"
    if road.record.is_done(report, key, page):
        return str((road.record.begun(report) or {}).get("headline", ""))
    stage = "evaluate"
    verdict: Verdict = verdicts.evaluate(
        road.place / model,
        road.place / DOMAINS,
        tokens=road.tokens,
        routing=True,
        progress=road.within(stage),
        tell=road.say,
    )
    verdict.save(road.place / report)
    if may_write(verdict.source, sum(domain["tokens"] for domain in verdict.report["domains"])):
        verdict.write_card()
    road.record.note(report, key, done=True, headline=verdict.headline)
    road.say(f"wrote {page}")
    road.passed(stage)
    return verdict.headline


def _repair(road: Road, mixture_key: str) -> str:
    """Tune the mixture and judge it again; "" where it was asked to stop."""
    config = load_config(road.place / TUNE)
    texts = [text_key([config.resolve(file) for file in s.data]) for s in config.data.sources]
    key, run = key_of(mixture_key, config.to_dict(), texts), road.place / TUNED
    if not road.record.is_done(TUNED, key, run / "config.json"):
        before = road.record.begun(TUNED)
        if before is not None and before.get("key") != key:
            shutil.rmtree(run, ignore_errors=True)
        road.record.note(TUNED, key, done=False)
        written = verbs.train(road.place / TUNE, run, progress=road.within("repair"), tell=road.say)
        if not written.finished:
            return ""
        road.record.note(TUNED, key, done=True)
        road.passed("repair")
    return _evaluate(road, TUNED, f"{TUNED}-{REPORT}", key)
