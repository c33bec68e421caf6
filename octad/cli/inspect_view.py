"""An Inspection as something to look at: a rich renderable of a few compact blocks.

    rich.print(render(inspect(source, against=base)))

What the model is; with a comparison the verdict, one line an expert with its distance over the layers as a sparkline, and
the experts' distances from each other; then the routers' norms over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from rich.console import Group, RenderableType
from rich.text import Text

from octad.checkpoint.distance import Comparison
from octad.checkpoint.inspect import Inspection, RouterNorm
from octad.figures import digits, human, sparkline
from octad.report import terminal
from octad.report.table import Table

MATRIX_EXPERTS = 16  # above this a matrix is no longer readable, and the extremes are told instead


def render(found: Inspection) -> RenderableType:
    """Header, comparison and routers, whichever there are."""
    blocks: list[RenderableType] = [header(found)]
    if found.comparison is not None:
        blocks += [Text(), *comparison_blocks(found.comparison, expert_names(found))]
    if found.routers:
        blocks += [Text(), routers_line(found.routers)]
    return Group(*blocks)


def header(found: Inspection) -> RenderableType:
    """What the model is, in a handful of lines."""
    return terminal.facts(_facts(found))


def _facts(found: Inspection) -> list[tuple[str, str]]:
    mixture = f"{found.experts} experts, top {found.top_k}" if found.experts else "dense"
    active = f", {human(found.active_parameters)} active on a token" if found.experts else ""
    weights = ", ".join(f"{human(size, 'B')} {dtype}" for dtype, size in found.bytes_on_disk.items())
    heads = f"{found.attention_heads} heads ({found.key_value_heads} kv) × {found.head_dim}"
    short, full = (human(n, "FLOP") for n in (found.flops_short_context, found.flops_full_context))
    facts = [
        ("model", f"{found.label} · {found.family}, {mixture}"),
        ("parameters", f"{human(found.parameters)}{active} · {weights}"),
        (
            "shape",
            f"{found.layers} layers × {found.hidden_size}, feed-forward {found.feed_forward_size}, {heads},"
            f" vocabulary {found.vocabulary:,}, head {'tied' if found.tied_head else 'of its own'}",
        ),
        (
            "a token",
            f"{short} at {found.short_context:,} of context, {full} at {found.context_length:,} (all)"
            f" · KV {human(found.kv_bytes_per_token, 'B')}",
        ),
    ]
    if (made := found.provenance) is not None:
        facts.append(("made of", f"{', '.join(made.experts)} on {made.base}"))
        facts.append(
            ("made by", f"router {made.router or 'unknown'}, shared part {made.shared or 'unknown'}")
        )
        facts += [("edited", edit) for edit in made.edits]
    return facts


def expert_names(found: Inspection) -> list[str]:
    """The names that octad.json gives, else empty ones (a number stands beside each anyway)."""
    count = len(found.comparison.experts) if found.comparison else found.experts
    names = found.provenance.experts if found.provenance else ()
    return list(names) if len(names) == count else [""] * count


def comparison_blocks(comparison: Comparison, names: Sequence[str]) -> list[RenderableType]:
    """Verdict, experts, other parts, and the experts beside each other."""
    shared = ", ".join(f"{part} {digits(value)}" for part, value in comparison.shared.items())
    blocks: list[RenderableType] = [
        Text(comparison.verdict, style="bold"),
        terminal.table(experts_table(comparison, names)),
        Text(f"other parts: {shared}"),
    ]
    count = len(comparison.pairs)
    if 1 < count <= MATRIX_EXPERTS:
        blocks += [Text(), terminal.table(pairs_table(comparison, names))]
    elif count > 1:
        blocks.append(Text(_extremes(comparison)))
    if comparison.near_copies:
        blocks.append(Text(_near_copies(comparison), style="yellow"))
    return blocks


def experts_table(comparison: Comparison, names: Sequence[str]) -> Table:
    """One line an expert: its distance, and how it runs over the layers (all on one scale from 0 to the largest)."""
    first, last = comparison.layers[0], comparison.layers[-1]
    top = max((d for expert in comparison.experts for d in expert.layers if math.isfinite(d)), default=0.0)
    rows = [
        [str(e), name, digits(expert.mean), f"{expert.cosine:.3f}", sparkline(expert.layers, top)]
        for e, (expert, name) in enumerate(zip(comparison.experts, names, strict=True))
    ]
    return Table.of("", [">#", "expert", ">distance", ">cosine", f"layers {first}–{last}"], rows)


def pairs_table(comparison: Comparison, names: Sequence[str]) -> Table:
    """Distances of the experts from each other, [E, E]."""
    rows = [
        [
            f"{e} {name}".rstrip(),
            *("·" if e == other else digits(distance) for other, distance in enumerate(row)),
        ]
        for e, (name, row) in enumerate(zip(names, comparison.pairs, strict=True))
    ]
    return Table.of("distance of each from each", ["", *(f">{e}" for e in range(len(names)))], rows)


def _extremes(comparison: Comparison) -> str:
    """The nearest and the farthest two of many experts."""
    pairs = {(i, j): comparison.pairs[i][j] for i, j in combinations(range(len(comparison.pairs)), 2)}
    (a, b), (c, d) = min(pairs, key=pairs.__getitem__), max(pairs, key=pairs.__getitem__)
    near, far = digits(pairs[a, b]), digits(pairs[c, d])
    return f"experts beside each other: nearest {a} and {b} ({near}), farthest {c} and {d} ({far})"


def _near_copies(comparison: Comparison) -> str:
    copies = comparison.near_copies
    shown = [f"{c.first} and {c.second} {'are equal' if c.equal else digits(c.distance)}" for c in copies[:8]]
    more = f", and {len(copies) - 8} more pairs" if len(copies) > 8 else ""
    return f"near-copies: {', '.join(shown)}{more}"


def routers_line(routers: Sequence[RouterNorm]) -> Text:
    """Frobenius norms over the layers, and how far the experts' rows spread within a layer."""
    norms = [router.frobenius for router in routers]
    low, high = min(r.smallest for r in routers), max(r.largest for r in routers)
    return Text(
        f"router norm {sparkline(norms, max(norms))} {digits(min(norms))}–{digits(max(norms))}"
        f" over layers, an expert's row {digits(low)}–{digits(high)}"
    )
