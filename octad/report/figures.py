"""Numbers as people read them: 135 M, 0.031, and a row of bars.

human(134_515_008)                    # "135 M"
sparkline([0.1, 0.4, 0.2], top=0.4)   # "▂█▄"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32  # characters at most; more values share one


def sparkline(values: Sequence[float], top: float) -> str:
    """One bar a value, from 0 to `top`; runs of values share a bar (their mean) where there are more than SPARK_WIDTH.
    A value that is not finite shows as "?"."""
    count = min(len(values), SPARK_WIDTH)
    bounds = [round(len(values) * i / count) for i in range(count + 1)]
    runs = [values[start:end] for start, end in pairwise(bounds)]
    return "".join(_bar(sum(run) / len(run), top) for run in runs)


def _bar(value: float, top: float) -> str:
    if not math.isfinite(value):
        return "?"
    return BARS[min(int(value / top * len(BARS)), len(BARS) - 1)] if top > 0 else BARS[0]


def digits(value: float) -> str:
    """Two significant digits without an exponent where that stays short: 0, 0.031, 1.4, 130."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "?"
    value = float(f"{value:.1e}")
    places = 1 - math.floor(math.log10(abs(value)))
    if places > 6:
        return f"{value:.1e}"
    return f"{value:.{max(places, 0)}f}"


def human(count: float, unit: str = "") -> str:
    """A count with three digits and a prefix of a thousand: 135 M, 1.71 GB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 999.5 or prefix == "P":
            break
        count /= 1000
    return f"{count:.3g} {prefix}{unit}".rstrip()
