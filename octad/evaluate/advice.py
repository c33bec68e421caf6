"""What to try next: each line is the conclusion of a rule over the numbers, which it tells.

    for line in advise(comparison): ...

The rules look at where the mixture loses and at whom the router chose there. They know nothing of names but that a
member with a domain's name is that domain's specialist.

Shapes: L layers, G domains, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from octad.evaluate.bootstrap import Interval
from octad.evaluate.compare import Comparison

LOSS = 0.005  # of a domain's bits per byte: a smaller loss to its best member is not worth a retraining
NEAR_CHANCE = 1.5  # the own specialist's share over an even one: a router below it does not know the domains
DEAD = 0.25  # of an even share, in every domain
CHEAPER = 0.002  # relative loss at which fewer experts a token are as good


def advise(found: Comparison) -> list[str]:
    """Most important first; [] where there is nothing to say."""
    if not found.mixtures:
        return []
    rules = (_blind_router, _shuffled, _no_better_than_soup, _losing_domains, _other_top_k, _idle_experts, _more_text)
    return [line for rule in rules for line in rule(found)]


@dataclass(frozen=True)
class _Routing:
    """own: the specialist's share of its domain's choices, by domain; favourite: who gets most of them."""

    own: dict[str, float]
    favourite: dict[str, str]
    even: float

    @classmethod
    def of(cls, found: Comparison) -> _Routing | None:
        """None where the shares are not known, or no domain has a specialist."""
        experts = found.field.experts
        shares = {d: found.shares(d) for d in found.domains if d in experts}
        known = {d: s for d, s in shares.items() if s is not None}
        if not known:
            return None
        own = {d: s[experts.index(d)] for d, s in known.items()}
        favourite = {d: experts[max(range(len(s)), key=s.__getitem__)] for d, s in known.items()}
        return cls(own, favourite, 1 / len(experts))

    @property
    def mean_own(self) -> float:
        """Mean over the domains."""
        return sum(self.own.values()) / len(self.own)

    def most(self, k: int) -> float:
        """The largest share that one expert can have, with k of them a token."""
        return 1 / k


def _blind_router(found: Comparison) -> Iterator[str]:
    """The router does not send domains to their specialists, nor anywhere else in particular."""
    routing = _Routing.of(found)
    if routing is None or routing.mean_own > NEAR_CHANCE * routing.even or _is_shuffled(routing):
        return
    yield (
        f"the router does not know the domains: a domain's own specialist gets {routing.mean_own:.0%} of its choices,"
        f" an even spread would give it {routing.even:.0%}; fit the router anew (octad combine with router: ridge and"
        " calibration text of each domain)"
    )


def _shuffled(found: Comparison) -> Iterator[str]:
    """The router knows the domains, but sends them to the wrong experts."""
    routing = _Routing.of(found)
    if routing is None or not _is_shuffled(routing):
        return
    wrong = {d: name for d, name in routing.favourite.items() if name != d}
    pairs = ", ".join(f"{d} goes to {name}" for d, name in list(wrong.items())[:4])
    yield (
        f"experts and router do not belong together: {len(wrong)} of {len(routing.own)} domains go mainly to another"
        f" expert than their own ({pairs}); check the order of the experts, or fit the router anew"
    )


def _is_shuffled(routing: _Routing) -> bool:
    wrong = [d for d, name in routing.favourite.items() if name != d and routing.own[d] < routing.even]
    return len(routing.own) > 1 and len(wrong) > len(routing.own) / 2 and _concentrated(routing)


def _concentrated(routing: _Routing) -> bool:
    """Domains go to different experts: a favourite for each, not one for all."""
    return len(set(routing.favourite.values())) > len(routing.favourite) / 2


def _no_better_than_soup(found: Comparison) -> Iterator[str]:
    if "soup" not in found.rows:
        return
    difference = found.difference(found.own, "soup")
    if difference.interval.answer == "yes":
        return
    yield (
        f"routing gains nothing over averaging the weights ({difference.relative:+.2%} to the soup, which is one dense"
        " model): fit the router anew, or use the soup"
    )


def _losing_domains(found: Comparison) -> Iterator[str]:
    """Domains that their best member does better, for certain and by enough."""
    if not found.members:
        return
    for domain in found.domains:
        best = found.chosen[domain]
        difference = found.difference(found.own, "oracle", domain)
        if difference.relative > LOSS and difference.interval.answer == "no":
            yield f"{domain} is {difference.relative:.2%} above {best}: {_cure(found, domain, best)}"


def _cure(found: Comparison, domain: str, best: str) -> str:
    """What to try where a domain loses, by whom the router chose there."""
    better = [name for name in found.mixtures if name != found.own and _beats(found, name, found.own, domain)]
    shares = found.shares(domain)
    share = None if shares is None or best not in found.field.experts else shares[found.field.experts.index(best)]
    most = 1 / int(found.own.rpartition("-")[2])
    if share is not None and share < 0.75 * most:
        told = f"the router gives {best} {share:.0%} of its choices, of at most {most:.0%}"
        return f"{told}: retrain the router on {domain}, with more calibration text of it"
    if better:
        return f"{better[0]} is better there: try it, or tune the router on {domain} with fewer experts a token"
    return f"tune router and experts together on {domain} (octad train, repair)"


def _beats(found: Comparison, name: str, other: str, domain: str) -> bool:
    return found.difference(name, other, domain).interval.answer == "yes"


def _other_top_k(found: Comparison) -> Iterator[str]:
    """Another number of experts a token is better for certain, or as good and cheaper."""
    mine, own = found.rows[found.own].price.flops_per_token, found.own
    for name in found.mixtures:
        if name == own:
            continue
        difference, cost = found.difference(name, own), found.rows[name].price.flops_per_token
        price = "" if not cost or not mine else f" at {cost / mine:.2f} times the FLOPs"
        if difference.interval.answer == "yes":
            yield f"{name} is better for certain ({difference.relative:+.2%}{price}): set num_experts_per_tok to it"
        elif cost and mine and cost < mine and _at_most(difference.interval, CHEAPER * found.mean(own)):
            yield f"{name} is as good within {CHEAPER:.1%} ({difference.relative:+.2%}{price}): it is the cheaper one"


def _at_most(interval: Interval, bound: float) -> bool:
    return interval.high <= bound


def _idle_experts(found: Comparison) -> Iterator[str]:
    """Experts that no domain chooses, or that are nowhere the best."""
    experts = found.field.experts
    shares = [s for s in map(found.shares, found.domains) if s is not None]
    for e, name in enumerate(experts):
        most = max((s[e] for s in shares), default=None)
        never_best = found.members and name in found.members and name not in found.chosen.values()
        if most is not None and most < DEAD / len(experts):
            yield f"drop expert {name}: no domain gives it more than {most:.1%} of its choices"
        elif never_best and len(found.domains) >= len(experts):
            used = "" if most is None else f", and no domain gives it more than {most:.0%} of its choices"
            yield (
                f"expert {name} is the best member of no domain here{used}: judge it on text of its own, or drop it"
            )


def _more_text(found: Comparison) -> Iterator[str]:
    """What is unclear and could be told with more documents: the interval shrinks with their square root."""
    names = [*found.of_kind("soup", "ensemble", "oracle"), *([found.best_member()] if found.members else [])]
    factors = {}
    for name in names:
        interval = found.difference(found.own, name).interval
        if interval.answer == "unclear" and interval.value:
            factors[name] = ((interval.high - interval.low) / 2 / interval.value) ** 2
    near = {name: factor for name, factor in factors.items() if factor < 20}
    if near:
        name = min(near, key=near.__getitem__)
        yield (
            f"more held-out text would tell it from {name}: about {max(2, round(near[name] + 0.5))} times as many"
            " documents, if the difference stays as it is"
        )
