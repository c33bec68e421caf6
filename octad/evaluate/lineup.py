"""Who takes part: the line-up, from what a checkpoint says it was made of.

    lineup = line_up(source, texts, dense=["qwen3-0.6b"])
    lineup.entries["python"].who, lineup.own, lineup.missing
    members_of(source)                  # the members and their soup alone

A mixture that octad made names its members in octad.json. A member that it does not hold exactly is opened where it came
from; the soup is then the mean of the members' own weights, attention included (soup.py), else the mean of the experts,
which is the same where they differ in nothing else. Tasks have the same members and the same soup. Of another mixture
nothing is known; its experts are judged as routes through one expert each where that is a model at all: where weights are
renormalised (a single expert then has weight 1, as in training) and nothing else works beside the experts. What could not
be judged, and why, is in `missing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octad.checkpoint.load import load_tokenizer, open_source
from octad.checkpoint.originals import original
from octad.checkpoint.provenance import TAKEN, Provenance
from octad.checkpoint.source import TensorSource
from octad.errors import OctadError, RequestError
from octad.evaluate.contestants import Contestant, Member, Original, Soup, TopK, Whole
from octad.evaluate.heldout import Texts
from octad.evaluate.soup import AveragedSource
from octad.figures import digits

MOST_JUDGED = 16  # experts judged one by one, and all at once
FORCED = "every token through this one expert: what it was before is not known"


@dataclass(frozen=True)
class Entry:
    """A contestant that has to be run."""

    who: Contestant
    kind: str
    note: str | None = None


@dataclass
class LineUp:
    """Entries by name, in order; `own`: the model as it is; lost: what the mixture does not hold of its members;
    as_held: those of them that are judged as it holds them, and why; missing: what is not there, in sentences."""

    entries: dict[str, Entry]
    own: str
    experts: list[str]
    bases: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    as_held: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def members(self) -> list[str]:
        """The members that are judged."""
        return [name for name, entry in self.entries.items() if entry.kind == "member"]

    @property
    def names(self) -> list[str]:
        """All contestants that a comparison will have: also those that are worked out of the members."""
        members = self.members
        derived = (["ensemble"] if len(members) > 1 else []) + (["oracle"] if members else [])
        return [*self.entries, *derived]


def line_up(source: TensorSource, texts: Texts, dense: Sequence[str] = (), *, other_k: bool = True) -> LineUp:
    """Everybody who can be judged; `other_k` as in Settings. Raises OctadError for a damaged octad.json or a dense model
    that does not fit."""
    found = _mixture(source, texts, other_k) if source.config.is_moe else _dense(source)
    for ref in dense:
        model = open_source(ref, quantised=True)
        name = _free_name(f"dense {Path(ref.rstrip('/')).name}", found.entries)
        _check_same_tokens(source, model, ref, texts)
        found.entries[name] = Entry(Original(model), "dense", f"{ref}, a model of its own")
    return found


def _dense(source: TensorSource) -> LineUp:
    missing = ["it is a dense model: there are no members, soup, ensemble or oracle to compare it with"]
    return LineUp({"model": Entry(Whole(), "model")}, "model", [], missing=missing)


def _mixture(source: TensorSource, texts: Texts, other_k: bool) -> LineUp:
    found = members_of(source, max(max(window.ids) for window in texts.windows))
    E = source.config.num_experts
    ks = {source.config.num_experts_per_tok}
    if other_k:
        ks |= {1, min(2, E)} | ({E} if E <= MOST_JUDGED else set())
    for k in sorted(ks):
        name = f"mixture top-{k}"
        note = "as it is" if name == found.own else f"with {k} of {E} experts a token"
        found.entries[name] = Entry(TopK(k), "mixture", note)
    return found


def members_of(source: TensorSource, largest: int = -1) -> LineUp:
    """The members of a mixture and their soup. `largest`: the largest id of the texts that all of them must read."""
    names, made = named_experts(source)
    found = LineUp({}, f"mixture top-{source.config.num_experts_per_tok}", names)
    if made:
        _add_members(found, made, largest)
    else:
        _add_forced(found, source)
    return found


def _add_members(found: LineUp, made: Provenance, largest: int) -> None:
    records = dict(zip(found.experts, made.experts, strict=True))
    found.lost = {name: _lost(record) for name, record in records.items() if not record.get("exact")}
    originals, found.as_held = find_originals(made, {name: records[name] for name in found.lost}, largest)
    found.bases = [name for name, record in records.items() if record.get("kind") == "base"]
    for e, name in enumerate(found.experts):
        who = Original(originals[name]) if name in originals else Member(e)
        note = "not held exactly: judged as it was" if name in originals else None
        if name in found.as_held:
            note = f"as the mixture holds it, with its attention ({found.as_held[name]})"
        found.entries[name] = Entry(who, "member", note)
    specialists = [name for name in found.experts if name not in found.bases] or found.experts
    found.entries["soup"] = _soup(found, made, {name: records[name] for name in specialists}, largest)


def _soup(found: LineUp, made: Provenance, records: Mapping[str, Mapping[str, Any]], largest: int) -> Entry:
    """The mean of these members' weights; of their feed-forward weights alone where some cannot be opened."""
    whom = "all members" + (" but the base" if found.bases else "")
    inside = Soup(tuple(found.experts.index(name) for name in records))
    if not found.lost.keys() & records.keys():
        return Entry(inside, "soup", f"mean of the weights of {whom}")
    opened, reasons = find_originals(made, records, largest)
    try:
        if reasons:
            raise RequestError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        mean = Original(AveragedSource(tuple(opened.values())))
        return Entry(mean, "soup", f"mean of all weights of {whom}, attention included")
    except OctadError as error:
        note = f"mean of the feed-forward weights of {whom}, with the mixture's attention ({error})"
        return Entry(inside, "soup", note)


def _lost(record: Mapping[str, Any]) -> str:
    """What of a member is not in the mixture as it was, as far as octad.json says it: each part's distance."""
    held = record.get("held")
    parts = held.get("lost") if isinstance(held, Mapping) else None
    if not isinstance(parts, Mapping) or not parts:
        return "attention, norms or embeddings"
    return ", ".join(f"{part} {digits(float(far))} from the base" for part, far in parts.items())


def _add_forced(found: LineUp, source: TensorSource) -> None:
    config = source.config
    found.missing.append("octad did not make this mixture: what its experts were before is not known")
    whole = config.norm_topk_prob and not config.shared_expert_intermediate_size
    if not whole or config.num_experts > MOST_JUDGED:
        reason = "a single one is no model" if not whole else f"there are {config.num_experts}"
        found.missing.append(
            f"its experts are not judged one by one ({reason}): there is no soup, ensemble or oracle"
        )
        return
    found.missing.append("its experts are judged as routes through one expert each")
    for e, name in enumerate(found.experts):
        found.entries[name] = Entry(Member(e), "member", FORCED)
    found.entries["soup"] = Entry(Soup(tuple(range(config.num_experts))), "soup", "mean of all experts")


def named_experts(source: TensorSource) -> tuple[list[str], Provenance | None]:
    """The experts' names, from octad.json where octad made the mixture (then also that), else 'expert 0', ...

    Raises CheckpointError for a damaged octad.json."""
    made = Provenance.of(source) if source.config.is_moe else None
    names = made.names if made else [f"expert {e}" for e in range(source.config.num_experts)]
    return contestant_names(names), made


def contestant_names(experts: Sequence[str]) -> list[str]:
    """What the experts of these names are called in a comparison: no two alike, and none like a contestant of its own.

    octad gives no such names; a mixture that was made before it minded, or edited by hand, may have them."""
    found: list[str] = []
    for name in experts:
        found.append(_free_name(f"member {name}" if TAKEN.fullmatch(name) else name, found))
    return found


def find_originals(
    made: Provenance, records: Mapping[str, Mapping[str, Any]], largest: int
) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """Of these members: those found where they lay, and why not, the others."""
    found: dict[str, TensorSource] = {}
    reasons: dict[str, str] = {}
    for name, record in records.items():
        try:
            source = original(made, record)
        except OctadError as error:
            reasons[name] = str(error)
            continue
        if source.config.vocab_size > largest:
            found[name] = source
        else:
            reasons[name] = "the texts have tokens that another member added"
    return found, reasons


def _check_same_tokens(source: TensorSource, model: TensorSource, ref: str, texts: Texts) -> None:
    """Raises RequestError unless every id of the texts spells the same in both."""
    ours, theirs = (load_tokenizer(s).core for s in (source, model))
    for i in sorted({i for w in texts.windows for i in w.ids}):
        if ours.id_to_token(i) != theirs.id_to_token(i) or i >= model.config.vocab_size:
            raise RequestError(
                f"--dense {ref}: token {i} is {theirs.id_to_token(i)!r}, in {source.label} it is"
                f" {ours.id_to_token(i)!r}; all contestants must read the same tokens: give a model of one tokenizer"
            )


def _free_name(name: str, taken: object) -> str:
    number, free = 2, name
    while free in taken:  # type: ignore[operator]
        free, number = f"{name} ({number})", number + 1
    return free
