"""The ensemble against its definition: posterior weights updated token by token, probabilities mixed."""

import numpy as np
import pytest

from octad.evaluate.ensemble import ensemble_nats


def by_definition(nats: np.ndarray, starts: list[int]) -> list[float]:
    """Branch-Train-Merge, equation 1: a loop over tokens."""
    found = []
    posterior = np.ones(len(nats)) / len(nats)
    for t in range(nats.shape[1]):
        if t in starts:
            posterior = np.ones(len(nats)) / len(nats)
        p = np.exp(-nats[:, t])
        found.append(-np.log(posterior @ p))
        posterior = posterior * p / (posterior @ p)
    return found


def test_against_the_loop() -> None:
    nats = np.random.default_rng(0).exponential(2.0, (5, 200)).astype(np.float32)
    starts = [0, 1, 7, 100, 199]
    assert ensemble_nats(nats, np.array(starts)) == pytest.approx(
        by_definition(nats, starts), rel=1e-4, abs=1e-5
    )


def test_by_hand() -> None:
    """Two members that give 1/2 and 1/4, twice: (1/2 + 1/4) / 2 = 3/8, then (1/4 + 1/16) / 2 over that = 5/12."""
    nats = -np.log(np.array([[0.5, 0.5], [0.25, 0.25]], dtype=np.float32))
    assert np.exp(-ensemble_nats(nats, np.array([0]))) == pytest.approx([3 / 8, 5 / 12])


def test_equal_members_are_their_ensemble_and_none_is_beaten_by_more_than_the_prior() -> None:
    random = np.random.default_rng(1)
    one = random.exponential(3.0, (1, 3000)).astype(np.float32)
    starts = np.arange(0, 3000, 500)
    assert ensemble_nats(np.repeat(one, 4, 0), starts) == pytest.approx(one[0], rel=1e-3, abs=1e-4)
    nats = random.exponential(3.0, (8, 3000)).astype(np.float32)
    whole = ensemble_nats(nats, starts).reshape(6, 500).sum(1)
    best = nats.reshape(8, 6, 500).sum(2).min(0)
    assert (whole <= best + np.log(8) + 1e-3).all()
    assert (whole >= best - 1e-3).all()
