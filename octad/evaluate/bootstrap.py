"""How sure a difference is: paired bootstrap over documents, symmetric bootstrap-t intervals.

    draws = Draws([units.bytes for units in ...], resamples=2000, seed=0)
    draws.differences(nats_by_domain)       # per domain [P, U]: nats of one contestant minus those of another

A domain's bits per byte is a ratio of sums over its documents, nats / bytes; two contestants saw the same documents, so
their difference is the ratio of the differences' sum. Documents are drawn with replacement within each domain (a cluster
bootstrap: what lies inside a document stays together); the mean is the plain mean over domains. For every resample the
difference is studentised by its own standard error (linearised ratio estimator: Cochran, Sampling Techniques, 6.4), and
the interval is estimate +- q standard errors, q the `level` quantile of |t| (Hall 1988: the symmetric bootstrap-t covers
to O(n^-2), where the percentile method, narrow for few documents of unequal lengths, covers to O(n^-1)).
tests/evaluate/test_coverage.py measures the coverage on models of known difference.

Shapes: R resamples, U documents of a domain, P pairs of contestants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
TINY = 1e-30  # of a variance: for documents that differ in nothing
LARGEST = 1e3  # bits per byte: an interval that is wider says nothing, as do one or two documents


@dataclass(frozen=True)
class Interval:
    """A difference in bits per byte and where the truth lies, at the draws' level."""

    value: float
    low: float
    high: float

    @property
    def answer(self) -> str:
        """Whether what was measured is lower for certain: "yes", "no" (higher for certain) or "unclear"."""
        return "yes" if self.high < 0 else "no" if self.low > 0 else "unclear"


@dataclass(frozen=True)
class _Estimate:
    """value_P and variance_P of one domain, and the same of each resample [R, P]."""

    value: Floats
    variance: Floats
    drawn_value: Floats
    drawn_variance: Floats


class Draws:
    """Which documents each resample takes, the same for all pairs: weights [R, U] of each domain."""

    def __init__(
        self, bytes_by_domain: Sequence[Floats], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
    ) -> None:
        random = np.random.default_rng(seed)
        self.level, self.bytes = level, [np.asarray(b, dtype=np.float64) for b in bytes_by_domain]
        self.weights = [
            random.multinomial(len(b), np.full(len(b), 1 / len(b)), resamples).astype(np.float64)
            for b in self.bytes
        ]

    def differences(self, nats_by_domain: Sequence[Floats]) -> list[list[Interval]]:
        """For each pair: an interval a domain, then that of the mean; nats of the difference, [P, U] a domain."""
        parts = [
            _estimate(nats / math.log(2), size, weights)
            for nats, size, weights in zip(nats_by_domain, self.bytes, self.weights, strict=True)
        ]
        columns = [self._intervals(part) for part in [*parts, _mean(parts)]]
        return [list(row) for row in zip(*columns, strict=True)]

    def _intervals(self, found: _Estimate) -> list[Interval]:
        error_P = np.sqrt(found.variance)
        t_RP = np.abs(found.drawn_value - found.value) / np.sqrt(np.maximum(found.drawn_variance, TINY))
        reach_P = np.quantile(t_RP, self.level, axis=0) * error_P
        reach_P[(reach_P > LARGEST) | (min(map(len, self.bytes)) < 2)] = math.inf
        return [
            Interval(float(v), float(v - r), float(v + r)) for v, r in zip(found.value, reach_P, strict=True)
        ]


def _estimate(bits_PU: Floats, bytes_U: Floats, weights_RU: Floats) -> _Estimate:
    """Ratio and its linearised variance, of the documents as they are and of each resample."""
    moments = (bits_PU.T, (bits_PU**2).T, (bits_PU * bytes_U).T)  # [U, P]
    size, squares = bytes_U[:, None], (bytes_U**2)[:, None]
    whole = np.ones((1, len(bytes_U)))
    value, variance = _ratio(whole, moments, size, squares)
    drawn_value, drawn_variance = _ratio(weights_RU, moments, size, squares)
    return _Estimate(value[0], variance[0], drawn_value, drawn_variance)


def _ratio(w: Floats, moments: tuple[Floats, ...], size: Floats, squares: Floats) -> tuple[Floats, Floats]:
    """Of weights w [R, U]: the ratio [R, P] and n/(n-1) sum w (d - ratio b)^2 / (sum w b)^2."""
    d, dd, db = (w @ m for m in moments)
    b, bb, n = w @ size, w @ squares, w.shape[1]
    ratio = d / b
    residuals = np.maximum(dd - 2 * ratio * db + ratio**2 * bb, 0.0)
    return ratio, n / max(n - 1, 1) * residuals / b**2


def _mean(parts: Sequence[_Estimate]) -> _Estimate:
    """The plain mean over domains, which are drawn independently."""
    n = len(parts)
    return _Estimate(
        np.stack([p.value for p in parts]).mean(0),
        np.stack([p.variance for p in parts]).sum(0) / n**2,
        np.stack([p.drawn_value for p in parts]).mean(0),
        np.stack([p.drawn_variance for p in parts]).sum(0) / n**2,
    )
