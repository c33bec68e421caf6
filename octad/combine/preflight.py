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
from octad.checkpoint.load import load_tokenizer, open_member, open_source
from octad.checkpoint.names import EMBEDDING, tensor_plan
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.writer import CheckpointWriter
from octad.combine import distances
from octad.combine.calibration import calibration, check_files
from octad.combine.conversion import conversions
from octad.combine.distances import Distances
from octad.combine.family import TARGETS, mixture_config
from octad.combine.fit import Calibration
from octad.combine.members import MemberReport, alike, measured, member_report, refuse_base_again, unplaced
from octad.combine.mixture import MixtureSource
from octad.combine.recipe import Recipe, check_name
from octad.combine.remember import RememberLast
from octad.combine.token_rows import Vocabulary, agree
from octad.errors import CheckpointError, ConfigError, OutputError, RecipeError
from octad.model.config import ModelConfig
from octad.staging import StagedDirectory
from octad.text.tokenizer import Tokenizer

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
        return self.vocabulary.tokenizer

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
        """The first expert that is the base itself and is held exactly, if there is one."""
        same = (
            e for e, m in enumerate(self.members) if m is self.base and self.recipe.shared.method == "base"
        )
        return next(same, None)

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights on disk."""
        return sum(info.nbytes for info in self.tensors.values())

    def source(self) -> MixtureSource:
        """The mixture as a lazy source, routers missing."""
        weights = [e.weight for e in self.recipe.experts]
        return MixtureSource(
            self.config,
            self.base,
            self.members,
            self.recipe.shared,
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
        StagedDirectory(output, overwrite=overwrite).check()
    plan = opened(recipe)
    if output is not None:
        CheckpointWriter(output, plan.tensors).check_space()
    if measure:
        found = distances.measure(plan.base, plan.members, plan.vocabulary.owners.base_rows)
        plan.reports = [
            measured(r, d, recipe.shared.method) for r, d in zip(plan.reports, found, strict=True)
        ]
        refuse_base_again(plan.reports, found, recipe.shared.method)
        names = [spec.name for spec in recipe.experts]
        plan.notes += (*without_effect(recipe, found), *alike(names, plan.members, found))
        for name, line in conversions(plan.base, plan.members, names, plan.dtype):
            plan.note(name, line)
    return plan


def without_effect(recipe: Recipe, found: Sequence[Distances]) -> Iterator[str]:
    """What the recipe asks for in vain, in sentences."""
    method = recipe.shared.method
    if method != "base" and all(d.same_shared_part for d in found):
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


def opened(recipe: Recipe) -> Plan:
    """The recipe with its base and members opened, everything checked that needs no weights, and its text read."""
    for spec in recipe.experts:
        check_name(spec.name)
    check_files(recipe)
    source = open_source(recipe.resolve(recipe.base), exact=True)
    base = RememberLast(source)
    if base.config.model_type not in TARGETS:
        mixture_config(base.config, 1, 1, "float32", base.config.vocab_size)
    members = [_open(recipe, spec.name, spec.model, base) for spec in recipe.experts]
    reports = [
        member_report(spec.name, spec.model, member, base, recipe.shared.method)
        for spec, member in zip(recipe.experts, members, strict=True)
    ]
    own = load_tokenizer(source)
    found = agree(recipe, base, members, own)
    reports = [replace(r, notes=(*r.notes, *found.notes_on(r.name))) for r in reports]
    dtype = recipe.dtype or _dtype_name(source)
    ends = found.tokenizer.eos_ids if found.tokenizer.eos_ids != own.eos_ids else ()
    raw = mixture_config(base.config, len(members), recipe.top_k, dtype, found.size, ends)
    config = ModelConfig.from_dict(raw)
    texts = [calibration(recipe, spec, found.tokenizer) for spec in recipe.experts]
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
    return str(dtype).removeprefix("torch.") if dtype in DTYPES.values() else "bfloat16"
