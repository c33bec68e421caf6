"""One vocabulary out of a base's and its members': rows, tokenizer, who knows which token, how chats and turns end.

    found = agree(recipe, base, members, tokenizer)
    found.size, found.tokenizer, found.owners.members[3], found.notes

Members share the base's tokens and may add some, the same ones; ids that two give to different tokens are refused. Of
rows, those count who have the *token*: padding that happens to lie there is nobody's. What answers need besides, the chat
template and the tokens that end a turn, is the base's; what only members have is taken over where they agree, and said
where they do not (`chat_template: NAME` in the recipe chooses).

Shapes: E members, V rows of the mixture's vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.source import TensorSource
from octad.combine.recipe import Recipe
from octad.combine.tokens import Tokens, read_tokens, texts_of
from octad.errors import CheckpointError, DataError, RecipeError
from octad.text.tokenizer import NAMED_TOKENS, Tokenizer

PROBE = "The 2 quick foxes, déjà-vu: x += 10**6;\n\tif (a != b) { return  'über 1234567'; }\n\n中文 👋"


@dataclass(frozen=True)
class Owners:
    """Who has the token of each row: base_V, and members[e]_V; rows past a source's own are never its."""

    base: torch.Tensor
    members: Sequence[torch.Tensor]

    @classmethod
    def by_rows(cls, size: int, base: TensorSource, members: Sequence[TensorSource]) -> Owners:
        """Where nothing is known of tokens: whoever has a row has its token."""
        rows_V = torch.arange(size)
        return cls(rows_V < base.config.vocab_size, [rows_V < m.config.vocab_size for m in members])

    @property
    def base_rows(self) -> int:
        """How many rows the base's tokens take."""
        return int(self.base.nonzero().max()) + 1 if bool(self.base.any()) else 0

    @property
    def added(self) -> bool:
        """True where some row has a token that the base has not."""
        return bool((torch.stack(list(self.members)).any(0) & ~self.base).any())

    @property
    def alike(self) -> bool:
        """True where all have the same tokens, and no row is without one."""
        return bool(self.base.all() and torch.stack(list(self.members)).all())

    def groups(
        self, base: TensorSource, members: Sequence[TensorSource]
    ) -> Iterator[tuple[torch.Tensor, bool, list[int]]]:
        """Rows that the same sources have: (their numbers, whether the base is one of them, which members are).

        A row without any token is the base's where it has such a row, else of the members that have it."""
        known_SV = torch.stack([self.base, *self.members])
        rows_V = torch.arange(known_SV.shape[1])
        nobody = ~known_SV.any(0)
        known_SV[0] |= nobody & (rows_V < base.config.vocab_size)
        for e, member in enumerate(members, 1):
            known_SV[e] |= nobody & ~known_SV[0] & (rows_V < member.config.vocab_size)
        patterns, number_V = torch.unique(known_SV, dim=1, return_inverse=True)
        for number, pattern in enumerate(patterns.T.tolist()):
            owners = [e for e, has in enumerate(pattern[1:]) if has]
            if pattern[0] or owners:
                yield rows_V[number_V == number], pattern[0], owners


@dataclass(frozen=True)
class Vocabulary:
    """size: V; notes: (an expert's name or "", a sentence)."""

    size: int
    tokenizer: Tokenizer
    owners: Owners
    notes: tuple[tuple[str, str], ...] = ()

    def notes_on(self, name: str) -> tuple[str, ...]:
        """What is said of one expert; of no single one for ""."""
        return tuple(text for owner, text in self.notes if owner == name)


def agree(
    recipe: Recipe,
    base: TensorSource,
    members: Sequence[TensorSource],
    tokenizer: Tokenizer,
    *,
    joining: bool = False,
) -> Vocabulary:
    """The mixture's vocabulary; `tokenizer` is the base's. `joining`: members are added to a mixture that stands for the
    base, so that they alone agree on nothing. Raises RecipeError where members cannot share one vocabulary."""
    names = [spec.name for spec in recipe.experts]
    own = read_all(names, base, members)
    size = max(source.config.vocab_size for source in (base, *members))
    ours, notes = texts_of(tokenizer), list[tuple[str, str]]()
    widest = _Widest(tokenizer, ours, "the base")
    for name, member, theirs in zip(names, members, own, strict=True):
        if not joining and (rows := member.config.vocab_size) <= max(
            i for i in ours if i < base.config.vocab_size
        ):
            raise RecipeError(
                f"expert {name!r}: has {rows} vocabulary rows, the base {base.config.vocab_size}, and the base's tokens"
                " need more than that; a member may add tokens, not lack them"
            )
        if theirs is None:
            notes += [(name, line) for line in _without_tokens(member, base)]
            continue
        notes += [(name, line) for line in _differences(theirs, tokenizer, ours)]
        outside = {i for i in theirs.texts if i >= member.config.vocab_size}
        if outside and (line := widest.left_out(theirs, outside, member.config.vocab_size)):
            notes.append((name, line))
        widest = widest.with_member(name, theirs, outside)
    if over := [i for i in widest.texts if i >= size]:
        raise CheckpointError(
            f"{widest.owner}: its tokenizer has {len(over)} tokens for which the model has no row (the first is"
            f" {widest.texts[min(over)]!r}, id {min(over)}, of {size} rows); resize the model's embeddings"
            " (transformers: resize_token_embeddings), or take the tokens out of the tokenizer"
        )
    merged, said = with_turns(recipe, widest.named_as(tokenizer), own, size, joining)
    return Vocabulary(size, merged, _owners(size, base, ours, members, own), (*notes, *said))


def read_all(
    names: Sequence[str], base: TensorSource, members: Sequence[TensorSource]
) -> list[Tokens | None]:
    """The tokens of each member that has some of its own; files that are alike are parsed once."""
    seen: dict[bytes, Tokens] = {}
    own: list[Tokens | None] = []
    for name, member in zip(names, members, strict=True):
        try:
            found = None if member is base else read_tokens(member, seen)
        except CheckpointError as error:
            raise RecipeError(f"expert {name!r}: {error}") from None
        if found is not None:
            found = seen.setdefault(found.key, found)
        own.append(found)
    return own


# ---- tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Widest:
    """The tokenizer that knows most tokens so far, and whose it is."""

    tokenizer: Tokenizer
    texts: Mapping[int, str]
    owner: str

    def left_out(self, theirs: Tokens, outside: set[int], rows: int) -> str | None:
        """A note on tokens that a member's tokenizer has, and its model no row for."""
        new = sorted(i for i in outside if i not in self.texts)
        if not new:
            return None
        shown = ", ".join(repr(theirs.texts[i]) for i in new[:3])
        return f"its tokenizer knows {len(new)} tokens that its {rows} rows do not hold ({shown}): left out"

    def with_member(self, name: str, theirs: Tokens, outside: set[int]) -> _Widest:
        """This, or the member's where that adds tokens. Raises RecipeError where the two do not go together."""
        owner = f"expert {name!r}"
        for i in sorted(self.texts.keys() & theirs.texts.keys()):
            if self.texts[i] != theirs.texts[i]:
                raise RecipeError(
                    f"{owner}: token {i} is {theirs.texts[i]!r}, in {self.owner} it is {self.texts[i]!r}; "
                    "members must share one tokenizer (they may add tokens, the same ones)"
                )
        new = theirs.texts.keys() - self.texts.keys() - outside
        if not new:
            return self
        lacks = [i for i in self.texts if i not in theirs.texts]
        if theirs.tokenizer is None or lacks or outside - self.texts.keys():
            found = f"adds the token {theirs.texts[min(new)]!r}"
            reason = (
                "from a file that no tokenizer can be made of: save it as tokenizer.json"
                if theirs.tokenizer is None
                else f"but lacks {self.texts[lacks[0]]!r} of {self.owner}"
                if lacks
                else "and others that its model has no row for: resize its embeddings"
            )
            raise RecipeError(f"{owner}: {found}, {reason}")
        return _Widest(theirs.tokenizer, theirs.texts, owner)

    def named_as(self, base: Tokenizer) -> Tokenizer:
        """The tokenizer with the base's named tokens, template and ends: whoever adds a token changes none of these."""
        if self.tokenizer is base:
            return base
        named = {key: base.config.get(key) for key in (*NAMED_TOKENS, "chat_template")}
        config = {**self.tokenizer.config, **named}
        return Tokenizer(self.tokenizer.core, config, base.eos_ids, base.generation, base.label)


def _without_tokens(member: TensorSource, base: TensorSource) -> list[str]:
    """A note on a whole model without any vocabulary beside it."""
    if member is base or isinstance(member, AdapterSource):
        return []
    return ["has no tokenizer beside its weights: taken to have the base's tokens"]


def _differences(theirs: Tokens, tokenizer: Tokenizer, ours: Mapping[int, str]) -> list[str]:
    """Notes on a vocabulary that goes together with the base's and is not the same."""
    notes = []
    if lacks := sorted(ours.keys() - theirs.texts.keys()):
        notes.append(
            f"lacks {len(lacks)} of the base's tokens (the first is {ours[lacks[0]]!r}): their rows are the others'"
        )
    if theirs.tokenizer is not None and not lacks:
        mine, other = (t.encode(PROBE, parse_special=False) for t in (tokenizer, theirs.tokenizer))
        if mine != other:
            notes.append(
                f"cuts text into other tokens than the base does ({len(other)} for {len(mine)} of a probe): the base's"
                " tokenizer is used, and what it learnt with its own may be lost"
            )
    return notes


def _owners(
    size: int,
    base: TensorSource,
    ours: Mapping[int, str],
    members: Sequence[TensorSource],
    own: Sequence[Tokens | None],
) -> Owners:
    """Of a source without tokens of its own, the base's are assumed, and past them every row counts."""

    def mask(texts: Mapping[int, str], rows: int, past: int) -> torch.Tensor:
        known_V = torch.zeros(size, dtype=torch.bool)
        known_V[[i for i in texts if i < rows]] = True
        known_V[past:rows] = True
        return known_V

    rows = base.config.vocab_size
    known = [
        mask(ours, m.config.vocab_size, rows) if t is None else mask(t.texts, m.config.vocab_size, size)
        for m, t in zip(members, own, strict=True)
    ]
    return Owners(mask(ours, rows, size), known)


# ---- turns --------------------------------------------------------------------------------------------------


def with_turns(
    recipe: Recipe, tokenizer: Tokenizer, own: Sequence[Tokens | None], size: int, joining: bool = False
) -> tuple[Tokenizer, list[tuple[str, str]]]:
    """The tokenizer with the chat template and the ends of turns that the mixture has, and notes on whose they are."""
    theirs = {
        spec.name: tokens.tokenizer
        for spec, tokens in zip(recipe.experts, own, strict=True)
        if tokens is not None and tokens.tokenizer is not None
    }
    broken = _broken_templates(theirs)
    template, owner, notes = _template(recipe, tokenizer, theirs, broken)
    notes += [(name, f"{why}: left out") for name, why in broken.items()]
    known = texts_of(tokenizer)
    ends = {name: [i for i in t.eos_ids if i < size and i in known] for name, t in theirs.items()}
    agreed = set.intersection(*map(set, ends.values())) if ends and not joining else set()
    taken = [*tokenizer.eos_ids, *(ends[owner] if owner else [])]
    taken += [i for found in ends.values() for i in found if i in agreed]
    taken = list(dict.fromkeys(taken))
    if added := [i for i in taken if i not in tokenizer.eos_ids]:
        shown = ", ".join(repr(known[i]) for i in added)
        notes.append(
            ("", f"answers also end at {shown}, which the base does not end at: taken over from members")
        )
    for name, found in ends.items():
        if nowhere := [i for i in theirs[name].eos_ids if i not in found]:
            shown = ", ".join(map(str, nowhere))
            notes.append(
                (name, f"ends its answers at id {shown}, which is no token that it has a row for: left out")
            )
        if lost := [i for i in found if i not in taken]:
            shown = ", ".join(repr(known[i]) for i in lost)
            notes.append(
                (
                    name,
                    f"ends its answers at {shown}, the mixture does not: with chat_template: {name} it does",
                )
            )
    if not notes or (template == tokenizer.chat_template and not added):
        return tokenizer, notes
    config = {**tokenizer.config, "chat_template": template}
    return Tokenizer(tokenizer.core, config, taken, tokenizer.generation, tokenizer.label), notes


def _broken_templates(theirs: Mapping[str, Tokenizer]) -> dict[str, str]:
    """What is wrong with the members' chat templates that cannot be used, by the member's name."""
    found = {}
    for name, tokenizer in theirs.items():
        try:
            if tokenizer.chat_template:
                tokenizer.apply_chat_template([{"role": "user", "content": "Hello."}])
        except CheckpointError as error:
            found[name] = str(error)
        except DataError:  # it asks for other messages
            continue
    return found


def _template(
    recipe: Recipe, tokenizer: Tokenizer, theirs: Mapping[str, Tokenizer], broken: Mapping[str, str]
) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    """The template, the member that it is of (None: the base), and what is to be said. Raises RecipeError."""
    base, wanted = tokenizer.chat_template, recipe.chat_template
    found = {name: t.chat_template for name, t in theirs.items() if t.chat_template and name not in broken}
    if wanted is not None and wanted in broken:
        raise RecipeError(f"chat_template: expert {wanted!r}: {broken[wanted]}")
    others = {name: text for name, text in found.items() if base is None or text.strip() != base.strip()}
    if wanted is not None and wanted != "base":
        if wanted not in found:
            raise RecipeError(
                f"chat_template: expert {wanted!r} has no chat template of its own; leave the key out, or name"
                f" {', '.join(['base', *found])}"
            )
        return found[wanted], wanted, [("", f"chat template: {wanted}'s, as the recipe says")]
    if not others or wanted == "base":
        return base, None, []
    first, *rest = others
    if base is not None:
        line = f"chat template: the base's; {', '.join(others)} have another: `chat_template: {first}` takes that"
        return base, None, [("", line)]
    if all(others[name].strip() == others[first].strip() for name in rest):
        return (
            others[first],
            first,
            [("", f"chat template: taken over from {', '.join(others)}; the base has none")],
        )
    counts = {name: sum(t.strip() == text.strip() for t in others.values()) for name, text in others.items()}
    owner = max(counts, key=counts.__getitem__)
    alike = [name for name, text in others.items() if text.strip() == others[owner].strip()]
    line = (
        f"chat template: {owner}'s; the base has none, and those of {', '.join(n for n in others if n not in alike)}"
        " differ from it: `chat_template: NAME` takes another"
    )
    return others[owner], owner, [("", line)]
