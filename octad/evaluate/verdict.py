"""The verdict: what the numbers say, in words; nothing in it is said of a model that its figures do not say.

    verdict = make_verdict(comparison)      # {"headline", "sentences", "questions", "worse_on", "advice"}

A question is answered "yes" or "no" only where the interval of the difference leaves no doubt; "unclear" is an answer. It
is better than every member only if it is better than each for certain. advice.py says what to try next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octad.evaluate.advice import advise
from octad.evaluate.compare import Comparison, Difference


def make_verdict(found: Comparison) -> dict[str, Any]:
    """The report's "verdict": plain data."""
    asked = questions(found)
    worse = worse_on(found)
    return {
        "headline": headline(found, asked),
        "sentences": [s for s in sentences(found, worse) if s],
        "questions": asked,
        "worse_on": worse,
        "advice": advise(found),
    }


def questions(found: Comparison) -> list[dict[str, Any]]:
    """Better than every member, the soup, the ensemble, the oracle, each dense model? In the mean over domains."""
    asked = []
    if found.members and found.mixtures:
        hardest = found.difference(found.own, found.best_member())
        others = [found.difference(found.own, name).interval for name in found.members]
        answer = hardest.interval.answer
        if answer == "yes" and not all(interval.answer == "yes" for interval in others):
            answer = "unclear"
        asked.append(_question("better than every member?", hardest, answer))
    for name in found.of_kind("soup", "ensemble", "oracle", "dense"):
        label = f"better than {name}?" if name in found.of_kind("dense") else f"better than the {name}?"
        asked.append(_question(label, found.difference(found.own, name)))
    return asked


def _question(text: str, difference: Difference, answer: str | None = None) -> dict[str, Any]:
    interval = difference.interval
    return {
        "question": text,
        "answer": answer or interval.answer,
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "against": difference.against,
    }


def worse_on(found: Comparison) -> list[dict[str, Any]]:
    """Where the mixture needs more bits than the domain's best member, or than the soup: the largest loss first."""
    if not found.members or not found.mixtures:
        return []
    worse = []
    for domain in found.domains:
        for name, label in (("oracle", found.chosen[domain]), ("soup", "soup")):
            if name not in found.rows:
                continue
            interval = found.difference(found.own, name, domain).interval
            if interval.value > 0:
                worse.append(
                    {
                        "domain": domain,
                        "against": label,
                        "difference": interval.value,
                        "low": interval.low,
                        "high": interval.high,
                    }
                )
    return sorted(worse, key=lambda entry: -entry["difference"])


# ---- words -----------------------------------------------------------------------------------------------------


def headline(found: Comparison, asked: Sequence[dict[str, Any]]) -> str:
    """One line: what is beaten, what is not, what cannot be told."""
    mean = f"{found.mean(found.own):.4f} bits per byte"
    if not asked:
        return f"{found.own}: {mean} over {_count(len(found.domains), 'domain')}; there is nothing to compare it with."
    names = {a: [_whom(q) for q in asked if q["answer"] == a] for a in ("yes", "unclear", "no")}
    parts = [
        f"better than {_list(names['yes'])}" if names["yes"] else "",
        f"not to be told from {_list(names['unclear'])}" if names["unclear"] else "",
        f"worse than {_list(names['no'])}" if names["no"] else "",
    ]
    return f"{found.own} ({mean}): {', '.join(part for part in parts if part)}."


def _whom(question: dict[str, Any]) -> str:
    whom = question["question"].removeprefix("better than ").removesuffix("?")
    if whom == "every member" and question["answer"] != "yes":
        return f"the best member ({question['against']})"
    return str(whom)


def sentences(found: Comparison, worse: Sequence[dict[str, Any]]) -> list[str]:
    """By how much, with what certainty, where not, at what price, and what is missing."""
    told = [
        _against(found, name)
        for name in [
            *([found.best_member()] if found.members else []),
            *found.of_kind("soup", "ensemble", "oracle", "dense"),
        ]
        if found.mixtures or name in found.of_kind("dense")
    ]
    return [
        *told,
        _where(found, worse),
        _price(found),
        _certainty(found),
        *map(_sentence, found.lineup.missing),
    ]


def _against(found: Comparison, name: str) -> str:
    difference = found.difference(found.own, name)
    interval, level = difference.interval, f"{found.settings.level:.0%}"
    label = (
        f"the best single member, {name}"
        if name in found.members
        else f"the {name}"
        if " " not in name
        else name
    )
    side = "below" if interval.value < 0 else "above"
    return (
        f"{abs(difference.relative):.2%} {side} {label}: {interval.value:+.4f} bits per byte"
        f" ({level} interval {interval.low:+.4f} to {interval.high:+.4f})."
    )


def _where(found: Comparison, worse: Sequence[dict[str, Any]]) -> str:
    if not found.members or not found.mixtures:
        return ""
    against = [w for w in worse if w["against"] != "soup"]
    if not against:
        return f"On none of {_count(len(found.domains), 'domain')} is the domain's best member better."
    certain = [w for w in against if w["low"] > 0]
    parts = [
        f"{w['domain']} ({w['difference'] / found.value(w['against'], w['domain']):+.2%} over {w['against']}"
        f"{'' if w['low'] > 0 else ', not certain'})"
        for w in against
    ]
    return (
        f"The domain's best member is better on {len(against)} of {_count(len(found.domains), 'domain')}"
        f" ({len(certain)} for certain): {', '.join(parts)}."
    )


def _price(found: Comparison) -> str:
    """The mixture beside one member, or the model alone."""
    mine = found.rows[found.own].price
    if mine.total_parameters is None or mine.active_parameters is None:
        return ""
    text = f"Price: {_millions(mine.total_parameters)} parameters, {_millions(mine.active_parameters)} active a token"
    if mine.tokens_per_second:
        text += f", {mine.tokens_per_second:,.0f} tokens/s read here"
    if not found.members:
        return text + "."
    one = found.rows[found.best_member()].price
    if not one.total_parameters or not one.flops_per_token or mine.flops_per_token is None:
        return text + "."
    text += (
        f"; {mine.total_parameters / one.total_parameters:.1f} times one member's size,"
        f" {mine.flops_per_token / one.flops_per_token:.2f} times its FLOPs"
    )
    if one.tokens_per_second and mine.tokens_per_second:
        text += f", {mine.tokens_per_second / one.tokens_per_second:.2f} times its speed"
    return text + "."


def _certainty(found: Comparison) -> str:
    """How much text there was, and where the intervals know too little."""
    facts = found.texts.facts()
    documents, tokens = sum(f["documents"] for f in facts), sum(f["tokens"] for f in facts)
    text = (
        f"Judged on {_count(len(facts), 'domain')}, {documents:,} documents, {tokens:,} tokens;"
        " intervals are from drawing documents anew"
    )
    coarse = [f["name"] for f in facts if f["units"] != "documents"]
    if coarse:
        where = (
            "every domain has"
            if len(coarse) == len(facts)
            else f"{_list(coarse)} {'has' if len(coarse) == 1 else 'have'}"
        )
        text += (
            f", but {where} fewer than five: there parts of them are drawn, and the intervals are too narrow"
        )
    return text + "."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 1e6 else f"{count:,}"
