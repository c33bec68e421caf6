"""What quality.py says of a contestant's losses: how far above the oracle, how sure, where in a text, in which documents.

figures(texts, nats, oracle)        # nats and oracle: for each text an array of -ln p, token by token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DOMAINS = ("python", "c", "french", "german", "spanish", "maths", "literature")
ALL = (*DOMAINS, "dictionary")
POSITIONS = ((0, 16), (16, 32), (32, 128), (128, 1 << 30))


@dataclass
class Text:
    """One judged document: its only window, where it is from, and the half of its source."""

    domain: str
    name: str
    half: int
    window: Any

    @property
    def source(self) -> str:
        """The package or book."""
        return self.name.split("/")[0]


def figures(texts: Sequence[Text], nats: Sequence[Any], oracle: Sequence[Any]) -> dict[str, Any]:
    """Excess over the oracle: by domain, in the mean of the seven, by position, and the worst documents."""
    return {
        "domains": {domain: excess(texts, nats, oracle, (domain,)) for domain in ALL if held(texts, domain)},
        "mean": excess(texts, nats, oracle, DOMAINS),
        "positions": [by_position(texts, nats, oracle, start, end) for start, end in POSITIONS],
        "worst": worst(texts, nats, oracle, 10),
    }


def held(texts: Sequence[Text], domain: str) -> bool:
    """Whether there is a document of this domain."""
    return any(text.domain == domain for text in texts)


def excess(
    texts: Sequence[Text], nats: Sequence[Any], oracle: Sequence[Any], domains: Sequence[str]
) -> dict[str, Any]:
    """The mean over domains of the bits per byte above the oracle's, as a share of these, with its interval."""
    from octad.evaluate.bootstrap import Draws

    sizes, more, base = [], [], []
    for domain in domains:
        rows = [n for n, text in enumerate(texts) if text.domain == domain]
        sizes.append(np.array([texts[n].window.predicted_bytes for n in rows], dtype=np.float64))
        more.append(np.array([float(nats[n].sum() - oracle[n].sum()) for n in rows])[None])
        base.append(sum(float(oracle[n].sum()) for n in rows) / math.log(2) / sizes[-1].sum())
    *_, found = Draws(sizes).differences(more)[0]
    whole = sum(base) / len(base)
    return {
        "share": round(found.value / whole, 5),
        "interval": [finite(end / whole) for end in (found.low, found.high)],
        "oracle_bits": round(whole, 4),
        "documents": sum(map(len, sizes)),
    }


def by_position(
    texts: Sequence[Text],
    nats: Sequence[Any],
    oracle: Sequence[Any],
    start: int,
    end: int,
    domains: Sequence[str] = DOMAINS,
) -> dict[str, Any]:
    """Nats a token above the oracle's at these predictions of a window, mean over the domains, with its interval
    over documents; and how much of all that the texts lose is lost there."""
    from octad.evaluate.bootstrap import Draws

    sizes, more, whole = [], [], 0.0
    for domain in domains:
        rows = [n for n, text in enumerate(texts) if text.domain == domain]
        parts = [found for n in rows if len(found := (nats[n] - oracle[n])[start:end])]
        whole += sum(float((nats[n] - oracle[n]).sum()) for n in rows)
        if parts:
            sizes.append(np.array(list(map(len, parts)), dtype=np.float64))
            more.append(np.array([float(part.sum()) for part in parts])[None])
    place: dict[str, Any] = {"from": start, "to": min(end, 10**6)}
    if not sizes:
        return place | {"nats": 0.0, "tokens": 0}
    *_, found = Draws(sizes).differences(more)[0]
    return place | {
        "nats": round(found.value * math.log(2), 4),
        "interval": [finite(limit * math.log(2)) for limit in (found.low, found.high)],
        "tokens": int(sum(size.sum() for size in sizes)),
        "of_the_excess": round(sum(float(part.sum()) for part in more) / whole, 3) if whole else 0.0,
    }


def finite(value: float) -> float | None:
    """Rounded; None for what too few documents do not say."""
    return round(value, 5) if math.isfinite(value) else None


def worst(
    texts: Sequence[Text], nats: Sequence[Any], oracle: Sequence[Any], count: int
) -> list[dict[str, Any]]:
    """The documents that lose most, as a share of what their specialist needs."""
    shares = [float(n.sum() / o.sum() - 1) for n, o in zip(nats, oracle, strict=True)]
    order = sorted(range(len(texts)), key=lambda n: -shares[n])[:count]
    return [{"domain": texts[n].domain, "name": texts[n].name, "share": round(shares[n], 4)} for n in order]
