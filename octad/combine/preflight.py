"""The pre-flight: everything that can be known, and refused, before any work is done.

    plan = preflight(Recipe.load("recipe.yaml"))      # opens base and members; raises RecipeError with the reason
    plan.reports, plan.notes, plan.output_bytes       # what `octad combine --dry-run` prints

Each difference between a member and the base is either harmless (nothing is said), worth knowing (a note says why it is
no problem), or fatal (refused, naming member, what, found and expected). The cheap checks come first, the output and the
text among them; then the members are measured (distances.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.load import load_tokenizer, open_member, open_source
from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.names import EMBEDDING, tensor_plan
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.writer import CheckpointWriter
from octad.combine import distances
from octad.combine.calibration import calibration, check_files
from octad.combine.distances import Distances
from octad.combine.family import TARGETS, mixture_config
from octad.combine.fit import Calibration
from octad.combine.mixture import MixtureSource
from octad.combine.recipe import Recipe, check_name
from octad.combine.views import RememberLast
from octad.errors import CheckpointError, ConfigError, OutputError, RecipeError
from octad.model.config import ModelConfig, RopeConfig
from octad.staging import StagedDirectory
from octad.text.tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "qkv_bias",
    "o_bias",
    "mlp_bias",
    "qk_norm",
)
ARITHMETIC_FIELDS = {  # and what attention is trained under where they differ
    "rope": "positions",
    "rms_norm_eps": "norms",
    "sliding_window": "windows",
    "sliding_layers": "windows",
}


@dataclass(frozen=True)
class MemberReport:
    """One member beside the base: notes, and distances by tensor group with their margin (see distances.py).

    exact: held unchanged, so that the mixture sent through this expert alone is this member; None where not measured."""

    name: str
    reference: str
    kind: str
    distances: dict[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    other_arithmetic: bool = False
    margin: float = 0.0
    exact: bool | None = None


@dataclass
class Plan:
    """An opened and checked recipe, ready to be carried out."""

    recipe: Recipe
    base: TensorSource
    members: list[TensorSource]
    config: ModelConfig
    config_dict: dict[str, Any]
    dtype: torch.dtype
    tokenizer: Tokenizer
    reports: list[MemberReport]
    calibrations: list[Calibration]
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Everything that will be written."""
        return {name: TensorInfo(shape, self.dtype) for name, shape in tensor_plan(self.config).items()}

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
        return MixtureSource(self.config, self.base, self.members, self.recipe.shared, weights, self.dtype)


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
        found = distances.measure(plan.base, plan.members)
        plan.reports = [
            measured(r, d, recipe.shared.method) for r, d in zip(plan.reports, found, strict=True)
        ]
        plan.notes = tuple(without_effect(recipe, found))
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
    source = open_source(recipe.resolve(recipe.base))
    base = RememberLast(source)
    if base.config.model_type not in TARGETS:
        mixture_config(base.config, 1, 1, "float32", base.config.vocab_size)
    members = [_open(recipe, spec.name, spec.model, base) for spec in recipe.experts]
    reports = [
        member_report(spec.name, spec.model, member, base, recipe.shared.method)
        for spec, member in zip(recipe.experts, members, strict=True)
    ]
    vocab_size, tokenizer = extended_vocabulary(recipe, base, members, load_tokenizer(source))
    dtype = recipe.dtype or _dtype_name(base.info(EMBEDDING).dtype)
    raw = mixture_config(base.config, len(members), recipe.top_k, dtype, vocab_size)
    config = ModelConfig.from_dict(raw)
    texts = [calibration(recipe, spec, tokenizer) for spec in recipe.experts]
    return Plan(recipe, base, members, config, raw, DTYPES[dtype], tokenizer, reports, texts)


def kind_of(member: TensorSource, base: TensorSource) -> str:
    """'base', 'adapter' or 'checkpoint'."""
    if member is base:
        return "base"
    return "adapter" if isinstance(member, AdapterSource) else "checkpoint"


def _open(recipe: Recipe, name: str, reference: str, base: TensorSource) -> TensorSource:
    try:
        return open_member(reference if reference == "base" else recipe.resolve(reference), base)
    except (CheckpointError, ConfigError) as error:
        raise RecipeError(f"expert {name!r}: {error}") from None


def member_report(
    name: str, reference: str, member: TensorSource, base: TensorSource, shared: str
) -> MemberReport:
    """What can be said of a member before it is measured. Raises RecipeError as check_member does."""
    notes = tuple(check_member(name, member, base, shared))
    keys = (*ARITHMETIC_FIELDS, "tie_word_embeddings")
    other = any(not _same(getattr(member.config, key), getattr(base.config, key)) for key in keys)
    return MemberReport(name, reference, kind_of(member, base), notes=notes, other_arithmetic=other)


def check_member(name: str, member: TensorSource, base: TensorSource, shared: str) -> list[str]:
    """Notes on harmless differences; raises RecipeError for one that the mixture cannot represent."""
    ours, theirs = base.config, member.config
    if member is base:
        return []
    if TARGETS.get(theirs.model_type) != TARGETS.get(ours.model_type):
        raise RecipeError(
            f"expert {name!r}: is a {theirs.model_type} model, the base a {ours.model_type}; "
            "members must be dense models of the base's family"
        )
    for key in SHAPE_FIELDS:
        if getattr(ours, key) != getattr(theirs, key):
            raise RecipeError(
                f"expert {name!r}: {key} is {getattr(theirs, key)}, the base has {getattr(ours, key)}; "
                "only models of one shape can share attention"
            )
    notes = []
    for key, under in ARITHMETIC_FIELDS.items():
        if _same(getattr(ours, key), getattr(theirs, key)):
            continue
        found, expected = _short(getattr(theirs, key)), _short(getattr(ours, key))
        if shared != "base":
            raise RecipeError(
                f"expert {name!r}: {key} is {found}, the base has {expected}; attention trained under different "
                f"{under} cannot be averaged (use shared: base)"
            )
        notes.append(
            f"{key} is {found}, the base has {expected}: the base's is used, its attention being shared"
        )
    if theirs.tie_word_embeddings != ours.tie_word_embeddings:
        tied = "tied to its embeddings" if theirs.tie_word_embeddings else "separate"
        if shared != "base":
            raise RecipeError(
                f"expert {name!r}: its head is {tied}, the base's is not alike; "
                "heads of different kinds cannot be averaged (use shared: base)"
            )
        notes.append(f"its head is {tied}, unlike the base's: the base's head is used")
    if theirs.vocab_size != ours.vocab_size:
        if theirs.vocab_size < ours.vocab_size:
            raise RecipeError(
                f"expert {name!r}: has {theirs.vocab_size} vocabulary rows, the base {ours.vocab_size}; "
                "a member may add tokens, not lack them"
            )
        notes.append(
            f"adds {theirs.vocab_size - ours.vocab_size} rows to the vocabulary: kept, averaged over those who have them"
        )
    return notes


def extended_vocabulary(
    recipe: Recipe, base: TensorSource, members: list[TensorSource], tokenizer: Tokenizer
) -> tuple[int, Tokenizer]:
    """The vocabulary size of the mixture and its tokenizer: that of the member that adds most tokens to the base's.

    Raises RecipeError where a member gives an id another token than the base, or two members add different tokens.
    """
    size, widest, owner = base.config.vocab_size, tokenizer, "the base"
    known = {_tokenizer_file(base)}  # parsing one costs a fifth of a second, and most members have the same
    for spec, member in zip(recipe.experts, members, strict=True):
        size = max(size, member.config.vocab_size)
        file = _tokenizer_file(member)
        if file is None or file in known:
            continue
        known.add(file)
        theirs = load_tokenizer(member)
        if clash := _clash(widest, theirs):
            raise RecipeError(
                f"expert {spec.name!r}: token {clash[0]} is {clash[2]!r}, in {owner} it is {clash[1]!r}; "
                "members must share one tokenizer (they may add tokens, the same ones)"
            )
        if theirs.vocab_size > widest.vocab_size:
            widest, owner = theirs, f"expert {spec.name!r}"
    return size, widest


def _tokenizer_file(source: TensorSource) -> bytes | None:
    """What the tokenizer.json beside the weights holds, if there is one."""
    file = source.directory / "tokenizer.json" if source.directory is not None else None
    return file.read_bytes() if file is not None and file.is_file() else None


def _clash(ours: Tokenizer, theirs: Tokenizer) -> tuple[int, str, str] | None:
    """The first id that both know under different names."""
    mine = {i: t for t, i in ours.core.get_vocab(with_added_tokens=True).items()}
    other = {i: t for t, i in theirs.core.get_vocab(with_added_tokens=True).items()}
    for i in sorted(mine.keys() & other.keys()):
        if mine[i] != other[i]:
            return i, mine[i], other[i]
    return None


def measured(report: MemberReport, found: Distances, shared: str) -> MemberReport:
    """The report with the distances, and what follows from them: whether the mixture holds this member exactly.

    Raises RecipeError where a distance is no number."""
    for group, values in found.groups.items():
        if not all(math.isfinite(value) for value in values):
            raise RecipeError(
                f"expert {report.name!r}: {report.reference} or its base holds NaN or infinite {group} weights;"
                " save it again"
            )
    exact = found.same_shared_part if shared == "base" and not report.other_arithmetic else False
    return replace(report, distances=found.groups, margin=found.margin, exact=exact)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if dtype in DTYPES.values() else "bfloat16"


def _same(ours: object, theirs: object) -> bool:
    """Equal, or the same number in float32: a GGUF file holds 1e-5 so, and tools write out what they read there."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return (
            torch.tensor(ours, dtype=torch.float32).item() == torch.tensor(theirs, dtype=torch.float32).item()
        )
    return ours == theirs


def _short(value: object) -> str:
    """A config value in a few words."""
    if isinstance(value, frozenset):
        return f"{len(value)} layers"
    if isinstance(value, RopeConfig):
        return f"base {value.theta:g} ({value.type})"
    return str(value)
