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
_NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?")
_WORD = re.compile(r"""\s*("[^"]*"|'[^']*'|[^<>=*,"']+?)\s*(?=[<>=*,"']|$)""")
_COMPARE = re.compile(r"<=|>=|<|>")


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
    reader = _Reader(text)
    found = [reader.requirement()]
    while not reader.at_end():
        reader.take(",", "a comma or the end")
        found.append(reader.requirement())
    return found


class _Reader:
    """The text and how far it has been read."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def at_end(self) -> bool:
        return not self.text[self.place :].strip()

    def requirement(self) -> Requirement:
        """The next one: left, comparison, right, and perhaps a factor."""
        start = self.place
        left = self.word("mean, every or a domain's name")
        compare = self.match(_COMPARE, "<=, <, >= or >")
        right = self.word("oracle, member, soup, ensemble, a contestant's name or a number")
        factor = 1.0
        if self.text[self.place :].lstrip().startswith("*"):
            self.take("*", "*")
            factor = float(self.match(_NUMBER, "a number such as 1.01"))
        number = float(right) if _NUMBER.fullmatch(right) else None
        if number is not None:
            number, factor = number * factor, 1.0
        text = self.text[start : self.place].strip()
        return Requirement(text, left, compare, right if number is None else number, factor)

    def word(self, expected: str) -> str:
        return self.match(_WORD, expected).strip().strip("\"'")

    def take(self, what: str, expected: str) -> str:
        return self.match(re.compile(re.escape(what)), expected)

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        rest = self.text[self.place :]
        skipped = len(rest) - len(rest.lstrip())
        found = pattern.match(self.text, self.place + skipped)
        if not found or not found[0].strip():
            raise self.refused(self.place + skipped, expected)
        self.place = found.end()
        return found[0]

    def refused(self, place: int, expected: str) -> RequestError:
        spot = repr(self.text[place : place + 12]) if place < len(self.text) else "the end"
        return RequestError(f"--require: at character {place + 1} ({spot}): expected {expected}, {EXAMPLE}")
