"""Requirements that a pipeline can trust: `--require "mean<=oracle, every<=member*1.01"`.

    for requirement in parse("mean<=oracle"):
        requirement.check(comparison)       # {"text", "holds", "cases": [...]}

    requirements = requirement { "," requirement }
    requirement  = left ( "<=" | "<" | ">=" | ">" ) right
    left         = "mean" | "every" | a domain's name
    right        = ( "oracle" | "member" | "soup" | "ensemble" | a contestant's name ) [ "*" number ] | number

The left side is the mixture at its own top-k (or the model, where it is dense), in bits per byte: its mean over the
domains, each domain by itself, or one domain. The right side is read at the same place. "member" is the best single
member where the left side is the mean, and elsewhere the domain's own: the member of the domain's name, else the best one
there. Names may be quoted. Figures are compared as measured; how sure they are is for the verdict to say.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from octad.errors import RequestError
from octad.evaluate.compare import MEAN, Comparison
from octad.evaluate.lineup import LineUp

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
EXAMPLE = 'such as "mean<=oracle, every<=member*1.01"'
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_WORD = r"""(?:"[^"]*"|'[^']*'|[^<>=*,"']+?)(?=\s*(?:[<>=*,"']|$))"""
_ONE = re.compile(  # each part is there only if those before it are, so that the last one tells where it went wrong
    rf"\s*(?:(?P<left>{_WORD})\s*(?:(?P<compare><=|>=|<|>)\s*"
    rf"(?:(?P<right>{_WORD})\s*(?:(?P<times>\*)\s*(?P<factor>{_NUMBER})?)?)?)?)?\s*"
)
_NEXT = {
    None: "mean, every or a domain's name",
    "left": "<=, <, >= or >",
    "compare": "oracle, member, soup, ensemble, a contestant's name or a number",
    "times": "a number such as 1.01",
}


@dataclass(frozen=True)
class Requirement:
    """left operator right * factor; right may be a number. `text` is what the user wrote."""

    text: str
    left: str
    compare: str
    right: str | float
    factor: float = 1.0

    def check_names(self, domains: Collection[str], lineup: LineUp) -> None:
        """Raises RequestError for a name that a comparison of these domains and contestants will not have."""
        places = [MEAN, "every", *domains]
        if self.left not in places:
            raise self._unknown(self.left, places)
        names = [*lineup.names, *(["member"] if lineup.members else [])]
        if isinstance(self.right, str) and self.right not in names:
            raise self._unknown(self.right, names, "; ".join(lineup.missing))

    def check(self, found: Comparison) -> dict[str, Any]:
        """{"text", "holds", "cases"}, of a comparison that has the names."""
        places = found.domains if self.left == "every" else [self.left]
        cases = [self._case(found, place) for place in places]
        return {"text": self.text, "holds": all(case["holds"] for case in cases), "cases": cases}

    def _case(self, found: Comparison, place: str) -> dict[str, Any]:
        left = found.value(found.own, place)
        name, value = self._right(found, place)
        return {
            "left": f"{found.own}, {place}",
            "left_value": left,
            "right": name + (f" * {self.factor:g}" if self.factor != 1.0 else ""),
            "right_value": value * self.factor,
            "holds": OPERATORS[self.compare](left, value * self.factor),
        }

    def _right(self, found: Comparison, place: str) -> tuple[str, float]:
        if isinstance(self.right, float):
            return "the number", self.right
        name = self.right
        if name == "member":
            name = found.best_member() if place == MEAN else found.specialist(place)
        return name, found.value(name, place)

    def _unknown(self, name: str, names: list[str], why: str = "") -> RequestError:
        reason = f" ({why})" if why else ""
        return RequestError(
            f"--require {self.text!r}: there is no {name!r}{reason}; there are: {', '.join(names)}"
        )


def parse(text: str) -> list[Requirement]:
    """All requirements of an option's text. Raises RequestError naming the spot."""
    found, place = [], 0
    while True:
        one = _ONE.match(text, place)
        assert one is not None  # of nothing, at least
        place, expected = one.end(), _NEXT.get(one.lastgroup, "")
        if not expected and text[place : place + 1] not in ("", ","):
            expected = "a comma or the end"
        if expected:
            spot = repr(text[place : place + 12]) if place < len(text) else "the end"
            raise RequestError(
                f"--require: at character {place + 1} ({spot}): expected {expected}, {EXAMPLE}"
            )
        left, right = (one[name].strip("\"'") for name in ("left", "right"))
        factor = float(one["factor"] or 1.0)
        if re.fullmatch(_NUMBER, one["right"]):
            right, factor = float(right) * factor, 1.0
        if math.inf in (right, factor):
            raise RequestError(f"--require {one[0].strip()!r}: holds a number that is too large; {EXAMPLE}")
        found.append(Requirement(one[0].strip(), left, one["compare"], right, factor))
        if place == len(text):
            return found
        place += 1
