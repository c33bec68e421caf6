"""The pre-flight: everything that can be known, and refused, before any work is done.

    plan = preflight(Recipe.load("recipe.yaml"))      # opens base and members; raises RecipeError with the reason
    plan.reports, plan.notes, plan.output_bytes       # what `octad combine --dry-run` prints

Each difference between a member and the base is either harmless (nothing is said), worth knowing (a note says why it is
no problem), or fatal (refused, naming member, what, found and expected). The cheap checks come first, the output and the
text among them; then the members are measured (distances.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.gguf.reader import GGUFSource
from octad.checkpoint.load import load_tokenizer, open_member, open_source, unplaced
from octad.checkpoint.names import EMBEDDING, tensor_plan
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.writer import CheckpointWriter
from octad.combine import distances
from octad.combine.calibration import calibration, check_files
from octad.combine.choose import choose
from octad.combine.conversion import conversions
from octad.combine.distances import Distances
from octad.combine.family import TARGETS, mixture_config
from octad.combine.fit import Calibration
from octad.combine.journal import has_journal
from octad.combine.members import MemberReport, alike, measured, member_report, refuse_base_again
from octad.combine.mixture import MixtureSource
from octad.combine.recipe import Recipe, SharedSpec, check_name
from octad.combine.remember import RememberLast
from octad.combine.token_rows import Vocabulary, agree
from octad.dist import dtype_name
from octad.errors import CheckpointError, ConfigError, OutputError, RecipeError
from octad.model.config import ModelConfig
from octad.staging import StagedDirectory
from octad.text.tokenizer import Tokenizer
from octad.text.windows import Window

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Plan:
    """An opened and checked recipe, ready to be carried out."""

    recipe: Recipe
    base: TensorSource
    members: list[TensorSource]
    config: ModelConfig
    config_dict: dict[str, Any]
    dtype: torch.dtype
    vocabulary: Vocabulary
    reports: list[MemberReport]
    calibrations: list[Calibration]
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Tokenizer:
        """The mixture's."""
        own, how = self.vocabulary.tokenizer, self.recipe.sampling.model_dump(exclude_none=True)
        if not how:
            return own
        generation = {**own.generation, "do_sample": how.get("temperature") != 0, **how}
        return Tokenizer(own.core, own.config, own.eos_ids, generation, own.label)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Everything that will be written."""
        return {name: TensorInfo(shape, self.dtype) for name, shape in tensor_plan(self.config).items()}

    def note(self, name: str, line: str) -> None:
        """Add a sentence on one expert, or on the base and all ("")."""
        if not name:
            self.notes += (line,)
        self.reports = [replace(r, notes=(*r.notes, line)) if r.name == name else r for r in self.reports]

    @property
    def generalist(self) -> int | None:
        """The first expert that is the base itself, if there is one."""
        return next((e for e, member in enumerate(self.members) if member is self.base), None)

    @property
    def repair_texts(self) -> list[list[Window]]:
        """Each expert's windows for closed-form repair; none where every member is held exactly."""
        return [] if all(report.exact for report in self.reports) else [c.longer for c in self.calibrations]

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights on disk."""
        return sum(info.nbytes for info in self.tensors.values())

    def source(self, shared: SharedSpec | None = None) -> MixtureSource:
        """The mixture as a lazy source, routers missing; with another way to share than the recipe's, where one is
        given."""
        weights = [e.weight for e in self.recipe.experts]
        return MixtureSource(
            self.config,
            self.base,
            self.members,
            shared or self.recipe.shared,
            weights,
            self.dtype,
            self.vocabulary.owners,
        )


def preflight(
    recipe: Recipe, output: str | Path | None = None, *, overwrite: bool = False, measure: bool = True
) -> Plan:
    """Open, check and measure; with `output`, also that a mixture can be written there.

    Raises RecipeError, CheckpointError, DataError or OutputError with one line."""
    if output is not None:
        if overwrite:
            check_apart(recipe, Path(output))
        StagedDirectory(output, overwrite=overwrite, adopt=has_journal).check()
    plan = opened(recipe)
    if output is not None:
        CheckpointWriter(output, plan.tensors).check_space()
    return inspected(plan, measure=measure)


def inspected(plan: Plan, *, measure: bool = True) -> Plan:
    """An opened plan with its members measured, and the way to share chosen where the recipe says auto."""
    recipe, found = plan.recipe, None
    if measure or recipe.shared.method == "auto":
        found = distances.measure(plan.base, plan.members, plan.vocabulary.owners.base_rows)
    if found is not None and recipe.shared.method == "auto":
        spec, why = choose(plan, found)
        recipe = recipe.model_copy(update={"shared": spec})
        plan = replace(plan, recipe=recipe, notes=(*plan.notes, why))
    if found is not None and measure:
        repaired = recipe.repair.method == "closed-form" and not all(d.same_shared_part for d in found)
        plan.reports = [
            measured(r, d, recipe.shared.method, repaired=repaired)
            for r, d in zip(plan.reports, found, strict=True)
        ]
        refuse_base_again(plan.reports, found, recipe.shared.method)
        names = [spec.name for spec in recipe.experts]
        plan.notes += (*without_effect(recipe, found), *alike(names, plan.members, found))
        for name, line in conversions(plan.base, plan.members, names, plan.dtype):
            plan.note(name, line)
    return plan


def without_effect(recipe: Recipe, found: Sequence[Distances]) -> Iterator[str]:
    """What the recipe asks for in vain, in sentences."""
    method, same = recipe.shared.method, all(d.same_shared_part for d in found)
    if recipe.repair.method == "closed-form" and same:
        yield "repair: closed-form changes nothing: every member is held exactly"
    if method != "base" and same:
        yield (
            f"shared: {method} changes nothing: every member's attention, norms and embeddings are the base's;"
            " with shared: base, experts can also be added, replaced and removed later"
        )


def check_apart(recipe: Recipe, output: Path) -> None:
    """Raises OutputError where replacing the output would remove the recipe or something that it names."""
    inputs = [recipe.base, *(name for spec in recipe.experts for name in (spec.model, *spec.data))]
    for path in (recipe.directory, *map(Path, map(recipe.resolve, inputs))):
        place = path.expanduser().resolve()
        if path.exists() and output.resolve() in (place, *place.parents):
            raise OutputError(f"{output}: holds {path}, which the recipe reads; choose another -o")


def opened(recipe: Recipe, stored: Sequence[Calibration | None] = ()) -> Plan:
    """The recipe with its base and members opened, everything checked that needs no weights, and its text read; that of
    experts with one in `stored` is there already."""
    kept = list(stored) or [None] * len(recipe.experts)
    fresh = [spec for spec, text in zip(recipe.experts, kept, strict=True) if text is None]
    for spec in fresh:
        check_name(spec.name)
    check_files(recipe.model_copy(update={"experts": tuple(fresh)}))
    source = open_source(recipe.resolve(recipe.base), exact=True)
    base = RememberLast(source)
    if base.config.model_type not in TARGETS:
        mixture_config(base.config, 1, 1, "float32", base.config.vocab_size)
    members = [_open(recipe, spec.name, spec.model, base) for spec in recipe.experts]
    auto = recipe.shared.method == "auto"  # what cannot be merged is not chosen
    reports = [
        member_report(spec.name, spec.model, member, base, "base" if auto else recipe.shared.method)
        for spec, member in zip(recipe.experts, members, strict=True)
    ]
    own = load_tokenizer(source)
    found = agree(recipe, base, members, own)
    reports = [replace(r, notes=(*r.notes, *found.notes_on(r.name))) for r in reports]
    dtype = recipe.dtype or _dtype_name(source)
    ends = found.tokenizer.eos_ids if found.tokenizer.eos_ids != own.eos_ids else ()
    raw = mixture_config(base.config, len(members), recipe.top_k, dtype, found.size, ends)
    config = ModelConfig.from_dict(raw)
    texts = [
        text or calibration(recipe, spec, found.tokenizer)
        for spec, text in zip(recipe.experts, kept, strict=True)
    ]
    odd = unplaced(source)
    notes = (*found.notes_on(""), *([f"the base, {source.label}: {odd}"] if odd else ()))
    return Plan(recipe, base, members, config, raw, DTYPES[dtype], found, reports, texts, notes)


def _open(recipe: Recipe, name: str, reference: str, base: TensorSource) -> TensorSource:
    try:
        return open_member(reference if reference == "base" else recipe.resolve(reference), base, exact=True)
    except (CheckpointError, ConfigError) as error:
        raise RecipeError(f"expert {name!r}: {error}") from None


def _dtype_name(base: TensorSource) -> str:
    """The type of the mixture where the recipe names none: the base's own."""
    dtype = base.native_dtype if isinstance(base, GGUFSource) else base.info(EMBEDDING).dtype
    return dtype_name(dtype) if dtype in DTYPES.values() else "bfloat16"
