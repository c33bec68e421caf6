"""Changing one expert of a mixture that octad made: add, replace, remove, without refitting the others.

    add_expert("mixture", ExpertSpec(name="welsh", model="adapters/welsh", data=("welsh.jsonl",)), Path("mixture-9"))
    remove_expert("mixture", "french")                       # in place: staged beside it, renamed when complete

Every edit is a list of slots, one for each expert of the result: the number of the expert that stays, or None for the
newcomer. The shared part is copied as it is. Ridge statistics add up, so the newcomer's text alone is run and counted in,
and the text of one who leaves is run once more and counted out; the routers then are those of a fresh combination, to
rounding. Where nothing adds up (logistic, prompts, or another generalist, whom everybody's text runs through), all are
fitted again from the calibration tokens that the mixture carries. And where more than routers was made of all members
(attention that was merged, closed-form repair), they are combined again from where they lay: see recombine.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.load import load_tokenizer, needs_base, open_member
from octad.checkpoint.names import EMBEDDING
from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import ExpertView
from octad.checkpoint.writer import CheckpointWriter
from octad.combine.build import expert_record, recipe_record, write_and_fit, write_sidecars
from octad.combine.calibrate import gate_inputs
from octad.combine.calibration import calibration
from octad.combine.conversion import conversions
from octad.combine.distances import measure
from octad.combine.editable import EditableMixture, RecordedBase, generalist_of
from octad.combine.fit import Additive, Calibration, Fitter, fitter_of, runs_of
from octad.combine.members import MemberReport, measured, member_report
from octad.combine.mixture import MixtureSource
from octad.combine.recipe import ExpertSpec, Recipe, SharedSpec
from octad.combine.recombine import new_recipe, recombine
from octad.combine.token_rows import Owners, Vocabulary, agree
from octad.dist import compute_dtype
from octad.errors import CheckpointError, RecipeError
from octad.model.config import ModelConfig
from octad.staging import StagedDirectory, alone
from octad.telling import Progress, Tell, quiet, silent

Slots = Sequence[int | None]
EXPERT_COUNTS = ("num_local_experts", "num_experts")


def add_expert(
    directory: str | Path,
    spec: ExpertSpec,
    output: Path | None = None,
    *,
    base: str | None = None,
    progress: Progress = quiet,
    tell: Tell = silent,
) -> Path:
    """Add one expert, the last. `output` None changes the mixture in place, atomically; returns where the result lies.

    `base`: what an adapter was made on, where the mixture does not hold its base as an expert. `tell` hears what the user
    should know of the newcomer and the routers, a line each.
    Raises RecipeError, CheckpointError, DataError, OutputError, one line each."""
    old = EditableMixture.open(Path(directory))
    old.refuse_name(spec.name)
    return _change(
        old, [*range(len(old.names)), None], spec, output, base, f"add {spec.name}", progress, tell
    )


def replace_expert(
    directory: str | Path,
    name: str,
    spec: ExpertSpec,
    output: Path | None = None,
    *,
    base: str | None = None,
    progress: Progress = quiet,
    tell: Tell = silent,
) -> Path:
    """Put another member in the place of expert `name`; it may keep the name. Otherwise as add_expert."""
    old = EditableMixture.open(Path(directory))
    place = old.place(name)
    if spec.name != name:
        old.refuse_name(spec.name)
    slots = [None if e == place else e for e in range(len(old.names))]
    note = f"replace {name}" + (f" with {spec.name}" if spec.name != name else "")
    return _change(old, slots, spec, output, base, note, progress, tell)


def remove_expert(
    directory: str | Path,
    name: str,
    output: Path | None = None,
    *,
    base: str | None = None,
    progress: Progress = quiet,
    tell: Tell = silent,
) -> Path:
    """Take expert `name` out; those after it move up. Otherwise as add_expert (`base` is not needed, nor opened)."""
    old = EditableMixture.open(Path(directory))
    place = old.place(name)
    left, top_k = len(old.names) - 1, old.source.config.num_experts_per_tok
    if left < max(2, top_k):
        need = f"each token uses {top_k}" if top_k > left else "a mixture has at least 2"
        are_left = "1 expert" if left == 1 else f"{left} experts"
        raise RecipeError(f"{directory}: without {name!r} it has {are_left}, but {need}; replace it instead")
    slots = [e for e in range(len(old.names)) if e != place]
    return _change(old, slots, None, output, None, f"remove {name}", progress, tell)


@dataclass(frozen=True)
class Newcomer:
    """A member that joins: checked, with its calibration text, its entry for octad.json, and the vocabulary with it.

    more_ends: all ids that end a text, where it brings some that the mixture has not."""

    member: TensorSource
    calibration: Calibration
    record: dict[str, Any]
    vocabulary: Vocabulary
    more_ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Edit:
    """One change: which expert of the old mixture (None: the newcomer) has each place in the new one."""

    old: EditableMixture
    slots: Slots
    recipe: Recipe
    newcomer: Newcomer | None = None

    @property
    def members(self) -> list[TensorSource]:
        """The new mixture's experts as dense models."""
        return [self._newcomer.member if s is None else ExpertView(self.old.source, s) for s in self.slots]

    @property
    def calibrations(self) -> list[Calibration]:
        """Their texts."""
        return [self._newcomer.calibration if s is None else self.old.calibrations[s] for s in self.slots]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Their entries in octad.json."""
        return [self._newcomer.record if s is None else self.old.provenance.experts[s] for s in self.slots]

    @property
    def leaving(self) -> list[int]:
        """The old mixture's experts that have no place in the new one."""
        return [e for e in range(len(self.old.names)) if e not in self.slots]

    @property
    def keeps_generalist(self) -> bool:
        """True where everybody's text runs through the same generalist as before, or there was and is none."""
        before, after = self.old.generalist, generalist_of(self.records)
        if before is None or after is None:
            return before is after
        return self.slots[after] == before

    @property
    def config_dict(self) -> dict[str, Any]:
        """The mixture's config.json with the new number of experts, and the rows that the newcomer adds."""
        raw = dict(self.old.source.config.raw)
        rows = [self.newcomer.member.config.vocab_size] if self.newcomer else []
        counts = {key: len(self.slots) for key in EXPERT_COUNTS if key in raw}
        more = {"eos_token_id": list(ends)} if self.newcomer and (ends := self.newcomer.more_ends) else {}
        return raw | counts | more | {"vocab_size": max([self.old.source.config.vocab_size, *rows])}

    def source(self) -> MixtureSource:
        """The new mixture, lazily: its shared part is the old one's, whatever the members hold."""
        config, dtype = ModelConfig.from_dict(self.config_dict), self.old.source.info(EMBEDDING).dtype
        shared = ExpertView(self.old.source, 0)
        owners = None
        if self.newcomer is not None and self.newcomer.vocabulary.owners.added:
            nobody = torch.zeros(config.vocab_size, dtype=torch.bool)
            theirs = self.newcomer.vocabulary.owners
            owners = Owners(theirs.base, [theirs.members[0] if s is None else nobody for s in self.slots])
        return MixtureSource(config, shared, self.members, SharedSpec(), dtype=dtype, owners=owners)

    @property
    def _newcomer(self) -> Newcomer:
        if self.newcomer is None:
            raise ValueError("a slot is None, but nobody joins")
        return self.newcomer


def _change(
    old: EditableMixture,
    slots: Slots,
    spec: ExpertSpec | None,
    output: Path | None,
    base: str | None,
    note: str,
    progress: Progress,
    tell: Tell,
) -> Path:
    """Carry one edit out; `note` is what octad.json will say of it. In place, no two processes do it at once: the change
    of one would be lost."""
    with alone(old.directory) if output is None else nullcontext():
        old.check_same()
        StagedDirectory(output or old.directory, overwrite=output is None).check()
        if old.together:
            options: dict[str, Any] = {"base": base, "note": note, "progress": progress, "tell": tell}
            return recombine(old, slots, spec, output, **options)
        edit = Edit(old, slots, new_recipe(old, slots, spec))
        if spec is not None:
            edit = replace(edit, newcomer=welcome(old, edit.recipe, spec, base, tell))
        kept = old.foreign_files() if output is None else []
        source = edit.source()
        plan = {name: source.info(name) for name in source.names()}
        if not edit.keeps_generalist and edit.recipe.router.method in ("ridge", "logistic"):
            tell("the generalist changes: all routers are fitted again from the stored text")
        with CheckpointWriter(output or old.directory, plan, overwrite=output is None) as writer:
            dtype = compute_dtype()
            fit = write_and_fit(
                writer, source, refitter(edit, source.config, dtype, progress), dtype, progress
            )
            for path in kept:
                writer.copy_in(path)
            provenance = replace(
                old.provenance,
                recipe=recipe_record(edit.recipe),
                experts=edit.records,
                edits=[*old.provenance.edits, note],
            )
            tokenizer = edit.newcomer.vocabulary.tokenizer if edit.newcomer else load_tokenizer(old.source)
            write_sidecars(writer, edit.config_dict, tokenizer, provenance, edit.calibrations, fit)
            return writer.commit()


# ---- the newcomer ------------------------------------------------------------------------------------------


def welcome(old: EditableMixture, recipe: Recipe, spec: ExpertSpec, base: str | None, tell: Tell) -> Newcomer:
    """Open and check a new member as preflight does. Raises RecipeError, CheckpointError, DataError."""
    reference = spec.model if spec.model == "base" else recipe.resolve(spec.model)
    try:
        wanted = base is not None or needs_base(reference)
        under = old.base_for(base) if wanted else old.held_base()
        member = open_member(reference, under, exact=True)
    except CheckpointError as error:
        raise RecipeError(f"expert {spec.name!r}: {error}") from None
    report = member_report(spec.name, spec.model, member, under, "base")
    chosen = spec.name if recipe.chat_template == spec.name else None
    alone = recipe.model_copy(update={"experts": (spec,), "chat_template": chosen})
    before = load_tokenizer(old.source)
    vocabulary = agree(alone, ExpertView(old.source, 0), [member], before, joining=True)
    text = calibration(recipe, spec, vocabulary.tokenizer)
    (distances,) = measure(under, [member])
    if isinstance(under, RecordedBase) and old.generalist is None:  # feed-forward nets are expert 0's
        distances = replace(distances, lost_share=None, same_ffn=False)
    report = measured(report, distances, "base")
    dtype = old.source.info(EMBEDDING).dtype
    rounding = [line for name, line in conversions(under, [member], [spec.name], dtype) if name]
    for told in (
        _in_words(report, old, under),
        *report.notes,
        *(note for _, note in vocabulary.notes),
        *rounding,
    ):
        tell(f"expert {spec.name!r}: {told}")
    record = expert_record(report, text, member.provenance())
    ends = vocabulary.tokenizer.eos_ids
    return Newcomer(member, text, record, vocabulary, ends if set(ends) > set(before.eos_ids) else ())


def _in_words(report: MemberReport, old: EditableMixture, under: TensorSource) -> str:
    """What a member is, how far from the base or the expert it was measured against, and how the mixture holds it."""
    ffn = report.distances.get("ffn", [])
    held = isinstance(under, RecordedBase) and old.generalist is None
    beside = f"expert {old.names[0]!r} (the base is no expert here)" if held else "the base"
    return f"{report.kind}, {sum(ffn) / max(1, len(ffn)):.4f} from {beside}; {report.sentence}"


# ---- the routers -------------------------------------------------------------------------------------------


def refitter(edit: Edit, config: ModelConfig, dtype: torch.dtype, progress: Progress = quiet) -> Fitter:
    """What fits the routers of the new mixture: by addition where the statistics allow, else from all stored text."""
    old, spec, generalist = edit.old, edit.recipe.router, generalist_of(edit.records)
    ends = config.eos_token_ids
    if old.statistics is None or spec.method != "ridge" or not edit.keeps_generalist:
        return fitter_of(spec, config, edit.calibrations, generalist, dtype)
    for e in edit.leaving:  # counted out, in the place that they had
        leaver = Additive(
            spec, old.statistics, runs_of(_only(old.calibrations, e), old.generalist, ends), sign=-1.0
        )
        steps = config.num_hidden_layers * len(leaver.runs)
        for done, step in enumerate(gate_inputs(old.source, leaver.runs, dtype), 1):
            leaver.see(*step)
            progress("calibrating", done / steps)
    joining = _only(edit.calibrations, edit.slots.index(None)) if None in edit.slots else []
    return Additive(spec, old.statistics.moved(edit.slots), runs_of(joining, generalist, ends))


def _only(calibrations: Sequence[Calibration], expert: int) -> list[Calibration]:
    """The text of one expert, all the others silent."""
    return [c if e == expert else Calibration([], []) for e, c in enumerate(calibrations)]
