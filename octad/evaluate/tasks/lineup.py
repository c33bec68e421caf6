"""Who takes part in a task: the mixture, and with it its members and their soup, one loaded after the other.

    for entrant in lineup("mixture/", members=True):
        entrant.name, entrant.llm

A member that the mixture holds exactly is the mixture with every token sent to that expert: nothing is loaded for it. A
member that had an attention of its own is opened where it came from. The soup is the mean of the members that are not the
base, as in the comparison by bits per byte, so the names mean the same in both tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.checkpoint.provenance import Provenance
from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.dist import compute_dtype
from octad.engine.llm import DTYPES, LLM
from octad.errors import OctadError, RequestError
from octad.evaluate.contestants import Member, contestant, moe_layers, soup_mlp
from octad.evaluate.lineup import contestant_names
from octad.evaluate.originals import original


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
    name = f"mixture top-{config.num_experts_per_tok}" if config.is_moe else "model"
    llm = LLM(ref, dtype=dtype)
    yield Entrant(name, "mixture" if config.is_moe else "model", llm)
    if not members:
        return
    made = Provenance.of(source)
    apart = _originals(made)
    for expert, member in enumerate(contestant_names(llm.expert_names)):
        if isinstance(apart.get(member, ""), str):
            with alone(llm, expert):
                yield Entrant(member, "member", llm, str(apart.get(member, "")))
    del llm  # one model in memory at a time
    kind = compute_dtype() if dtype == "auto" else DTYPES[dtype]
    for member, found in apart.items():
        if not isinstance(found, str):
            yield Entrant(member, "member", LLM((load_model(found, kind), load_tokenizer(found))))
    if not isinstance(source, QuantizedSource):
        yield Entrant("soup", "soup", soup(source, made, kind))


@contextmanager
def alone(llm: LLM, expert: int) -> Iterator[LLM]:
    """Inside, every token goes to this expert, whether the model runs in its engine or by itself."""
    with contestant(llm.model, Member(expert)):
        llm.loop.call(llm.engine.reset_prefix_cache)
        yield llm
    llm.loop.call(llm.engine.reset_prefix_cache)


def _originals(made: Provenance | None) -> dict[str, TensorSource | str]:
    """The members that the mixture does not hold exactly: the originals, or why they are judged as it holds them."""
    found: dict[str, TensorSource | str] = {}
    if made is None:
        return found
    for name, record in zip(contestant_names(made.names), made.experts, strict=True):
        if not record.get("exact"):
            try:
                found[name] = original(made, record)
            except OctadError as error:
                found[name] = f"as the mixture holds it, with its attention ({error})"
    return found


def soup(source: TensorSource, made: Provenance | None, dtype: torch.dtype) -> LLM:
    """The members' weights averaged: a dense model of the same attention."""
    model = load_model(source, dtype)
    records = made.experts if made else []
    chosen = [e for e, record in enumerate(records) if record.get("kind") != "base"]
    for layer, moe in moe_layers(model):
        layer.mlp = soup_mlp(moe.experts, chosen or range(source.config.num_experts), dtype)
    return LLM((model, load_tokenizer(source)))
