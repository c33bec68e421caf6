"""What to try next: each line is the conclusion of a rule over the numbers, which it tells.

    for line in advise(comparison): ...

The rules look at where the mixture loses, at who is best there, and at whom the router chose. They know nothing of names.

Shapes: L layers, G domains, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from octad.evaluate.bootstrap import Interval
from octad.evaluate.compare import Comparison
from octad.figures import change, listed, percent, share

LOSS = 0.005  # of a domain's bits per byte: a smaller loss to its best member is not worth a retraining
NEAR_CHANCE = 0.25  # how far a best expert's share must be from an even one towards all that it can have
CLEAR = (
    0.01  # by how much a domain's best member must be ahead to say where the router should send the domain
)
DEAD = 0.25  # of an even share, in every domain
CHEAPER = 0.002  # relative loss at which fewer experts a token are as good


def advise(found: Comparison) -> list[str]:
    """Most important first; [] where there is nothing to say."""
    if not found.mixtures:
        return []
    rules = (
        _not_held,
        _blind_router,
        _shuffled,
        _no_better_than_soup,
        _losing_domains,
        _other_top_k,
        _idle_experts,
        _more_text,
    )
    return [line for rule in rules for line in rule(found)]


def _not_held(found: Comparison) -> Iterator[str]:
    """Members of which the mixture lacks something: no router can bring that back."""
    if found.lineup.lost:
        yield (
            f"the mixture lacks a part of {listed(list(found.lineup.lost))} (see above): combine with shared: mean or"
            " ties, tune all of it (octad train, repair), or make specialists that differ in their feed-forward"
            " nets alone (octad branch)"
        )


@dataclass(frozen=True)
class _Routing:
    """Over the domains that one member does clearly best: the share of the choices that this member gets there, and the
    expert that gets most of them. What an even spread would give is `even`."""

    own: dict[str, float]
    favourite: dict[str, str]
    best: dict[str, str]
    even: float

    @classmethod
    def of(cls, found: Comparison) -> _Routing | None:
        """None where the shares are not known, or no member is clearly the best of a domain."""
        experts, best = (
            found.lineup.experts,
            {d: name for d, name in found.chosen.items() if _clear(found, d)},
        )
        shares = {d: s for d in best if (s := found.shares(d)) is not None}
        if not shares:
            return None
        own = {d: s[experts.index(best[d])] for d, s in shares.items()}
        favourite = {d: experts[max(range(len(s)), key=s.__getitem__)] for d, s in shares.items()}
        return cls(own, favourite, best, 1 / len(experts))

    @property
    def mean_own(self) -> float:
        """Mean over the domains."""
        return sum(self.own.values()) / len(self.own)

    @property
    def wrong(self) -> dict[str, str]:
        """Domains that go to another expert than their best, which gets less than an even share."""
        return {d: n for d, n in self.favourite.items() if n != self.best[d] and self.own[d] < self.even}

    @property
    def shuffled(self) -> bool:
        """Most domains go to a wrong expert, and not all of them to the same: the router tells them apart."""
        several = len(set(self.favourite.values())) > len(self.favourite) / 2
        return len(self.own) > 1 and len(self.wrong) > len(self.own) / 2 and several


def _clear(found: Comparison, domain: str) -> bool:
    """Whether the domain's best member is ahead of all others by more than CLEAR."""
    first, *rest = sorted(found.bits[name][domain] for name in found.members)
    return bool(rest) and rest[0] > first * (1 + CLEAR)


def _blind_router(found: Comparison) -> Iterator[str]:
    """The router does not send domains to their best experts, nor anywhere else in particular."""
    routing = _Routing.of(found)
    if routing is None or routing.shuffled or found.difference(found.own, "oracle").answer == "yes":
        return
    most = _most(found)
    if most <= routing.even or routing.mean_own > routing.even + NEAR_CHANCE * (most - routing.even):
        return  # the first: every token is read by all, and there is nothing to choose
    yield (
        f"the router does not know the domains: the expert that is best on a domain gets {percent(routing.mean_own)} of"
        f" its choices, an even spread would give it {percent(routing.even)}; fit the router anew (octad combine with"
        " router: logistic and calibration text of each domain)"
    )


def _shuffled(found: Comparison) -> Iterator[str]:
    """The router knows the domains, but sends them to the wrong experts."""
    routing = _Routing.of(found)
    if routing is None or not routing.shuffled:
        return
    pairs = ", ".join(f"{d} to {n}, best is {routing.best[d]}" for d, n in list(routing.wrong.items())[:3])
    yield (
        f"experts and router do not belong together: {len(routing.wrong)} of {len(routing.own)} domains go mainly to"
        f" another expert than the one that is best on them ({pairs}); check the order of the experts, or fit the"
        " router anew"
    )


def _no_better_than_soup(found: Comparison) -> Iterator[str]:
    if "soup" not in found.rows:
        return
    difference = found.difference(found.own, "soup")
    if difference.answer == "yes":
        return
    yield (
        f"routing is not for certain better than averaging the weights ({change(difference.relative)} to the soup,"
        " which is one dense model): fit the router anew, or use the soup"
    )


def _losing_domains(found: Comparison) -> Iterator[str]:
    """Domains that their best member does better, for certain and by enough."""
    if not found.members:
        return
    routed: list[str] = []  # where the router is not to blame
    for domain in found.domains:
        difference = found.difference(found.own, "oracle", domain)
        if difference.relative > LOSS and difference.answer == "no":
            told = f"{domain} is {share(difference.relative)} above {found.chosen[domain]}"
            if cure := _cure(found, domain, found.chosen[domain]):
                yield f"{told}: {cure}"
            else:
                routed.append(told)
    if routed:
        yield f"{'; '.join(routed)}: tune router and experts together on such text (octad train, repair)"


def _cure(found: Comparison, domain: str, best: str) -> str:
    """What to try where a domain loses, by whom the router chose there; "" where it chose well."""
    better = [name for name in found.mixtures if name != found.own and _beats(found, name, found.own, domain)]
    shares, experts = found.shares(domain), found.lineup.experts
    given = None if shares is None or best not in experts else shares[experts.index(best)]
    most = _most(found)
    if given is not None and given < 0.75 * most:
        told = f"the router gives {best} {percent(given)} of its choices, of at most {percent(most)}"
        return f"{told}: retrain the router on {domain}, with more calibration text of it"
    if better:
        return (
            f"{better[0]} is better there: try it, or tune the router on {domain} with fewer experts a token"
        )
    return ""


def _most(found: Comparison) -> float:
    """The largest share of the choices that one expert can have, with some of them a token."""
    return 1 / int(found.own.rpartition("-")[2])


def _beats(found: Comparison, name: str, other: str, domain: str) -> bool:
    return found.difference(name, other, domain).answer == "yes"


def _other_top_k(found: Comparison) -> Iterator[str]:
    """Another number of experts a token is better for certain, or as good and cheaper."""
    mine, own = found.rows[found.own].price.flops_per_token, found.own
    for name in found.mixtures:
        if name == own:
            continue
        difference, cost = found.difference(name, own), found.rows[name].price.flops_per_token
        price = "" if not cost or not mine else f" at {cost / mine:.2f} times the FLOPs"
        apart = f"{change(difference.relative)}{price}"
        if difference.answer == "yes":
            yield f"{name} is better for certain ({apart}): set num_experts_per_tok to it"
        elif cost and mine and cost < mine and _at_most(difference.interval, CHEAPER * found.mean(own)):
            yield f"{name} is as good within {percent(CHEAPER, 1)} ({apart}): it is the cheaper one"


def _at_most(interval: Interval, bound: float) -> bool:
    return interval.high <= bound


def _idle_experts(found: Comparison) -> Iterator[str]:
    """Experts that no domain chooses, or that are nowhere the best."""
    experts = found.lineup.experts
    shares = [s for s in map(found.shares, found.domains) if s is not None]
    for e, name in enumerate(experts):
        most = max((s[e] for s in shares), default=None)
        never_best = found.members and name in found.members and name not in found.chosen.values()
        if most is not None and most < DEAD / len(experts):
            yield f"drop expert {name}: no domain gives it more than {percent(most, 1)} of its choices"
        elif never_best and len(found.domains) >= len(experts):
            used = "" if most is None else f" (the largest share that one gives it: {percent(most)})"
            own = "judge it on text of its own, or drop it"
            if name in found.domains:
                own = f"on {name}, {found.chosen[name]} is ahead; keep it for what was not judged here, or drop it"
            yield f"expert {name} is the best member of no domain here{used}: {own}"


def _more_text(found: Comparison) -> Iterator[str]:
    """What is unclear and could be told with more documents: the interval shrinks with their square root."""
    names = [*found.of_kind("soup", "ensemble", "oracle"), *([found.best_member()] if found.members else [])]
    factors = {}
    for name in names:
        difference = found.difference(found.own, name)
        interval = difference.interval
        if difference.answer == "unclear" and abs(interval.value) >= difference.smallest:
            factors[name] = ((interval.high - interval.low) / 2 / interval.value) ** 2
    near = {name: factor for name, factor in factors.items() if factor < 20}
    if near:
        name = min(near, key=near.__getitem__)
        whom = name if name in found.members else f"the {name}"
        yield (
            f"more held-out text would tell it from {whom}: about {max(2, round(near[name] + 0.5))} times as many"
            " documents, if the difference stays as it is"
        )
