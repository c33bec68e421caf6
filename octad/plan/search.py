"""Which layouts fit and which is quickest: every data x expert x tensor x pipeline of a cluster, ranked with reasons.

    plans = training_plans(reading, cluster, window=4096, batch=4e6)
    plans[0].layout, plans[0].seconds, plans[0].why

Parts of the grid that cannot work are left out (experts and layers that do not divide, tensor groups larger than a node);
what does not fit is counted, with the nearest miss, so that "nothing fits" says how much is lacking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from octad.errors import RecipeError
from octad.figures import percent
from octad.model.config import ModelConfig
from octad.plan.hardware import Cluster, reached
from octad.plan.layouts import Layout, Shard
from octad.plan.memory import Memory, training_memory
from octad.plan.step import Time, micro_batches, need, step_time

MICRO = (1, 2, 4, 8)
MOST_STAGES = 64
NEAR = 1.02  # of the best: as good as it


@dataclass(frozen=True)
class Plan:
    """One layout that fits, its memory and time, and why it stands where it does."""

    layout: Layout
    memory: Memory
    time: Time
    mfu: float
    why: str = ""

    @property
    def pace(self) -> float:
        """Seconds a FLOP of the model: steps of different layouts differ a little in their tokens."""
        return self.time.total / self.time.flops


@dataclass(frozen=True)
class Found:
    """Plans, quickest first; how many were tried; of those that do not fit the one that lacks least."""

    plans: tuple[Plan, ...]
    tried: int
    capacity: float
    nearest: tuple[Layout, Memory] | None

    def best_of(self, trainer: str) -> Plan | None:
        """The quickest that a trainer can run."""
        return next((plan for plan in self.plans if plan.layout.trainer == trainer), None)


def training_plans(config: ModelConfig, cluster: Cluster, window: int, batch: float, limit: int = 8) -> Found:
    """All layouts of a cluster that fit, the quickest `limit` of them and the best that octad itself trains. Raises
    RecipeError where nothing can be tried, or the hardware's figures are not known."""
    capacity = cluster.device.bytes * reached("usable")
    fitting, nearest, tried = list[Plan](), None, 0
    for layout in layouts(config, cluster, window, batch):
        tried += 1
        memory = training_memory(config, layout, window, micro_batches(layout, window, batch))
        if memory.total <= capacity:
            time = step_time(config, cluster, layout, window, batch)
            fitting.append(Plan(layout, memory, time, _mfu(time, cluster)))
        elif nearest is None or memory.total < nearest[1].total:
            nearest = layout, memory
    if not tried:
        raise RecipeError(
            f"{cluster.devices} devices cannot share batches of {batch:,.0f} tokens in windows of {window:,}: "
            "take fewer nodes or a larger --batch"
        )
    fitting.sort(key=lambda plan: (plan.pace, plan.memory.total))
    return Found(tuple(_explained(_distinct(fitting, limit))), tried, capacity, nearest)


def layouts(config: ModelConfig, cluster: Cluster, window: int, batch: float) -> Iterator[Layout]:
    """Every layout of all devices in which each replica has work."""
    world, layers = cluster.devices, config.num_hidden_layers
    heads = config.num_key_value_heads
    for tensor in (t for t in _divisors(world) if t <= cluster.node and heads % t == 0):
        for pipeline in (p for p in _divisors(world // tensor) if p <= min(MOST_STAGES, layers)):
            for expert in _divisors(world // tensor // pipeline):
                if config.num_experts % expert if config.is_moe else expert > 1:
                    continue
                data = world // tensor // pipeline // expert
                yield from _variants(Layout(data, expert, tensor, pipeline), window, batch)


def _variants(layout: Layout, window: int, batch: float) -> Iterator[Layout]:
    shards: tuple[Shard, ...] = ("optimizer",) if layout.pipeline > 1 else ("optimizer", "weights")
    if layout.replicas == 1:
        shards = ("nothing",)
    for shard in shards:
        for micro in MICRO:
            if layout.replicas * micro * window > batch:
                break
            for recompute in (False, True):
                yield Layout(
                    layout.data, layout.expert, layout.tensor, layout.pipeline, shard, micro, recompute
                )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n <= 4096 else _divisors_of_large(n)


def _divisors_of_large(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _mfu(time: Time, cluster: Cluster) -> float:
    return time.flops / (time.total * cluster.devices * need(cluster, "tflops"))


def _distinct(plans: list[Plan], limit: int) -> list[Plan]:
    """The best variant of each grid; the best that octad trains is among them."""
    best: dict[tuple[str, str], Plan] = {}
    for plan in plans:
        best.setdefault((str(plan.layout), plan.layout.trainer), plan)
    ranked = list(best.values())
    shown = ranked[:limit]
    own = next((plan for plan in ranked if plan.layout.trainer == "octad"), None)
    return shown if own is None or own in shown else [*shown, own]


def _explained(plans: list[Plan]) -> list[Plan]:
    return [Plan(p.layout, p.memory, p.time, p.mfu, _why(p, plans[0])) for p in plans]


def _why(plan: Plan, best: Plan) -> str:
    """What costs this plan most beside arithmetic; of others than the best, what costs more there."""
    spent = dict(plan.time.parts)
    if plan is best:
        worst = max((name for name in spent if name != "arithmetic"), key=lambda name: spent[name])
        share = spent[worst] / plan.time.total
        lost = f"loses most to {worst}: {percent(share)}" if share >= 0.01 else "arithmetic alone counts"
        return f"quickest; {lost}" + (", recomputes" if plan.layout.recompute else "")
    slower = plan.pace / best.pace
    if slower < NEAR:
        return "within 2 % of the quickest"
    steps = plan.time.flops / best.time.flops
    more = {name: seconds - best.time.parts[name] * steps for name, seconds in spent.items()}
    worst = max(more, key=lambda name: more[name])
    named = "recomputed activations" if worst == "arithmetic" else worst
    return f"{percent(slower - 1)} slower: {named}"
