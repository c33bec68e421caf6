"""Do the 95 % intervals cover the truth 95 times in 100? Models whose true difference is known, drawn again and again.

A document has bytes and, for each contestant, nats: its domain's rate, a quirk of its own, and noise that grows
with the root of its length. Lengths are as unequal as real documents', cut at the budget as read_windows cuts them. The
truth is the ratio of expectations, which is what more and more documents would give.
"""

import math
from typing import Any

import numpy as np
import pytest

from octad.evaluate.bootstrap import Draws
from octad.evaluate.compare import _chosen_elsewhere

GAP = 0.01  # bits per byte between the two contestants


def lengths(random: np.random.Generator, documents: int) -> Any:
    return np.clip(np.exp(random.normal(6.5, 0.9, documents)), 60, 4000)


def gaps(random: np.random.Generator, sizes: Any, quirk: str) -> Any:
    """Nats of one contestant minus the other's, by document: GAP for a byte in expectation."""
    normal = random.normal(size=len(sizes))
    own = {"even": 0.02 * normal, "skew": 0.02 * (random.exponential(size=len(sizes)) - 1)}[quirk]
    noise = 0.3 * random.normal(size=len(sizes)) / np.sqrt(sizes)
    return sizes * (GAP + own + noise) * math.log(2)


def coverage(documents: int, domains: int, quirk: str, repeats: int, resamples: int) -> float:
    random, covered = np.random.default_rng(documents + domains), 0
    for repeat in range(repeats):
        sizes = [lengths(random, documents) for _ in range(domains)]
        nats = [gaps(random, s, quirk)[None] for s in sizes]
        mean = Draws(sizes, resamples=resamples, seed=repeat).differences(nats)[0][-1]
        covered += mean.low <= GAP <= mean.high
    return covered / repeats


@pytest.mark.parametrize("documents", [20, 50, 100])
def test_intervals_cover_the_truth(documents: int) -> None:
    """One domain alone, the hardest case: fewest documents, most unequal weights."""
    assert 0.93 <= coverage(documents, 1, "even", 600, 400) <= 0.97


def test_intervals_of_a_mean_over_domains() -> None:
    assert 0.93 <= coverage(20, 8, "even", 400, 300) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("quirk", ["even", "skew"])
@pytest.mark.parametrize(("documents", "domains"), [(20, 1), (50, 1), (100, 1), (20, 8), (50, 8)])
def test_intervals_cover_the_truth_often_repeated(documents: int, domains: int, quirk: str) -> None:
    """Skewed quirks (a few documents that one contestant cannot read) with few documents are the known weak spot."""
    lowest = 0.93 if quirk == "even" or documents > 20 or domains > 1 else 0.90
    assert lowest <= coverage(documents, domains, quirk, 3000, 1000) <= 0.97


def oracle_cover(gap: float, repeats: int, members: int = 4, documents: int = 30) -> float:
    """A mixture that is as good as the best of `members`, one of them better than the others by `gap`; how often the
    interval against the oracle holds the true difference, 0."""
    random, covered = np.random.default_rng(7), 0
    for repeat in range(repeats):
        sizes = lengths(random, documents)
        rates = np.array([0.0] + [gap] * (members - 1))
        own = sizes * (1 + rates[:, None] + 0.03 * random.normal(size=(members, documents)))
        mixture = sizes * (1 + 0.03 * random.normal(size=documents))
        oracle = own[own.sum(1).argmin()]
        (elsewhere,) = _chosen_elsewhere([[row] for row in own])
        pair = np.stack([mixture - oracle, mixture - elsewhere])
        found, crossed = Draws([sizes], resamples=300, seed=repeat).differences([pair])
        covered += min(found[0].low, crossed[0].low) <= 0 <= max(found[0].high, crossed[0].high)
    return covered / repeats


def test_the_oracles_choice_does_not_make_intervals_too_narrow() -> None:
    """With a clear best member the usual coverage; with equal members the choice flatters the oracle, and the interval
    that knew nothing of it would miss the truth."""
    assert 0.93 <= oracle_cover(0.2, 300) <= 0.97
    assert oracle_cover(0.0, 300) >= 0.93


def test_the_interval_of_equal_lengths_by_hand() -> None:
    """Documents of one length: the ratio is a mean, its error that of a mean, the interval estimate +- q errors."""
    random = np.random.default_rng(0)
    nats, sizes = random.normal(0.1, 1, (1, 40)), np.full(40, 100.0)
    draws = Draws([sizes], resamples=4000, seed=1)
    interval, mean = draws.differences([nats])[0]
    values = nats[0] / 100 / math.log(2)
    error = values.std(ddof=1) / math.sqrt(40)
    assert interval == mean
    assert interval.value == pytest.approx(values.mean())
    assert (interval.low + interval.high) / 2 == pytest.approx(interval.value)
    assert 1.9 < (interval.high - interval.value) / error < 2.25  # t with 39 degrees of freedom: 2.02
    again = Draws([sizes], resamples=4000, seed=1).differences([nats])[0]
    assert again[0] == interval


def test_a_mean_is_that_of_the_domains() -> None:
    random = np.random.default_rng(0)
    sizes = [lengths(random, 10), lengths(random, 20)]
    nats = [random.normal(size=(3, 10)), random.normal(size=(3, 20))]
    for row, intervals in enumerate(Draws(sizes, resamples=50).differences(nats)):
        values = [n[row].sum() / s.sum() / math.log(2) for n, s in zip(nats, sizes, strict=True)]
        assert [i.value for i in intervals] == pytest.approx([*values, sum(values) / 2])


def test_what_differs_in_nothing() -> None:
    """Equal contestants: no difference, for certain; a single document: nobody knows."""
    sizes = np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    (same, _), (certain, _) = Draws([sizes], resamples=100).differences([np.stack([0 * sizes, -sizes])])
    assert (same.low, same.high, same.answer) == (0, 0, "unclear")
    assert certain.answer == "yes"
    assert certain.high == pytest.approx(-1 / math.log(2))
    one = Draws([sizes[:1]], resamples=100).differences([sizes[None, :1]])[0][0]
    assert (one.low, one.high, one.answer) == (-math.inf, math.inf, "unclear")
