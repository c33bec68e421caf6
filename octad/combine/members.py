"""A member beside the base: what it is, whether the mixture can represent it, and what the mixture will not hold of it.

    report = measured(member_report("french", "adapters/french", member, base, "base"), distances, "base")
    report.exact, report.lost, report.sentence

A mixture holds each member's feed-forward nets and one shared part. Under `shared: base` that is the base's: what a
member learnt elsewhere (attention, norms, embeddings, head) is lost, with the other methods it is merged with the
others'. Each difference is either harmless, worth a note, or fatal (refused, naming member, what, found and expected).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.gguf.reader import GGUFSource
from octad.checkpoint.load import unplaced
from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.names import is_ffn, tensor_plan
from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import View
from octad.combine.distances import Distances
from octad.combine.family import TARGETS
from octad.errors import RecipeError
from octad.figures import percent
from octad.model.config import RopeConfig

SHARED_GROUPS = ("attention", "norms", "embeddings", "head")
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


REPAIRED = "closed-form repair then fits attention and its down_proj to what it gives itself"
ROUNDING, ROUNDING_SHARE = (
    0.003,
    0.01,
)  # what bfloat16 changes of a weight, and of all change, where nothing was learnt


@dataclass(frozen=True)
class MemberReport:
    """One member beside the base: notes, and distances by tensor group with their margin (see distances.py).

    exact: held unchanged, so that the mixture sent through this expert alone is this member; None where not measured.
    lost: what the mixture does not hold as it is, each part's distance from the base; sentence: what that means."""

    name: str
    reference: str
    kind: str
    distances: dict[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    other_arithmetic: bool = False
    margin: float = 0.0
    exact: bool | None = None
    lost: dict[str, float] = field(default_factory=dict)
    sentence: str = ""

    @property
    def held(self) -> dict[str, Any]:
        """For octad.json: whether the member is held exactly, what of it is not, by how much, and that in words."""
        lost = {group: round(value, 6) for group, value in self.lost.items()}
        return {"exact": self.exact, "lost": lost, "sentence": self.sentence}


def kind_of(member: TensorSource, base: TensorSource) -> str:
    """'base', 'adapter' or 'checkpoint'."""
    if member is base:
        return "base"
    return "adapter" if isinstance(member, AdapterSource) else "checkpoint"


def member_report(
    name: str, reference: str, member: TensorSource, base: TensorSource, shared: str
) -> MemberReport:
    """What can be said of a member before it is measured. Raises RecipeError as check_member does."""
    notes = check_member(name, member, base, shared)
    if member is not base:
        notes += [line for line in (other_base(member, base), unplaced(member)) if line]
    keys = (*ARITHMETIC_FIELDS, "tie_word_embeddings")
    other = any(not _same(getattr(member.config, key), getattr(base.config, key)) for key in keys)
    return MemberReport(name, reference, kind_of(member, base), notes=tuple(notes), other_arithmetic=other)


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
        more = theirs.vocab_size - ours.vocab_size
        notes.append(
            f"adds {more} rows to the vocabulary: kept, averaged over those who have them"
            if more > 0
            else f"has {-more} rows of the vocabulary less than the base: those are the base's"
        )
    return notes


def other_base(member: TensorSource, base: TensorSource) -> str | None:
    """A note where an adapter says that it was trained on a model of another name than the base's."""
    if not isinstance(member, AdapterSource) or (said := member.trained_on) is None:
        return None
    names = [base.label, base.config.raw.get("_name_or_path"), getattr(base, "recorded", {}).get("label")]
    while isinstance(base, View):
        base = base.source
    if isinstance(base, GGUFSource):
        names += [base.header.metadata.get(key) for key in ("general.name", "general.basename")]
    known = [plain for name in names if isinstance(name, str) and (plain := _plain(name))]
    wanted = _plain(said)
    if not wanted or any(wanted in name or name in wanted for name in known):
        return None
    return f"was trained on {said!r}, as it says itself, and is put on {base.label}: make sure that this is one model"


def _plain(name: str) -> str:
    """The last part of a path or hub id, letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", Path(name.rstrip("/")).name.lower().removesuffix(".gguf"))


# ---- what is held ------------------------------------------------------------------------------------------


def measured(report: MemberReport, found: Distances, shared: str, *, repaired: bool = False) -> MemberReport:
    """The report with the distances, and what follows from them: whether the mixture holds this member exactly.
    `repaired`: closed-form repair changes attention and every expert.

    Raises RecipeError where a distance is no number."""
    for group, values in found.groups.items():
        if not all(math.isfinite(value) for value in values):
            raise RecipeError(
                f"expert {report.name!r}: {report.reference} or its base holds NaN or infinite {group} weights,"
                " or some too large to be squared; save it again"
            )
    exact = found.same_shared_part if shared == "base" and not report.other_arithmetic else False
    means = {group: sum(v) / len(v) for group in SHARED_GROUPS if (v := found.groups.get(group))}
    lost = {group: value for group, value in means.items() if value > 0}
    report = replace(report, distances=found.groups, margin=found.margin, exact=exact, lost=lost)
    said = sentence(report, found, shared)
    return replace(report, sentence=f"{said}; {REPAIRED}" if repaired else said, exact=exact and not repaired)


def sentence(report: MemberReport, found: Distances, shared: str) -> str:
    """What the mixture will not hold of a member: how much it is, what that is likely to cost, and what to do."""
    if report.kind == "base":
        made_of_all = f"it is the base; the shared part is made of all (shared: {shared})"
        return "held exactly" if report.exact else made_of_all
    parts = ", ".join(f"{group} {value:.2g}" for group, value in report.lost.items())
    parts = parts or "less than a sample shows"
    if found.same_ffn and not report.lost and found.same_shared_part:
        return "it does not differ from the base at all: as an expert it adds nothing"
    if shared != "base":
        averaged = f"what it changed outside feed-forward nets ({parts}, relative to the base) is merged with the others'"
        if found.same_ffn:
            return f"{averaged}, and its feed-forward nets are the base's: as an expert it adds nothing"
        return f"{averaged} (shared: {shared}): it is held in part, and `octad train` with mode repair gets it closer"
    if report.exact:
        return "held exactly"
    if report.exact is None:
        return (
            "its attention, norms and embeddings were not measured in every layer: what is lost is not known"
        )
    return _lost(report, found, parts)


def _lost(report: MemberReport, found: Distances, parts: str) -> str:
    """Of a member that goes on the base's attention, norms and embeddings: what becomes of its own."""
    lost = f"what it changed outside its feed-forward nets is lost ({parts}, relative to the base)"
    fix = "train it on gate_proj, up_proj and down_proj alone, as `octad branch` does, or merge: shared: mean was"
    fix += " 1.9 % better than base for full members (docs/results.md), shared: auto measures it for yours"
    if found.same_ffn:
        return f"{lost}, and that is all it learnt: as an expert it is the base again; {fix}"
    if not report.lost:
        return f"{lost}: its expert is close to the member, not equal to it"
    if found.lost_share is None:
        return f"{lost}: its expert will know less than the member; {fix}"
    if found.lost_share < ROUNDING_SHARE and max(report.lost.values()) < ROUNDING:
        return (
            f"outside its feed-forward nets it differs from the base by no more than rounding does ({parts}, relative to"
            " the base): the base's is used"
        )
    share = f"{percent(found.lost_share)} of its change"
    cost = (
        "will be nearer to the base than to the member"
        if found.lost_share > 0.5
        else "will know less than the member"
    )
    return f"{lost}, {share}: its expert {cost}; {fix}"


def refuse_base_again(reports: Sequence[MemberReport], found: Sequence[Distances], shared: str) -> None:
    """Raises RecipeError where every expert would be the base: nothing of what members know is in feed-forward nets.

    Where a head of its own is all that a member has beside the base, its sentence says so."""
    pairs = [(r, d) for r, d in zip(reports, found, strict=True) if r.kind != "base"]
    lost = [r for r, d in pairs if d.same_ffn and r.lost.keys() - {"head"}]
    if shared == "base" and lost and all(d.same_ffn for _, d in pairs):
        parts = ", ".join(f"{group} {value:.2g}" for group, value in lost[0].lost.items())
        raise RecipeError(
            f"expert {lost[0].name!r}: its feed-forward nets are the base's, and so are all others': with shared: base"
            f" every expert would be the base again, and what was learnt ({parts}, relative to the base) lost; use"
            " shared: linear, or members trained on gate_proj, up_proj and down_proj"
        )


def alike(names: Sequence[str], members: Sequence[TensorSource], found: Sequence[Distances]) -> list[str]:
    """Notes on experts that are equal to one another, the base's copies among them."""
    plan = [name for name in tensor_plan(members[0].config) if is_ffn(name)]
    groups: list[list[int]] = []
    for e, member in enumerate(members):
        for group in groups:
            first = group[0]
            if found[e].groups.get("ffn") != found[first].groups.get("ffn"):
                continue
            if (found[e].same_ffn and found[first].same_ffn) or all(
                torch.equal(member.read(n), members[first].read(n)) for n in plan
            ):
                group.append(e)
                break
        else:
            groups.append([e])
    if len(groups) == 1:
        return [
            "all experts are equal: routing decides nothing, and the mixture is one model, many times as large"
        ]
    return [
        f"experts {', '.join(repr(names[e]) for e in group)} are equal"
        + (" to the base" if found[group[0]].same_ffn else "")
        + ": a router cannot tell them apart, one would do"
        for group in groups
        if len(group) > 1
    ]


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
