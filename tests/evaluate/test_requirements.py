"""--require: its grammar, and what each side means."""

from types import SimpleNamespace
from typing import Any

import pytest

from octad.errors import RequestError
from octad.evaluate.requirements import Requirement, parse

BITS = {
    "a": {"a": 1.0, "b": 2.0, "other": 3.0},
    "b": {"a": 1.5, "b": 1.2, "other": 2.9},
    "soup": {"a": 1.3, "b": 1.6, "other": 2.8},
    "mixture top-2": {"a": 1.005, "b": 1.19, "other": 2.7},
}


class Found(SimpleNamespace):
    """What requirements ask of a comparison."""

    own, members, domains, rows = "mixture top-2", ["a", "b"], ["a", "b", "other"], BITS

    def value(self, name: str, domain: str = "mean") -> float:
        row = BITS[name]
        return sum(row.values()) / 3 if domain == "mean" else row[domain]

    def best_member(self, domain: str = "mean") -> str:
        return min(self.members, key=lambda name: self.value(name, domain))

    def specialist(self, domain: str) -> str:
        return domain if domain in self.members else self.best_member(domain)


LINEUP: Any = SimpleNamespace(names=list(BITS), members=["a", "b"], missing=["it is small"])


def checked(text: str) -> list[dict[str, Any]]:
    found: Any = Found()
    return [requirement.check(found) for requirement in parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean<=oracle", Requirement("mean<=oracle", "mean", "<=", "oracle")),
        (" every < member * 1.01 ", Requirement("every < member * 1.01", "every", "<", "member", 1.01)),
        ("mean>=2", Requirement("mean>=2", "mean", ">=", 2.0)),
        ("a>.5*2", Requirement("a>.5*2", "a", ">", 1.0)),
        ("french<='mixture top-1'", Requirement("french<='mixture top-1'", "french", "<=", "mixture top-1")),
        ('"a,b"<=dense x-1.5b', Requirement('"a,b"<=dense x-1.5b', "a,b", "<=", "dense x-1.5b")),
    ],
)
def test_grammar(text: str, expected: Requirement) -> None:
    assert parse(text) == [expected]
    assert parse(f"{text}, mean<=oracle") == [expected, Requirement("mean<=oracle", "mean", "<=", "oracle")]


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("", 1, "mean, every"),
        ("mean", 5, "<="),
        ("mean=oracle", 5, "<="),
        ("<=oracle", 1, "mean"),
        ("mean<=", 7, "oracle, member"),
        ("mean<=oracle*", 14, "a number"),
        ("mean<=oracle*big", 14, "a number"),
        ("mean<=oracle,", 14, "mean"),
        ("mean<=oracle every<=soup", 19, "a comma"),
        ("mean<=oracle*1.01x", 18, "a comma"),
    ],
)
def test_the_spot_of_a_mistake(text: str, place: int, expected: str) -> None:
    with pytest.raises(RequestError, match=f"at character {place} .*expected {expected}"):
        parse(text)


def test_no_number_is_infinite() -> None:
    """It would be a figure that JSON does not have."""
    for text in ("mean<=oracle*1e999", "mean<=1e999", "mean<=oracle, every<=9e307*9e307"):
        with pytest.raises(RequestError):
            parse(text)
    with pytest.raises(RequestError, match="'mean<=oracle\\*1e999': holds a number that is too large"):
        parse("mean<=oracle*1e999")


def test_what_the_sides_mean() -> None:
    """The best single member of the mean is b (5.6 / 3); a domain's own member is that of its name, else the best."""
    mean, every = checked("mean<=member*0.9, every<=member*1.01")
    case = mean["cases"][0]
    assert (case["right"], case["left_value"], case["right_value"]) == (
        "b * 0.9",
        pytest.approx(4.895 / 3),
        pytest.approx(5.6 / 3 * 0.9),
    )
    assert mean["holds"]
    assert [c["right"] for c in every["cases"]] == ["a * 1.01", "b * 1.01", "b * 1.01"]
    assert [c["holds"] for c in every["cases"]] == [True, True, True]
    (strict,) = checked("every<=member")
    assert [c["holds"] for c in strict["cases"]] == [False, True, True]
    assert not strict["holds"]
    assert [r["holds"] for r in checked("a<1.01, a<1.005, a<=1.005, a>=1.1, a>1")] == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_names_that_are_not_there() -> None:
    domains = ["a", "b", "other"]
    for requirement in parse("mean<=member, every<=soup, other<='mixture top-2', a<=3"):
        requirement.check_names(domains, LINEUP)
    with pytest.raises(RequestError, match=r"no 'welsh'.*mean, every, a, b, other"):
        parse("welsh<=soup")[0].check_names(domains, LINEUP)
    with pytest.raises(RequestError, match=r"no 'oracle' \(it is small\).*soup"):
        parse("mean<=oracle")[0].check_names(domains, LINEUP)
