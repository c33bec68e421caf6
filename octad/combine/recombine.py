"""Changing an expert where something was made of all of them: combining again, of the members where they lay.

    recombine(old, slots, spec, output, base=None, note="add welsh", progress=quiet, tell=print)

Attention merged from all members (shared: mean, ...), or fitted to all (repair: closed-form), is another one when a
member comes or goes, and with it what every router reads. So the members that stay are opened at the paths that
octad.json recorded and have to be there as they were; the calibration text is that which the mixture carries. The
result is that of a fresh combination of the same members and text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octad.checkpoint.originals import check_digests, original, original_base, recorded_path
from octad.checkpoint.writer import CheckpointWriter
from octad.combine.build import plan_provenance, recipe_record, write_and_fit, write_sidecars
from octad.combine.editable import EditableMixture
from octad.combine.fit import fitter_of
from octad.combine.preflight import Plan, inspected, opened
from octad.combine.recipe import ExpertSpec, Recipe
from octad.dist import compute_dtype
from octad.errors import CheckpointError, ConfigError, RecipeError
from octad.telling import Progress


def recombine(
    old: EditableMixture,
    slots: Sequence[int | None],
    spec: ExpertSpec | None,
    output: Path | None,
    *,
    base: str | None,
    note: str,
    progress: Progress,
    tell: Callable[[str], None],
) -> Path:
    """Write the mixture with this expert (None: the newcomer `spec`) in each place; arguments as edit.py has them.

    Raises RecipeError where a member is gone or changed, or where there is more in the mixture than its members."""
    refuse_more(old)
    recipe = new_recipe(old, slots, spec)
    plan = gathered(old, slots, recipe, base)
    tell(
        f"{old.together}: made of all members: they are read again from where they lay, and all routers fitted"
    )
    for report in plan.reports:
        if spec is not None and report.name == spec.name:
            for line in (report.sentence, *report.notes):
                tell(f"expert {spec.name!r}: {line}")
    kept = old.foreign_files() if output is None else []
    with CheckpointWriter(output or old.directory, plan.tensors, overwrite=output is None) as writer:
        source, dtype = plan.source(), compute_dtype()
        fitter = fitter_of(recipe.router, plan.config, plan.calibrations, plan.generalist, dtype)
        fit = write_and_fit(writer, source, fitter, dtype, progress, plan.repair_texts)
        for path in kept:
            writer.copy_in(path)
        made = plan_provenance(plan, plan.calibrations, source.provenance())
        for record, expert in zip(made.experts, recipe.experts, strict=True):
            record["model"] = expert.model
        edits = [*old.provenance.edits, note]
        made = replace(made, recipe=recipe_record(recipe), base=old.provenance.base, edits=edits)
        write_sidecars(writer, plan.config_dict, plan.tokenizer, made, plan.calibrations, fit)
        return writer.commit()


def refuse_more(old: EditableMixture) -> None:
    """Raises RecipeError where the mixture is more than its members make: nothing of it is dropped in silence."""
    if trained := [edit for edit in old.provenance.edits if edit.startswith("trained")]:
        raise RecipeError(
            f"{old.directory}: {old.together} is made of all members, which would be combined again, and what was"
            f" {trained[-1]} lost; change the mixture that it was trained from, and train it again"
        )
    rows = int(old.provenance.base.get("vocab_size", 0))
    if rows != old.source.config.vocab_size:
        raise RecipeError(
            f"{old.directory}: {old.together} is made of all members, and some add tokens, which may get other ids when"
            " they are combined again, while the calibration text is kept in ids; combine again with the changed recipe"
        )


def gathered(old: EditableMixture, slots: Sequence[int | None], recipe: Recipe, base: str | None) -> Plan:
    """The new mixture's plan, of members where they lay. Raises RecipeError where one is not there as it was."""
    places = []
    for spec, slot in zip(recipe.experts, slots, strict=True):
        places.append(spec.model if slot is None else _found(old, old.provenance.experts[slot]))
    experts = tuple(
        spec.model_copy(update={"model": place}) for spec, place in zip(recipe.experts, places, strict=True)
    )
    where = _found(old, old.provenance.base) if base is None else base
    placed = recipe.model_copy(update={"base": where, "experts": experts})
    plan = opened(placed, [None if s is None else old.calibrations[s] for s in slots])
    if base is not None:
        try:
            check_digests(plan.base, old.provenance.base)
        except CheckpointError as error:
            raise _gone(old, str(error)) from None
    return inspected(plan)


def new_recipe(old: EditableMixture, slots: Sequence[int | None], spec: ExpertSpec | None) -> Recipe:
    """The recipe that would combine the new mixture. Raises RecipeError for a newcomer that lacks text or prompts."""
    specs = [spec if s is None else old.recipe.experts[s] for s in slots]
    experts = [s.model_dump(mode="json", exclude_defaults=True) for s in specs if s is not None]
    raw = recipe_record(old.recipe) | {"experts": experts}
    if raw.get("chat_template") not in ("base", *(entry["name"] for entry in experts)):
        raw.pop("chat_template", None)  # whose it was has left; the mixture has it by now
    return Recipe.from_dict(raw, Path(), f"recipe {old.directory}")


def _found(old: EditableMixture, record: Mapping[str, Any]) -> str:
    """Where the base, or an expert that stays, lies as it was; an expert that is the base is called so."""
    base = record is old.provenance.base
    if not base and record["kind"] == "base":
        return "base"
    try:
        original_base(old.provenance) if base else original(old.provenance, record)
        return recorded_path(record)
    except (CheckpointError, ConfigError) as error:
        raise _gone(old, f"{'the base' if base else repr(record['name'])}: {error}") from None


def _gone(old: EditableMixture, reason: str) -> RecipeError:
    return RecipeError(
        f"{old.directory}: {old.together} is made of all members, so that the base and those that stay must be where they"
        f" lay, as they were ({reason}); put it back, or combine again with the changed recipe"
    )
