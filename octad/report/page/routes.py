"""The report's routing as tables and plots: who takes what, how sure the routers are, what the experts like to read.

    routes.shares(routing), routes.heat_maps(routing), routes.by_domain(routing), routes.passages(routing)

Takes the dict that evaluate/routing.py collects. Models with very many experts show the MOST_EXPERTS that are used most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from octad.figures import MISSING, human, mean, number, percent
from octad.report import svg
from octad.report.table import Cell, Column, Table, busiest

Routing = Mapping[str, Any]
COLOURS = 8  # of experts; from the ninth on they repeat, and the numbers tell them apart


def shown_experts(routing: Routing) -> list[int]:
    """The experts to draw: all, or of many those with the largest share in some domain, in their own order."""
    tables = routing["share"].values()
    most = [
        max((_mean_share(rows, e) for rows in tables), default=0.0) for e in range(len(routing["experts"]))
    ]
    return busiest(most)


def _mean_share(rows: Sequence[Sequence[float]], expert: int) -> float:
    return mean(row[expert] for row in rows) or 0.0


def peak(routing: Routing) -> float:
    """The largest share of all, which has the full colour."""
    return max((v for rows in routing["share"].values() for row in rows for v in row), default=0.0) or 1.0


def shares(routing: Routing) -> Table:
    """A row a domain, a column an expert: the share of the choices, mean over the layers; a domain's own is marked."""
    experts, names, most = shown_experts(routing), routing["experts"], peak(routing)
    columns = [Column("text"), *(Column(names[e], numeric=True) for e in experts)]
    rows = []
    for domain, layers in routing["share"].items():
        values = [_mean_share(layers, e) for e in experts]
        rows.append(
            [
                Cell(domain),
                *(
                    Cell(
                        percent(v), round(v, 6), "own" if names[e] == domain else "", tint=svg.shade(v / most)
                    )
                    for e, v in zip(experts, values, strict=True)
                ),
            ]
        )
    note = "" if len(experts) == len(names) else f"the {len(experts)} most used of {len(names)} experts"
    return Table("Share of the choices, mean over layers", columns, rows, note=note, kind="wide tinted")


def most_possible(report: Mapping[str, Any]) -> str:
    """What a share of 50 % means: each token is read by so many experts."""
    k = report.get("experts_per_token")
    if not k or k == 1:
        return ""
    return f"Each token is read by {k} experts: {percent(1 / k)} is the most that one can have, and means every token."


@dataclass(frozen=True)
class HeatMap:
    """One domain's map with the experts' names beside it."""

    domain: str
    experts: list[tuple[int, str]]
    plot: Markup
    layers: tuple[int, int]


def heat_maps(routing: Routing) -> list[HeatMap]:
    """Share by layer and expert, one map a domain."""
    experts, names, layers = shown_experts(routing), routing["experts"], routing["layers"]
    maps = []
    for domain, rows in routing["share"].items():
        by_expert = [[row[e] for row in rows] for e in experts]
        title = f"{domain}: share of each expert by layer"
        plot = svg.heat(by_expert, [names[e] for e in experts], layers, title, peak(routing))
        maps.append(HeatMap(domain, [(e, names[e]) for e in experts], plot, (layers[0], layers[-1])))
    return maps


def by_domain(routing: Routing) -> Table:
    """Per domain: how often its own expert comes first, how sure the routers are; means, and lines over the layers."""
    even = math.log(len(routing["experts"])) or 1.0
    measures = (
        ("own_first", "own expert first", 0.0, 1.0, percent),
        ("confidence", "weight of the first", 0.0, 1.0, percent),
        ("entropy", "entropy, nats", 0.0, even, lambda v: number(v, 2)),
    )
    used = [m for m in measures if any(routing.get(m[0], {}).values())]
    columns = [Column("text")]
    for _, title, *_ in used:
        columns += [Column(title, numeric=True), Column("by layer", plot=True)]
    rows = []
    for domain in routing["share"]:
        row = [Cell(domain)]
        for key, title, low, high, written in used:
            values = routing.get(key, {}).get(domain) or []
            row += _measure(values, low, high, written, f"{domain}: {title}", routing["layers"])
        rows.append(row)
    note = (
        "Lines run from the first layer to the last, between 0 and 100 %; of entropy between 0 (certain) and"
        f" {even:.2f} nats (undecided)."
    )
    return Table("Routers by domain", columns, rows, note=note, kind="wide sparks")


def _measure(
    values: Sequence[float | None], low: float, high: float, written: Any, label: str, layers: Sequence[int]
) -> list[Cell]:
    known = [v for v in values if v is not None]
    average = mean(values)
    if average is None:
        return [Cell(MISSING), Cell("")]
    least, most = min(known), max(known)
    lowest, highest = (layers[values.index(v)] for v in (least, most))
    told = f"{label}: least {written(least)} in layer {lowest}, most {written(most)} in layer {highest}"
    line = svg.spark([low if v is None else v for v in values], low, high, told)
    return [Cell(written(average), round(average, 6)), Cell("", plot=line)]


def by_layer(routing: Routing) -> Table:
    """A row a layer: the same measures, mean over the domains."""
    keys = [
        (k, t)
        for k, t in (
            ("own_first", "own expert first"),
            ("confidence", "weight of the first"),
            ("entropy", "entropy, nats"),
        )
        if any(routing.get(k, {}).values())
    ]
    rows = []
    for at, layer in enumerate(routing["layers"]):
        means = [mean(v[at] for v in routing[k].values() if v) for k, _ in keys]
        cells = [Cell(number(m, 3), None if m is None else round(m, 6)) for m in means]
        rows.append([Cell(str(layer), layer), *cells])
    return Table(
        "Routers by layer, mean over domains",
        [Column("layer", numeric=True), *(Column(t, numeric=True) for _, t in keys)],
        rows,
    )


def dead(routing: Routing) -> list[tuple[str, str]]:
    """Experts that some layers never chose, with those layers in words."""
    layers: dict[str, list[int]] = {}
    for case in routing.get("dead") or []:
        layers.setdefault(str(case["expert"]), []).append(int(case["layer"]))
    return [
        (name, f"layer{'s' if len(found) > 1 else ''} {_ranges(sorted(found))}")
        for name, found in layers.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """3, 5–8, 12."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def twins(routing: Routing) -> list[str]:
    """Pairs of experts of nearly the same weights, in words."""
    return [f"{t['a']} and {t['b']} (cosine {t['cosine']:.3f})" for t in routing.get("twins") or []]


# ---- tokens and text -----------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """A token with its spaces and line ends to be seen."""
    for old, new in ((" ", "␣"), ("\n", "↵"), ("\r", "␍"), ("\t", "⇥")):
        text = text.replace(old, new)
    return text or "∅"


def top_tokens(routing: Routing) -> list[tuple[int, str, list[tuple[str, str]]]]:
    """(number, expert, [(token, what is known of it)]) of experts that have typical tokens."""
    found = []
    for e, name in enumerate(routing["experts"]):
        tokens = (routing.get("top_tokens") or {}).get(name) or []
        told = [(visible(t["text"]), f"{human(t['count'])} times, lift {t['lift']:.1f}") for t in tokens]
        if told:
            found.append((e, name, told))
    return found


@dataclass(frozen=True)
class Word:
    """A piece of a passage that is shown in one colour, after line breaks and indents without; `first`: the speaker
    changes here."""

    space: str
    text: str
    speaker: int
    first: bool
    hint: str


@dataclass(frozen=True)
class Passage:
    """Text of a domain, and who speaks in it: (number, name, share of the tokens), most first."""

    domain: str
    words: list[Word]
    speakers: list[tuple[int, str, str]]


def passages(routing: Routing) -> list[Passage]:
    """The example passages, word by word: of a word's tokens, the majority's speaker has it."""
    names, found = routing["experts"], []
    for example in routing.get("examples") or []:
        words: list[Word] = []
        for group in _words(example["tokens"]):
            votes: dict[int, float] = {}
            for t in group:
                votes[t["speaker"]] = votes.get(t["speaker"], 0.0) + 1
            speaker = max(votes, key=votes.__getitem__)
            weight = mean(t["weight"] for t in group)
            first = speaker != next((w.speaker for w in reversed(words) if w.text), None)
            text = "".join(t["text"] for t in group)
            bare = text.lstrip() if "\n" in text else text
            words.append(
                Word(
                    text[: len(text) - len(bare)],
                    bare,
                    speaker,
                    first,
                    f"{names[speaker]}, {percent(weight)} of the weight",
                )
            )
        counts: dict[int, int] = {}
        for t in example["tokens"]:
            counts[t["speaker"]] = counts.get(t["speaker"], 0) + 1
        order = sorted(counts, key=lambda e: -counts[e])
        told = [(e, names[e], percent(counts[e] / len(example["tokens"]))) for e in order]
        found.append(Passage(example["domain"], words, told))
    return found


def _words(tokens: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Tokens that belong together: a new word begins with what is no letter or digit."""
    groups: list[list[Mapping[str, Any]]] = []
    for token in tokens:
        if not groups or (token["text"] and not token["text"][0].isalnum()):
            groups.append([])
        groups[-1].append(token)
    return groups
