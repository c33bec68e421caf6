"""A mixture on disk as something to change: opened, checked, with what it carries for the purpose.

old = EditableMixture.open(Path("mixture"))
old.place("french"), old.generalist, old.base_for(spec, None)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.extent import Extent
from octad.checkpoint.hf import INDEX
from octad.checkpoint.load import open_source
from octad.checkpoint.names import EMBEDDING, HEAD
from octad.checkpoint.provenance import PROVENANCE, Provenance
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.views import ExpertView, View
from octad.combine.fit import Calibration
from octad.combine.recipe import Recipe, check_name
from octad.combine.sidecars import STATISTICS, load_statistics
from octad.combine.statistics import Statistics
from octad.errors import CheckpointError, OctadError, OutputError, RecipeError, did_you_mean
from octad.model.config import ModelConfig
from octad.staging import tidy


@dataclass(frozen=True)
class EditableMixture:
    """A mixture that octad made, with its recipe, calibration text and statistics."""

    directory: Path
    source: TensorSource
    provenance: Provenance
    recipe: Recipe
    calibrations: list[Calibration]
    statistics: Statistics | None
    seen: tuple[int, int]  # which directory had the name when it was opened

    @classmethod
    def open(cls, directory: Path) -> EditableMixture:
        """Opens it, and removes what an edit of it that was killed left. Raises CheckpointError or RecipeError where
        there is no such mixture, or it cannot change in parts."""
        seen, source = _identity(directory), open_source(directory)
        place = directory.expanduser().resolve()
        tidy(place.parent, place.name)
        provenance = Provenance.of(source)
        if provenance is None:
            raise CheckpointError(
                f"{directory}: has no {PROVENANCE}; only a mixture made by `octad combine` can be changed"
            )
        recipe = Recipe.from_dict(provenance.recipe, Path(), f"recipe {directory / PROVENANCE}")
        if provenance.names != [spec.name for spec in recipe.experts]:
            raise CheckpointError(
                f"{directory / PROVENANCE}: names {len(provenance.experts)} experts, its recipe "
                f"{len(recipe.experts)} or others; combine again"
            )
        statistics = load_statistics(directory, len(recipe.experts))
        return cls(directory, source, provenance, recipe, *statistics, seen)

    def check_same(self) -> None:
        """Raises OutputError where another mixture has taken the place of this one since it was opened."""
        if _identity(self.directory) != self.seen:
            raise OutputError(f"{self.directory}: was changed by another process meanwhile; run this again")

    @property
    def names(self) -> list[str]:
        """The experts' names, in order."""
        return self.provenance.names

    @property
    def together(self) -> str:
        """What was made of all members, as the recipe says it, so that no expert can change alone; "" where nothing
        was."""
        if self.recipe.shared.method != "base":
            return f"shared: {self.recipe.shared.method}"
        return "repair: closed-form" if self.recipe.repair.method == "closed-form" else ""

    @property
    def generalist(self) -> int | None:
        """See generalist_of."""
        return generalist_of(self.provenance.experts)

    def place(self, name: str) -> int:
        """The number of an expert. Raises RecipeError naming the nearest one."""
        if name in self.names:
            return self.names.index(name)
        hint = did_you_mean(name, self.names) or f"it has {', '.join(self.names)}"
        raise RecipeError(f"{self.directory}: has no expert {name!r}; {hint}")

    def refuse_name(self, name: str) -> None:
        """Raises RecipeError where an expert has this name already, or none should have it."""
        check_name(name)
        if name in self.names:
            raise RecipeError(
                f"{self.directory}: has an expert {name!r} already; choose another name, or replace it"
            )

    def held_base(self) -> RecordedBase:
        """The base as far as the mixture holds it: feed-forward nets are the base's where there is a generalist."""
        return RecordedBase(self.source, self.generalist or 0, self.provenance.base)

    def base_for(self, reference: str | None) -> TensorSource:
        """The base for a new adapter: `reference`, else the generalist, else the base that octad.json names.

        A quantised base that the mixture holds rounded is opened again where it is still there, so that sums are rounded
        once. Raises RecipeError where none can be opened, or it is not what this mixture was made of."""
        if reference is None and self.generalist is not None:
            try:
                return self.base_for(self.provenance.base.get("path")) if self._rounded else self.held_base()
            except OctadError:
                return self.held_base()
        recorded = [self.provenance.base.get("path"), self.provenance.base.get("label"), self.recipe.base]
        references = [str(place) for place in recorded if place]
        base = _first_that_opens([reference] if reference else references, self.directory)
        if tensor := self._difference(base):
            raise RecipeError(
                f"base {base.label}: is not the one that {self.directory} was made of ({tensor} differs); "
                "give the right one with --base"
            )
        return OpenedBase(base, self.provenance.base)

    @property
    def _rounded(self) -> bool:
        """True where the base lies in a GGUF file, and its weights here are of a type that may not hold all values."""
        kind = self.provenance.base.get("kind")
        return (
            kind == "gguf"
            and self.source.info(EMBEDDING).dtype != torch.float32
            and bool(self.provenance.base.get("path"))
        )

    def _difference(self, base: TensorSource) -> str | None:
        """The first shared tensor of the last layer that is not the mixture's own."""
        at = f"model.layers.{self.source.config.num_hidden_layers - 1}."
        names = (f"{at}{part}" for part in ("input_layernorm.weight", "self_attn.q_proj.weight"))
        for name in names:
            ours = self.source.info(name)
            same_shape = name in base.names() and base.info(name).shape == ours.shape
            if not same_shape or not torch.equal(base.read(name).to(ours.dtype), self.source.read(name)):
                return name
        return None

    def foreign_files(self) -> list[Path]:
        """Files in the directory that are not weights: an edit in place keeps those that it does not write itself.

        Raises OutputError for a directory in it, which would be lost."""
        entries = sorted(self.directory.iterdir())
        if inner := next((path for path in entries if path.is_dir()), None):
            raise OutputError(
                f"{self.directory}: holds the directory {inner.name}, which a change in place would lose; "
                "choose another place with -o, or move it"
            )
        ours = (INDEX, STATISTICS)
        return [path for path in entries if path.suffix != ".safetensors" and path.name not in ours]


class RecordedBase(ExpertView):
    """One expert with the shared part as the base: the base's own vocabulary, and its provenance from octad.json."""

    def __init__(self, mixture: TensorSource, expert: int, recorded: Mapping[str, Any]) -> None:
        super().__init__(mixture, expert)
        self.recorded = recorded
        self._rows = int(recorded.get("vocab_size", mixture.config.vocab_size))

    @property
    def config(self) -> ModelConfig:
        """The dense family's, without the rows that members added to the vocabulary."""
        return replace(super().config, vocab_size=self._rows)

    def info(self, name: str) -> TensorInfo:
        """See TensorSource."""
        info = super().info(name)
        return replace(info, shape=(self._rows, *info.shape[1:])) if name in (EMBEDDING, HEAD) else info

    def read(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        tensor = super().read(name)
        return tensor[: self._rows] if name in (EMBEDDING, HEAD) else tensor

    def extent(self, name: str) -> Extent | None:
        """See TensorSource."""
        extent = super().extent(name)
        return extent.part(0, self.info(name).shape) if extent and name in (EMBEDDING, HEAD) else extent

    def provenance(self) -> Mapping[str, Any]:
        """What octad.json says of the base."""
        return self.recorded


class OpenedBase(View):
    """A base from elsewhere, proved to be the recorded one: its files are not hashed again."""

    def __init__(self, source: TensorSource, recorded: Mapping[str, Any]) -> None:
        super().__init__(source)
        self.recorded = recorded

    def provenance(self) -> Mapping[str, Any]:
        """What octad.json says of the base."""
        return self.recorded


def generalist_of(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The first expert that is the base itself."""
    return next((e for e, record in enumerate(records) if record["kind"] == "base"), None)


def _first_that_opens(references: Sequence[str], directory: Path) -> TensorSource:
    problem = ""
    for reference in references:
        try:
            return open_source(reference, exact=True)
        except OctadError as error:
            problem = str(error)
    raise RecipeError(f"{directory}: its base cannot be opened ({problem}); say where it is with --base")


def _identity(directory: Path) -> tuple[int, int]:
    """Of the directory that has this name now; zeros where none has."""
    try:
        found = directory.expanduser().stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino
