"""The comparison: the mixture beside everything it is made of, in bits per byte, with intervals and prices.

    comparison = compare(source, domains, Settings(tokens=4096, window=512))
    comparison.bits["mixture top-2"]["french"], comparison.mean("oracle"), comparison.difference("mixture top-2", "soup")

Everybody reads the same tokens in the same windows: every member; the soup (mean of the members that are not the base);
the ensemble (ensemble.py); the oracle, which is the best member of each domain, told the domain; the mixture at top-1,
top-2, its own top-k and all experts; dense models that the user names. A member that the mixture does not hold exactly
is opened where it came from, and judged as it was. Losses are kept token by token, and all figures are sums of them.

The oracle's choice is made on the very text that it is judged on, which flatters it. Its figures are those of that
choice (the hardest to beat); the interval of a difference reaches, on the oracle's bad side, to where the difference lies
when each document's member is chosen on the domain's other documents. With a clear best member both are the same; with
equal ones the interval is wider, and holds the truth from both sides.

Shapes: T predicted tokens, M members, P pairs, U documents of a domain, L layers, G domains, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from octad.checkpoint.source import TensorSource
from octad.dist import World
from octad.errors import RequestError
from octad.evaluate.bootstrap import Draws, Interval
from octad.evaluate.domains import Domains, read_domains
from octad.evaluate.ensemble import ensemble_nats
from octad.evaluate.heldout import Texts, read_texts
from octad.evaluate.judge import Judge, shape_of
from octad.evaluate.lineup import Entry, LineUp, line_up
from octad.evaluate.price import Price, bytes_per_parameter, ensemble_price, model_price, oracle_price
from octad.evaluate.results import Cache, Record
from octad.telling import Progress, quiet

__all__ = ["Comparison", "Difference", "Row", "Settings", "compare", "read_domains"]

Floats = Any  # NDArray
MEAN = "mean"
ELSEWHERE = "oracle chosen elsewhere\n"  # like no contestant's name: those are one line


@dataclass(frozen=True)
class Settings:
    """What to judge on and how sure to be. `tokens` are those of one domain; `level` is that of the intervals;
    differences below the share `smallest` of a contestant's bits per byte matter to nobody. `quantize`: all are judged
    with weights rounded so ("int8", "int4"), which is quicker and nearly as exact. `other_k`: the mixture is judged with
    other numbers of experts a token, too: with all of them it takes as long as five members."""

    tokens: int = 4096
    window: int = 512
    seed: int = 0
    resamples: int = 2000
    level: float = 0.95
    smallest: float = 0.002
    quantize: str | None = None
    other_k: bool = True

    def __post_init__(self) -> None:
        """Raises RequestError for a seed that no draw takes."""
        if self.seed < 0:
            raise RequestError(f"seed: found {self.seed}; give a number from 0")


@dataclass(frozen=True, eq=False)
class Row:
    """A contestant: kind "member", "soup", "ensemble", "oracle", "mixture", "dense" or "model"; nats_T; what it costs."""

    name: str
    kind: str
    note: str | None
    nats: Floats
    price: Price


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one contestant minus those of another, in one domain or the mean. `smallest`: bits per byte below
    which it does not matter."""

    of: str
    against: str
    domain: str
    interval: Interval
    relative: float
    smallest: float = 0.0

    @property
    def answer(self) -> str:
        """Whether it is better: "yes" or "no" where that is certain and large enough to matter, "same" where it certainly
        does not matter, else "unclear"."""
        if -self.smallest < self.interval.low and self.interval.high < self.smallest:
            return "same"
        return self.interval.answer if abs(self.interval.value) >= self.smallest else "unclear"


@dataclass
class Comparison:
    """Everything that the report, the verdict and the requirements are made from. `own`: the model at its own top-k."""

    model: str
    own: str
    texts: Texts
    settings: Settings
    lineup: LineUp
    rows: dict[str, Row]
    dtype: str
    differences: list[Difference] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)  # the oracle's member by domain
    load: torch.Tensor | None = None  # how often each expert was chosen, by layer and domain: [L, G, E]
    computed: list[str] = field(default_factory=list)  # whom the cache did not know

    def __post_init__(self) -> None:
        bits, one = math.log(2), 1.0
        self.bits = {name: self._per(row, bits, self.texts.bytes) for name, row in self.rows.items()}
        self.nats = {name: self._per(row, one, self.texts.tokens) for name, row in self.rows.items()}

    def _per(self, row: Row, unit: float, size: Mapping[str, int]) -> dict[str, float]:
        sums = {d: float(row.nats[span].sum(dtype=np.float64)) for d, span in self.texts.spans.items()}
        return {d: total / unit / max(1, size[d]) for d, total in sums.items()}

    @property
    def domains(self) -> list[str]:
        """Their names, in order."""
        return list(self.texts.domains)

    def of_kind(self, *kinds: str) -> list[str]:
        """The names of the contestants of these kinds."""
        return [row.name for row in self.rows.values() if row.kind in kinds]

    @property
    def members(self) -> list[str]:
        """The members that take part."""
        return self.of_kind("member")

    @property
    def mixtures(self) -> list[str]:
        """The mixture at each top-k."""
        return self.of_kind("mixture")

    def value(self, name: str, domain: str = MEAN) -> float:
        """Bits per byte of a contestant in a domain, or its mean."""
        return self.mean(name) if domain == MEAN else self.bits[name][domain]

    def mean(self, name: str, measure: str = "bits") -> float:
        """Mean over the domains, each counted once."""
        values = (self.bits if measure == "bits" else self.nats)[name].values()
        return sum(values) / len(values)

    def best_member(self, domain: str = MEAN) -> str:
        """The member with the fewest bits per byte."""
        return min(self.members, key=lambda name: self.value(name, domain))

    def specialist(self, domain: str) -> str:
        """A domain's own member: that of its name, else the best one."""
        return domain if domain in self.members else self.best_member(domain)

    def difference(self, of: str, against: str, domain: str = MEAN) -> Difference:
        """One of the differences. Raises KeyError for a pair that was not compared."""
        for found in self.differences:
            if (found.of, found.against, found.domain) == (of, against, domain):
                return found
        raise KeyError((of, against, domain))

    def shares(self, domain: str) -> list[float] | None:
        """The share of a domain's choices that each expert gets, mean over layers."""
        if self.load is None:
            return None
        counts_LE = self.load[:, self.domains.index(domain)].double()
        return [float(s) for s in (counts_LE / counts_LE.sum(1, keepdim=True)).mean(0)]


def compare(
    source: TensorSource,
    domains: Domains,
    settings: Settings | None = None,
    *,
    dense: Sequence[str] = (),
    ready: Callable[[Texts, LineUp], None] = lambda texts, field: None,
    cache: Cache | None = None,
    world: World | None = None,
    progress: Progress = quiet,
    spread: bool = False,
) -> Comparison:
    """Judge a mixture and its parts, or a dense model alone. Raises OctadError for text that cannot be read, a damaged
    mixture, or a dense model that reads other tokens. `ready` is called before the long part: what it raises ends it.
    `spread`: each model's weights lie over all ranks."""
    settings = settings or Settings()
    texts = read_texts(source, domains, tokens=settings.tokens, window=settings.window)
    lineup = line_up(source, texts, dense, other_k=settings.other_k)
    ready(texts, lineup)
    if spread and settings.quantize:
        raise RequestError(
            "--quantize: weights that lie over several processes are not rounded; leave it out"
        )
    options: Any = {"spread": spread, "quantize": settings.quantize}
    judge = Judge(source, texts, cache or Cache(None), world or World(), progress, **options)
    records = judge.run({name: entry.who for name, entry in lineup.entries.items()})
    rows = {name: _row(judge, name, entry, records[name]) for name, entry in lineup.entries.items()}
    rows, chosen = _with_oracle(_with_ensemble(rows, texts), texts)
    found = Comparison(
        source.label,
        lineup.own,
        texts,
        settings,
        lineup,
        rows,
        str(judge.dtype).removeprefix("torch."),
        chosen=chosen,
        load=records[lineup.own].load,
        computed=judge.computed,
    )
    found.differences = differences(found)
    return found


def _row(judge: Judge, name: str, entry: Entry, record: Record) -> Row:
    lengths = [len(w.ids) for w in judge.texts.windows]
    context = sum(n * (n - 1) / 2 for n in lengths) / sum(lengths)  # positions that a token sees, on average
    config = shape_of(judge.source, entry.who)
    source = getattr(entry.who, "source", judge.source)
    assert judge.dtype is not None
    each = bytes_per_parameter(source, judge.dtype, config, judge.quantize)
    price = model_price(config, context, each, record.measured)
    return Row(name, entry.kind, entry.note, record.nats.numpy(), price)


def _with_ensemble(rows: dict[str, Row], texts: Texts) -> dict[str, Row]:
    """The ensemble of the members, in the place behind the soup."""
    members = [row for row in rows.values() if row.kind == "member"]
    if len(members) < 2:
        return rows
    nats = ensemble_nats(np.stack([row.nats for row in members]), texts.starts)
    note = "every member reads everything; weights are their posterior, window by window"
    price = ensemble_price([row.price for row in members])
    parts = [row for row in rows.values() if row.kind in ("member", "soup")]
    rest = [row for row in rows.values() if row.kind not in ("member", "soup")]
    return {row.name: row for row in [*parts, Row("ensemble", "ensemble", note, nats, price), *rest]}


def _with_oracle(rows: dict[str, Row], texts: Texts) -> tuple[dict[str, Row], dict[str, str]]:
    """The best member of each domain, told the domain, in the place behind the ensemble; and who that is."""
    members = [row for row in rows.values() if row.kind == "member"]
    if not members:
        return rows, {}
    chosen = {
        d: min(members, key=lambda row: row.nats[span].sum(dtype=np.float64))
        for d, span in texts.spans.items()
    }
    nats = np.concatenate([chosen[d].nats[span] for d, span in texts.spans.items()])
    price = oracle_price([row.price for row in {row.name: row for row in chosen.values()}.values()])
    oracle = Row("oracle", "oracle", "the best member of each domain, told the domain", nats, price)
    parts = [row for row in rows.values() if row.kind in ("member", "soup", "ensemble")]
    rest = [row for row in rows.values() if row not in parts]
    return {row.name: row for row in [*parts, oracle, *rest]}, {d: row.name for d, row in chosen.items()}


# ---- differences -----------------------------------------------------------------------------------------------


def differences(found: Comparison) -> list[Difference]:
    """Of the mixture as it runs and then at each other top-k, or of a model, against all others; in each domain, then in
    the mean."""
    units = list(found.texts.units.values())
    draws = Draws(
        [u.bytes for u in units],
        resamples=found.settings.resamples,
        seed=found.settings.seed,
        level=found.settings.level,
    )
    sums = {name: [u.sums(row.nats) for u in units] for name, row in found.rows.items()}
    if found.members:
        sums[ELSEWHERE] = _chosen_elsewhere([sums[m] for m in found.members])
    mine = list(dict.fromkeys([found.own, *found.mixtures]))
    pairs = [(a, b) for a in mine for b in sums if a != b]
    if not pairs:
        return []
    nats = [np.stack([sums[a][g] - sums[b][g] for a, b in pairs]) for g in range(len(units))]
    intervals = dict(zip(pairs, draws.differences(nats), strict=True))
    return [
        Difference(
            a,
            b,
            domain,
            interval,
            interval.value / found.value(b, domain),
            found.settings.smallest * found.value(b, domain),
        )
        for a, b in pairs
        if b in found.rows
        for domain, interval in zip([*found.domains, MEAN], _honest(intervals, a, b), strict=True)
    ]


def _honest(intervals: Mapping[tuple[str, str], list[Interval]], a: str, b: str) -> list[Interval]:
    """A pair's intervals; against the oracle with room for its choice."""
    if b != "oracle":
        return intervals[a, b]
    both = zip(intervals[a, b], intervals[a, ELSEWHERE], strict=True)
    return [Interval(f.value, min(f.low, e.low), max(f.high, e.high)) for f, e in both]


def _chosen_elsewhere(members: Sequence[Sequence[Floats]]) -> list[Floats]:
    """For each domain the nats [U] of an oracle that reads each document by the member that is best on the others."""
    found = []
    for domain in zip(*members, strict=True):
        nats_MU = np.stack(domain)
        others_MU = nats_MU.sum(1, keepdims=True) - nats_MU
        found.append(nats_MU[others_MU.argmin(0), np.arange(nats_MU.shape[1])])
    return found
