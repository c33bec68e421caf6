"""Who takes part in a task: the mixture, and with it its members and their soup, one loaded after the other.

    for entrant in lineup("mixture/", members=True):
        entrant.name, entrant.llm

They are those of the comparison by bits per byte (evaluate/lineup.py), so a name means the same in both tables. A member
that the mixture holds exactly is the mixture with every token sent to that expert: nothing is loaded for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.dist import compute_dtype
from octad.engine.llm import LLM
from octad.engine.opened import DTYPES
from octad.errors import RequestError
from octad.evaluate.contestants import Member, Original, Soup, contestant, moe_layers, soup_mlp
from octad.evaluate.lineup import LineUp, members_of


@dataclass(frozen=True)
class Entrant:
    """A contestant behind an engine, with what the reader should know about it ("" for nothing)."""

    name: str
    kind: str
    llm: LLM
    note: str = ""


def lineup(ref: str | Path, *, members: bool = False, dtype: str = "auto") -> Iterator[Entrant]:
    """The mixture (or dense model) first. An entrant's llm is good until the next one is asked for.

    Raises CheckpointError for what is no model, RequestError where members are asked of a dense model."""
    source = open_source(ref, quantised=True)
    config = source.config
    if members and not config.is_moe:
        raise RequestError(f"{source.label}: is dense, it has no members; leave out --members")
    found = members_of(source) if members else LineUp({}, "model", [])
    name = f"mixture top-{config.num_experts_per_tok}" if config.is_moe else "model"
    llm = LLM(ref, dtype=dtype)
    yield Entrant(name, "mixture" if config.is_moe else "model", llm, "; ".join(found.missing))
    for member, entry in found.entries.items():
        if isinstance(entry.who, Member):
            with alone(llm, entry.who.expert):
                yield Entrant(member, "member", llm, str(entry.note) if member in found.as_held else "")
    del llm  # one model in memory at a time
    kind = compute_dtype() if dtype == "auto" else DTYPES[dtype]
    for member, entry in found.entries.items():
        note = str(entry.note) if entry.kind == "soup" and found.lost else ""
        if isinstance(entry.who, Original):
            other = entry.who.source
            yield Entrant(member, entry.kind, LLM((load_model(other, kind), load_tokenizer(other))), note)
        elif isinstance(entry.who, Soup) and not isinstance(source, QuantizedSource):
            yield Entrant(member, entry.kind, soup(source, entry.who, kind), note)


@contextmanager
def alone(llm: LLM, expert: int) -> Iterator[LLM]:
    """Inside, every token goes to this expert, whether the model runs in its engine or by itself."""
    with contestant(llm.model, Member(expert)):
        llm.loop.call(llm.engine.reset_prefix_cache)
        yield llm
    llm.loop.call(llm.engine.reset_prefix_cache)


def soup(source: TensorSource, who: Soup, dtype: torch.dtype, quantize: str | None = None) -> LLM:
    """The experts' weights averaged: a dense model of the mixture's attention, rounded to `quantize` once it is whole."""
    model = load_model(source, dtype)
    for layer, moe in moe_layers(model):
        layer.mlp = soup_mlp(moe.experts, who.experts, dtype)
    return LLM((model, load_tokenizer(source)), quantize=quantize)
