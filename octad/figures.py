"""Numbers as people read them: 135 M, +0.031, 12 %, and a row of bars.

    human(134_515_008)                    # "135 M"
    number(0.98765), signed(-0.0123), percent(0.125), interval(-0.02, 0.01)
    sparkline([0.1, 0.4, 0.2], top=0.4)   # "▂█▄"

What is not known (None) is written as a dash. Minus signs are true ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

MISSING = "–"
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
COUNTS = {"G": "B"}  # people count parameters in billions
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


def human(value: float | None, unit: str = "", *, even: bool = False) -> str:
    """Three digits and a prefix: 692 M, 1.08 B, of a unit 1.38 GB. `even` keeps zeros at the end, for columns."""
    if value is None:
        return MISSING
    for size, prefix in UNITS:
        if abs(value) >= size * 0.9995:
            scaled = value / size
            places = max(0, 2 - int(math.log10(abs(scaled))))
            text = f"{scaled:.{places}f}" if even else f"{scaled:.3g}"
            return f"{text} {prefix if unit else COUNTS.get(prefix, prefix)}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def number(value: float | None, places: int = 4) -> str:
    """Fixed digits behind the point."""
    return MISSING if value is None else f"{value:.{places}f}".replace("-", "−")


def signed(value: float | None, places: int = 4) -> str:
    """As number, but with a plus sign; zero has none."""
    if value is None:
        return MISSING
    text = f"{value:+.{places}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def percent(value: float | None, places: int = 0) -> str:
    """A share as a percentage."""
    return MISSING if value is None else f"{100 * value:.{places}f} %".replace("-", "−")


def share(value: float | None) -> str:
    """A share as a percentage in two figures or so: 0.0012 %, 0.32 %, 1.7 %, 12 %."""
    if value is None:
        return MISSING
    size = abs(100 * value)
    if 0 < size < 0.095:
        return f"{digits(100 * value)} %".replace("-", "−", 1)
    return percent(value, 2 if size < 0.995 else 1 if size < 9.95 else 0)


def change(value: float | None, places: int = 2) -> str:
    """How much something grew, as a percentage with its sign: +0.31 %, −2.40 %."""
    return MISSING if value is None else f"{signed(100 * value, places)} %"


def interval(low: float | None, high: float | None, places: int = 4) -> str:
    """An interval in brackets; "" where there is none."""
    if low is None or high is None:
        return ""
    return f"[{signed(low, places)}, {signed(high, places)}]"


def listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def duration(seconds: float) -> str:
    """About how long: 45 s, 12 min, 3.4 h, 2.1 days."""
    for unit, size, most in (("s", 1, 99.5), ("min", 60, 99.5), ("h", 3600, 47.5)):
        if seconds / size < most:
            return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"
