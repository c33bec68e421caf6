"""The pre-flight: everything that can be known, and refused, before any work is done.

    plan = preflight(Recipe.load("recipe.yaml"))      # opens base and members; raises RecipeError with the reason
    plan.distances, plan.notes, plan.output_bytes     # what `octad combine --dry-run` prints

Each difference between a member and the base is either harmless (nothing is said), worth knowing (a note says why it is
no problem), or fatal (refused, naming member, what, found and expected). Distances are ||member - base|| / ||base|| over
the tensors of a layer; very large members are measured on every k-th layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from octad.checkpoint.load import load_tokenizer, open_member, open_source
from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.names import layer_of, tensor_plan
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.tokenizer import Tokenizer
from octad.combine.family import TARGETS, mixture_config
from octad.combine.mixture import MixtureSource, tensor_group
from octad.combine.recipe import Recipe
from octad.combine.views import RememberLast
from octad.errors import CheckpointError, RecipeError
from octad.model.config import ModelConfig, RopeConfig

MEASURED_BYTES = 16e9  # read at most about this much to measure distances
PIECE = 1 << 15  # values; torch works on so few in one thread
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
ARITHMETIC_FIELDS = ("rope", "rms_norm_eps", "sliding_window", "sliding_layers")


@dataclass(frozen=True)
class MemberReport:
    """One member beside the base: distances per layer by tensor group, and notes; `exact`: held unchanged."""

    name: str
    reference: str
    kind: str
    distances: dict[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
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
    measured_layers: list[int]

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


def preflight(recipe: Recipe, *, measure: bool = True) -> Plan:
    """Open, check and measure. Raises RecipeError or CheckpointError with one line."""
    opened = open_source(recipe.resolve(recipe.base))
    base = RememberLast(opened)
    if base.config.model_type not in TARGETS:
        mixture_config(base.config, 1, 1, "float32", base.config.vocab_size)
    members = [_open(recipe, spec.name, spec.model, base) for spec in recipe.experts]
    tokenizer = load_tokenizer(opened)
    reports = []
    for spec, member in zip(recipe.experts, members, strict=True):
        notes = check_member(spec.name, member, base, recipe.shared.method)
        reports.append(MemberReport(spec.name, spec.model, kind_of(member, base), notes=tuple(notes)))
    vocab_size, tokenizer = extended_vocabulary(recipe, base, members, tokenizer)
    name = recipe.dtype or _dtype_name(base.info("model.embed_tokens.weight").dtype)
    raw = mixture_config(base.config, len(members), recipe.top_k, name, vocab_size)
    config = ModelConfig.from_dict(raw)
    layers = measured_layers(base, members)
    plan = Plan(recipe, base, members, config, raw, DTYPES[name], tokenizer, reports, layers)
    if measure:
        plan.reports = measure_distances(plan)
    return plan


def kind_of(member: TensorSource, base: TensorSource) -> str:
    """'base', 'adapter' or 'checkpoint'."""
    if member is base:
        return "base"
    return "adapter" if isinstance(member, AdapterSource) else "checkpoint"


def _open(recipe: Recipe, name: str, reference: str, base: TensorSource) -> TensorSource:
    try:
        return open_member(reference if reference == "base" else recipe.resolve(reference), base)
    except CheckpointError as error:
        raise RecipeError(f"expert {name!r}: {error}") from None


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
    for key in ARITHMETIC_FIELDS:
        if getattr(ours, key) == getattr(theirs, key):
            continue
        found, expected = _short(getattr(theirs, key)), _short(getattr(ours, key))
        if shared != "base":
            raise RecipeError(
                f"expert {name!r}: {key} is {found}, the base has {expected}; attention trained under different "
                "positions cannot be averaged (use shared: base)"
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
    for spec, member in zip(recipe.experts, members, strict=True):
        size = max(size, member.config.vocab_size)
        if member.directory in (None, base.directory) or not (member.directory / "tokenizer.json").exists():
            continue
        theirs = load_tokenizer(member)
        if clash := _clash(widest, theirs):
            raise RecipeError(
                f"expert {spec.name!r}: token {clash[0]} is {clash[2]!r}, in {owner} it is {clash[1]!r}; "
                "members must share one tokenizer (they may add tokens, the same ones)"
            )
        if theirs.vocab_size > widest.vocab_size:
            widest, owner = theirs, f"expert {spec.name!r}"
    return size, widest


def _clash(ours: Tokenizer, theirs: Tokenizer) -> tuple[int, str, str] | None:
    """The first id that both know under different names."""
    mine = {i: t for t, i in ours.core.get_vocab(with_added_tokens=True).items()}
    other = {i: t for t, i in theirs.core.get_vocab(with_added_tokens=True).items()}
    for i in sorted(mine.keys() & other.keys()):
        if mine[i] != other[i]:
            return i, mine[i], other[i]
    return None


def measured_layers(base: TensorSource, members: list[TensorSource]) -> list[int]:
    """All layers, or where reading the members would pass MEASURED_BYTES, evenly spaced ones."""
    sizes = sum(base.info(name).nbytes for name in tensor_plan(base.config))
    others = sum(member is not base for member in members)
    step = max(1, math.ceil(sizes * others / MEASURED_BYTES))
    return list(range(0, base.config.num_hidden_layers, step))


def measure_distances(plan: Plan) -> list[MemberReport]:
    """The reports with distances filled in: relative per measured layer for ffn and attention, one value for the rest."""
    wanted = set(plan.measured_layers)
    names = [n for n in tensor_plan(plan.base.config) if layer_of(n) is None or layer_of(n) in wanted]
    sums: list[dict[tuple[str, int], list[float]]] = [{} for _ in plan.members]
    for name in names:
        group = tensor_group(name)
        place = (group, (layer_of(name) or 0) if group in ("ffn", "attention") else 0)
        base = plan.base.read(name)
        norm = squared_norm(base)
        for member, total in zip(plan.members, sums, strict=True):
            entry = total.setdefault(place, [0.0, 0.0])
            entry[0] += _squared_distance(member, plan.base, name, base)
            entry[1] += norm
    complete = len(wanted) == plan.config.num_hidden_layers
    return [
        _with_distances(report, total, plan.recipe.shared.method, complete)
        for report, total in zip(plan.reports, sums, strict=True)
    ]


def _squared_distance(member: TensorSource, base: TensorSource, name: str, tensor: torch.Tensor) -> float:
    """||member - base||^2 of one tensor, over the rows that both have; adapters know what they leave alone."""
    if member is base:
        return 0.0
    if isinstance(member, AdapterSource):
        if name not in member.changed():
            return 0.0
        if factors := member.delta_factors(name):  # ||BA||^2 = <B'B, AA'>: no need to multiply it out
            a, b, scale = factors
            return scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
    try:
        theirs = member.read(name)
    except CheckpointError:  # a head that only one of the two has: noted by check_member
        return 0.0
    return squared_norm(theirs[: len(tensor)], tensor)


def squared_norm(x: torch.Tensor, minus: torch.Tensor | None = None) -> float:
    """||x||^2, or ||x - minus||^2, in float32 over pieces that stay in the processor's cache: for large tensors that is
    ten times faster than whole ones, and needs no memory."""
    pieces = torch.split(x.reshape(-1), PIECE)
    others = [None] * len(pieces) if minus is None else torch.split(minus.reshape(-1), PIECE)
    total = 0.0
    for piece, other in zip(pieces, others, strict=True):
        values = piece.to(torch.float32, copy=True) if other is None else piece.float() - other.float()
        total += float(values.square_().sum())
    return total


def _with_distances(
    report: MemberReport, sums: dict[tuple[str, int], list[float]], shared: str, complete: bool
) -> MemberReport:
    distances: dict[str, list[float]] = {}
    for (group, _), (squared, norm) in sorted(sums.items()):
        distances.setdefault(group, []).append(math.sqrt(squared / norm) if norm else 0.0)
    only_ffn = all(v == 0 for g, values in distances.items() if g != "ffn" for v in values)
    exact: bool | None = only_ffn and shared == "base"
    if report.kind == "checkpoint" and not complete and exact:
        exact = None
    return MemberReport(report.name, report.reference, report.kind, distances, report.notes, exact)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if dtype in DTYPES.values() else "bfloat16"


def _short(value: object) -> str:
    """A config value in a few words."""
    if isinstance(value, frozenset):
        return f"{len(value)} layers"
    if isinstance(value, RopeConfig):
        return f"base {value.theta:g} ({value.type})"
    return str(value)
