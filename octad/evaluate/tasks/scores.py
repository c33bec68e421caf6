"""Numbers with their uncertainty: what a task gives back.

    wilson(passed=31, of=40)                 # a share of yes and no
    Measured("pass@1", values).score()       # Wilson where values are 0 and 1, else a bootstrap over the examples
    paired(mine, theirs)                     # the difference on the same examples

Examples are what is drawn, so the intervals say what another set of examples of this kind might have given; that the
model's own samples would differ too is inside them where each example has several. Wilson (1927) keeps its coverage near
0 and 1 and for few examples, where the textbook interval does not (Brown, Cai & DasGupta 2001).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Score:
    """A value and the interval that holds the truth with a probability of LEVEL."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Measured:
    """One measure of one contestant: a number an example, and what each weighs (bytes, for bits per byte).

    higher_is_better None: neither is. chance: what guessing reaches, where there is guessing."""

    metric: str
    values: Sequence[float]
    weights: Sequence[float] | None = None
    higher_is_better: bool | None = True
    chance: float | None = None

    def score(self) -> Score:
        """The weighted mean of the values, with its interval."""
        if self.weights is None and set(self.values) <= {0, 1}:
            return wilson(round(sum(self.values)), len(self.values))
        return bootstrap(self.values, self.weights)


def wilson(passed: int, of: int, level: float = LEVEL) -> Score:
    """The share `passed / of` with Wilson's score interval."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, scale = passed / of, 1 + z * z / of
    middle = (share + z * z / (2 * of)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return Score(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, level: float = LEVEL) -> Score:
    """The weighted mean with a percentile interval over resampled examples."""
    value, weight = _arrays(values, weights)
    return _interval(float(_mean(value, weight)), _mean(value, weight, _draws(len(value))), level)


def paired(mine: Measured, theirs: Measured, level: float = LEVEL) -> Score:
    """Mine less theirs, on the same examples drawn together (each with its own weights)."""
    a, b = _arrays(mine.values, mine.weights), _arrays(theirs.values, theirs.weights)
    draws = _draws(len(a[0]))
    return _interval(float(_mean(*a) - _mean(*b)), _mean(*a, draws) - _mean(*b, draws), level)


def _mean(
    value: NDArray[np.float64], weight: NDArray[np.float64], draws: Any = slice(None)
) -> NDArray[np.float64]:
    """The weighted mean of the examples; of each row of draws."""
    total: NDArray[np.float64] = (value * weight)[draws].sum(-1) / weight[draws].sum(-1)
    return total


def _arrays(
    values: Sequence[float], weights: Sequence[float] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    value = np.asarray(values, np.float64)
    return value, np.ones_like(value) if weights is None else np.asarray(weights, np.float64)


def _draws(examples: int) -> NDArray[np.int64]:
    """RESAMPLES rows of example numbers, the same for every contestant."""
    return np.random.default_rng(SEED).integers(0, examples, (RESAMPLES, examples))


def _interval(value: float, draws: NDArray[np.float64], level: float) -> Score:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Score(value, float(low), float(high))
