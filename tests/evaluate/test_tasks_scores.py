"""Intervals and pass@k against scipy, enumeration and coverage by simulation."""

import itertools
import math

import numpy as np
import pytest

from octad.evaluate.tasks.humaneval import ks, pass_at
from octad.evaluate.tasks.scores import Measured, bootstrap, paired, wilson


@pytest.mark.parametrize(("passed", "of"), [(0, 10), (3, 10), (10, 10), (41, 164), (1, 2)])
def test_wilson_is_scipys(passed: int, of: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle; it comes with octad[eval]")
    theirs = stats.binomtest(passed, of).proportion_ci(0.95, method="wilson")
    mine = wilson(passed, of)
    assert (mine.value, mine.low, mine.high) == pytest.approx(
        (passed / of, theirs.low, theirs.high), abs=1e-12
    )


def test_wilson_by_hand() -> None:
    """5 of 10 at 95 %: the middle is 1/2, the half width z / (1 + z²/n) · sqrt(p(1-p)/n + z²/4n²)."""
    z = 1.959963984540054
    half = z / (1 + z * z / 10) * math.sqrt(0.025 + z * z / 400)
    score = wilson(5, 10)
    assert (score.low, score.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_pass_at_k_is_the_share_of_subsets_with_a_pass() -> None:
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            samples = [1] * c + [0] * (n - c)
            share = np.mean([any(subset) for subset in itertools.combinations(samples, k)])
            assert pass_at(k, n, c) == pytest.approx(share)


def test_pass_at_k_is_the_papers_estimator() -> None:
    """Chen et al. 2021, figure 3."""
    for n, c, k in [(200, 13, 1), (200, 13, 100), (100, 0, 10), (20, 20, 10)]:
        theirs = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        assert pass_at(k, n, c) == pytest.approx(theirs)


def test_which_k() -> None:
    assert (ks(1), ks(5), ks(10), ks(200)) == ([1], [1, 5], [1, 10], [1, 10, 100, 200])


def test_yes_and_no_get_wilson_and_others_a_bootstrap() -> None:
    assert Measured("m", [1, 0, 1]).score() == wilson(2, 3)
    assert Measured("m", [0.5, 0.0, 1.0]).score() == bootstrap([0.5, 0.0, 1.0])
    assert Measured("m", [1, 0, 1], [1, 1, 2]).score() == bootstrap([1, 0, 1], [1, 1, 2])


def test_weights_make_a_ratio_of_sums() -> None:
    assert bootstrap([2, 30], [1, 3]).value == pytest.approx((2 * 1 + 30 * 3) / 4)


def test_the_bootstrap_covers_the_mean() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        score = bootstrap(draw.normal(3.0, 1.0, 60).tolist())
        hits += score.low <= 3.0 <= score.high
    assert 178 <= hits <= 198  # 95 % of 200 is 190; the percentile interval is a little short for 60


def test_pairs_cancel_what_examples_have_in_common() -> None:
    draw = np.random.default_rng(2)
    hardness = draw.normal(0, 10, 200)
    mine, theirs = Measured("m", (hardness + 1).tolist()), Measured("m", hardness.tolist())
    difference = paired(mine, theirs)
    assert (difference.value, difference.low, difference.high) == pytest.approx((1, 1, 1))
    assert paired(theirs, mine).value == pytest.approx(-1)
    assert Measured("m", hardness.tolist()).score().high - Measured("m", hardness.tolist()).score().low > 2
