"""The verdict: what the numbers say, in words; nothing in it is said of a model that its figures do not say.

    verdict = make_verdict(comparison)      # {"headline", "sentences", "details", "questions", "worse_on", "advice"}

A question is answered "yes" or "no" only where the interval of the difference leaves no doubt and the difference is large
enough to matter (Settings.smallest); "same" says that it is certainly too small, and "unclear" is an answer. It is better
than every member only if it is better than each for certain. advice.py says what to try next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octad.evaluate.advice import advise
from octad.evaluate.compare import Comparison, Difference
from octad.figures import human, listed, percent, share

WHOM = {
    "oracle": "always knowing the right specialist",
    "soup": "averaging their weights",
    "ensemble": "running them all",
}


def make_verdict(found: Comparison) -> dict[str, Any]:
    """The report's "verdict": plain data."""
    asked = questions(found)
    worse = worse_on(found)
    return {
        "headline": headline(found, asked),
        "sentences": [s for s in sentences(found, worse) if s],
        "details": [_against(found, name) for name in _opponents(found)],
        "questions": asked,
        "worse_on": worse,
        "advice": advise(found),
    }


def questions(found: Comparison) -> list[dict[str, Any]]:
    """Better than every member, the soup, the ensemble, the oracle, each dense model? In the mean over domains."""
    asked = []
    if found.members and found.mixtures:
        hardest = found.difference(found.own, found.best_member())
        answer = hardest.answer
        if answer == "yes" and any(found.difference(found.own, m).answer != "yes" for m in found.members):
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
        "answer": answer or difference.answer,
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "relative": difference.relative,
        "against": difference.against,
    }


def worse_on(found: Comparison) -> list[dict[str, Any]]:
    """Where the mixture certainly needs more bits than the domain's best member, or than the soup: the largest loss
    first. What may be chance is not listed."""
    if not found.members or not found.mixtures:
        return []
    worse = []
    for domain in found.domains:
        for name, label in (("oracle", found.chosen[domain]), ("soup", "soup")):
            if name not in found.rows:
                continue
            difference = found.difference(found.own, name, domain)
            if difference.answer == "no":
                interval = difference.interval
                entry = {"difference": interval.value, "low": interval.low, "high": interval.high}
                worse.append({"domain": domain, "against": label, "relative": difference.relative} | entry)
    return sorted(worse, key=lambda entry: -float(entry["difference"]))


# ---- words -----------------------------------------------------------------------------------------------------


def headline(found: Comparison, asked: Sequence[dict[str, Any]]) -> str:
    """One sentence: how it stands to the best of its parts, to knowing the right one, and to whatever else beats it."""
    few = _few_documents(found)
    if not asked:
        mean = f"{found.mean(found.own):.4f} bits per byte"
        domains = _count(len(found.domains), "domain")
        return f"{found.own}: {mean} over {domains}{few}; there is nothing to compare it with."
    first = {"better than every member?", "better than the oracle?"}
    dense = {q["question"] for q in asked if q["against"] in found.of_kind("dense")}
    told = [q for q in asked if q["question"] in first | dense or q["answer"] == "no" or _soup_is_as_good(q)]
    told.sort(key=lambda q: (q["question"] not in first, q["question"] in dense))
    text = "; ".join(_standing(q, found) for q in told)
    return f"{text[:1].upper()}{text[1:]}{few}."


def _soup_is_as_good(question: dict[str, Any]) -> bool:
    """Then routing was not worth it, as far as anybody can tell."""
    return bool(question["against"] == "soup" and question["answer"] != "yes")


def _standing(question: dict[str, Any], found: Comparison) -> str:
    """8.6 % better than the best of its parts."""
    against = question["against"]
    whom = WHOM.get(against, against)
    if against in found.members:
        whom = "the best of its parts" + (f" ({against})" if question["answer"] != "yes" else "")
    size = share(abs(question["relative"]))
    return {
        "yes": f"{size} better than {whom}",
        "no": f"{size} worse than {whom}",
        "same": f"about as good as {whom}",
        "unclear": f"not to be told from {whom}",
    }[question["answer"]]


def _few_documents(found: Comparison) -> str:
    """Said in the headline, since it makes every interval too narrow."""
    facts = found.texts.facts()
    few = [f["name"] for f in facts if f["units"] != "documents"]
    if not few:
        return ""
    where = "each domain" if len(few) == len(facts) else listed(few)
    return f" (not for certain: fewer than five documents in {where})"


def _opponents(found: Comparison) -> list[str]:
    """The best member, then those that are made of all members, then dense models."""
    if not found.mixtures:
        return found.of_kind("dense")
    best = [found.best_member()] if found.members else []
    return [*best, *found.of_kind("soup", "ensemble", "oracle", "dense")]


def sentences(found: Comparison, worse: Sequence[dict[str, Any]]) -> list[str]:
    """Where not, what it does not hold of its members, at what price, with what certainty, and what is missing."""
    return [
        _where(found, worse),
        _lost(found),
        _price(found),
        _certainty(found),
        *map(_sentence, found.lineup.missing),
    ]


def _lost(found: Comparison) -> str:
    """What the mixture does not hold of its members."""
    parts = [f"{name} ({what})" for name, what in found.lineup.lost.items()]
    return f"Not in the mixture as its members had it: {'; '.join(parts)}." if parts else ""


def _against(found: Comparison, name: str) -> str:
    difference = found.difference(found.own, name)
    interval, level = difference.interval, percent(found.settings.level)
    label = (
        f"the best single member, {name}"
        if name in found.members
        else f"the {name}"
        if " " not in name
        else name
    )
    side = "below" if interval.value < 0 else "above"
    return (
        f"{percent(abs(difference.relative), 2)} {side} {label}: {interval.value:+.4f} bits per byte"
        f" ({level} interval {interval.low:+.4f} to {interval.high:+.4f})."
    )


def _where(found: Comparison, worse: Sequence[dict[str, Any]]) -> str:
    if not found.members or not found.mixtures:
        return ""
    against, domains = [w for w in worse if w["against"] != "soup"], _count(len(found.domains), "domain")
    if not against:
        return f"On none of {domains} is the domain's best member better for certain."
    parts = [f"{w['domain']} ({share(w['relative'])} behind {w['against']})" for w in against]
    return (
        f"The domain's best member is better for certain on {len(against)} of {domains}: {', '.join(parts)}."
    )


def _price(found: Comparison) -> str:
    """The mixture beside one member, or the model alone."""
    mine = found.rows[found.own].price
    if mine.total_parameters is None or mine.active_parameters is None:
        return ""
    text = f"Price: {human(mine.total_parameters)} parameters, {human(mine.active_parameters)} active a token"
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
    if found.settings.quantize:
        text += f"; all with weights rounded to {found.settings.quantize}"
    coarse = [f["name"] for f in facts if f["units"] != "documents"]
    if coarse:
        where = (
            "every domain has"
            if len(coarse) == len(facts)
            else f"{listed(coarse)} {'has' if len(coarse) == 1 else 'have'}"
        )
        text += (
            f", but {where} fewer than five: there parts of them are drawn, and the intervals are too narrow"
        )
    return text + "."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
