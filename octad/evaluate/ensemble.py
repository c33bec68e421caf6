"""The ensemble of the members: their probabilities mixed by sequence posterior, as in Branch-Train-Merge.

    nats_T = ensemble_nats(member_nats_MT, starts_W)    # from what each member said of the same windows, token by token

Each member's weight for the next token is its posterior after the window so far, from a uniform prior (arXiv 2208.03306,
section 3.2): w_m(t) is proportional to p_m(x_1..x_{t-1}). The probability of the token that came is then the sum of
w_m p_m(x_t), whose products telescope: the ensemble's probability of a window's beginning is the plain mean of the
members', so the nats follow from the running sums alone and no model has to be run again.

Shapes: M members, T predicted tokens of all windows, W windows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]


def ensemble_nats(nats_MT: Floats, starts_W: NDArray[np.intp]) -> NDArray[np.float32]:
    """-ln p of each token by the ensemble [T]; starts_W: where each window's tokens begin."""
    sums_MT = np.cumsum(nats_MT, axis=1, dtype=np.float64)
    before_MW = np.where(starts_W > 0, sums_MT[:, starts_W - 1], 0.0)
    lengths = np.diff([*starts_W, nats_MT.shape[1]])
    so_far_MT = sums_MT - np.repeat(
        before_MW, lengths, axis=1
    )  # -ln p_m of the window up to and with this token
    prefix_T = -_mean_exp(-so_far_MT)
    nats_T = np.diff(prefix_T, prepend=0.0)
    nats_T[starts_W] = prefix_T[starts_W]
    return nats_T.astype(np.float32)


def _mean_exp(x_MT: Floats) -> Floats:
    """ln of the mean over members of exp(x)."""
    largest_T = x_MT.max(axis=0)
    mean_T: Floats = np.exp(x_MT - largest_T).mean(axis=0)
    log_T: Floats = largest_T + np.log(mean_T)
    return log_T
