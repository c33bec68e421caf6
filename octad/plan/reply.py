"""The planner's two answers as plain data: how to train a model on a cluster, and how a machine serves it.

    answer = train_answer("8x220b", cluster, tokens=13e12, window=8192, batch=16e6)
    answer = serve_answer("mixture/", cluster, context=4096, users=1)
    answer["readings"][0]["plans"][0]["mfu"]

What people read and what --json prints are made of this one structure: bytes, seconds, FLOPs, dollars, kWh.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octad.model import cost
from octad.plan.hardware import Cluster, assumptions, find_cluster, reached
from octad.plan.memory import PRECISIONS, WEIGHTS, Memory, Precision, serving_memory
from octad.plan.search import Found, Plan, training_plans
from octad.plan.shapes import Reading
from octad.plan.step import Time, decode_time, offloaded_time, prefill_time, training_flops

HOUR = 3600.0
LLAMA_CPP = ("bf16", "q8_0", "q4_0")  # what it runs, also with experts on the host
Answer = dict[str, Any]


def train_answer(
    readings: list[Reading], cluster: Cluster, *, tokens: float, window: int, batch: float, limit: int = 5
) -> Answer:
    """Layouts, memory, time, money and energy of a training run, for every reading. Raises RecipeError."""
    found = [_train_reading(reading, cluster, tokens, window, batch, limit) for reading in readings]
    return {
        "question": "train",
        "hardware": hardware_facts(cluster),
        "tokens": tokens,
        "window": window,
        "batch": batch,
        "readings": found,
        "assumptions": _assumptions("training", "link", "overlap", "interleave", "usable", "power"),
    }


def _train_reading(
    reading: Reading, cluster: Cluster, tokens: float, window: int, batch: float, limit: int
) -> Answer:
    """Copies that share nothing are trained beside each other, each on its part of the nodes and of the tokens."""
    part = cluster if reading.copies == 1 else _part(cluster, reading.copies)
    own = reading.used / reading.copies
    found = training_plans(reading.config, part, window, batch * own, limit)
    plans = [_train_plan(plan, cluster, tokens * own, window, reading) for plan in found.plans]
    return _size(reading) | {
        "devices_a_copy": part.devices,
        "flops": tokens * reading.used * training_flops(reading.config, window),
        "capacity": found.capacity,
        "tried": found.tried,
        "plans": plans,
        "nearest": _nearest(found),
    }


def _part(cluster: Cluster, copies: int) -> Cluster:
    """A copy's share of the cluster, at least one node or one device."""
    if cluster.nodes >= copies:
        return Cluster(cluster.name, cluster.device, cluster.node, cluster.nodes // copies)
    return Cluster(cluster.name, cluster.device, max(1, cluster.devices // copies), 1)


def _nearest(found: Found) -> Answer | None:
    if found.plans or found.nearest is None:
        return None
    layout, memory = found.nearest
    return {"layout": str(layout), "memory": _memory(memory), "lacks": memory.total - found.capacity}


def _train_plan(plan: Plan, cluster: Cluster, tokens: float, window: int, reading: Reading) -> Answer:
    flops = training_flops(reading.config, window)
    seconds = tokens * flops / plan.time.flops * plan.time.total
    hours = seconds * cluster.devices / HOUR
    return {
        "layout": {
            "data": plan.layout.data,
            "expert": plan.layout.expert,
            "tensor": plan.layout.tensor,
            "pipeline": plan.layout.pipeline,
            "shard": plan.layout.shard,
            "micro": plan.layout.micro,
            "recompute": plan.layout.recompute,
        },
        "trainer": plan.layout.trainer,
        "why": plan.why,
        "memory": _memory(plan.memory),
        "step": _time(plan.time),
        "mfu": plan.mfu,
        "tokens_per_second": tokens / seconds * reading.copies / reading.used,
        "days": seconds / HOUR / 24,
        "device_hours": hours,
        **spent(cluster, hours),
    }


def spent(cluster: Cluster, hours: float) -> Answer:
    """Dollars (low, high) and kWh of device hours; None where the table does not know the price or the power."""
    device = cluster.device
    dollars = None if device.dollars is None else [hours * price for price in device.dollars.value]
    watts = None if device.watts is None else device.watts.value * reached("power")
    return {"dollars": dollars, "kwh": None if watts is None else hours * watts / 1000}


# ---- serving ----------------------------------------------------------------------------------------------------


def serve_answer(
    readings: list[Reading],
    cluster: Cluster,
    *,
    context: int,
    users: int,
    bits: str | None = None,
    host: Cluster | None = None,
) -> Answer:
    """Whether it fits and how fast it speaks, by precision, whole or with its experts in the host's memory."""
    host = host or find_cluster("desktop")
    precisions = (
        [PRECISIONS[bits]] if bits else [p for name, p in PRECISIONS.items() if _offered(name, cluster)]
    )
    return {
        "question": "serve",
        "hardware": hardware_facts(cluster),
        "host": None if cluster.device.unified else hardware_facts(host),
        "context": context,
        "users": users,
        "readings": [_serve_reading(r, cluster, host, context, users, precisions) for r in readings],
        "assumptions": _assumptions("decode", "layer", "prefill", "usable", "reduction", "overhead"),
    }


def _offered(name: str, cluster: Cluster) -> bool:
    """8-bit floats are for devices with arithmetic of their own."""
    return name != "fp8" or cluster.device.tflops is not None


def _serve_reading(
    reading: Reading, cluster: Cluster, host: Cluster, context: int, users: int, precisions: list[Precision]
) -> Answer:
    options = [
        option
        for precision in precisions
        for option in _serve_options(reading, cluster, host, context, users, precision)
    ]
    options.sort(key=lambda o: (not o["fits"], -(o["tokens_per_second"] or 0)))
    return _size(reading) | {
        "kv_bytes": cost.kv_bytes(reading.config, [float(context)]) * reading.used * users,
        "prefill_seconds": prefill_time(reading.config, cluster, context),
        "options": options,
    }


def _serve_options(
    reading: Reading, cluster: Cluster, host: Cluster, context: int, users: int, precision: Precision
) -> list[Answer]:
    config, capacity = reading.config, cluster.node * cluster.device.bytes * reached("usable")
    one = serving_memory(config, precision, context, users, overhead=reached("overhead_bytes") * cluster.node)
    held = Memory(
        {
            name: size * (reading.copies if name in WEIGHTS else reading.used)
            for name, size in one.parts.items()
        }
    )
    seconds = decode_time(config, precision, cluster, context, users).total * reading.used
    whole = _option(
        precision, "all on the device", engine(precision, cluster), held, capacity, seconds, users
    )
    beside = config.is_moe and precision.name in LLAMA_CPP and not cluster.device.unified
    if whole["fits"] or not beside or cluster.node > 1 or reading.copies > 1:
        return [whole]
    moved = held.parts["experts"]
    rest = Memory({name: size for name, size in held.parts.items() if name != "experts"})
    seconds = offloaded_time(config, precision, cluster, host, context, users).total
    away = _option(precision, "experts on the host", "llama.cpp --cpu-moe", rest, capacity, seconds, users)
    return [whole, away | {"host_bytes": moved}]


def engine(precision: Precision, cluster: Cluster) -> str:
    """Who runs it best there."""
    if precision.name in LLAMA_CPP[1:]:
        return "llama.cpp"
    if cluster.device.unified:
        return "octad"
    return "vLLM"  # octad's own int8 and int4 only save memory there


def _option(
    precision: Precision, place: str, runner: str, memory: Memory, capacity: float, seconds: float, users: int
) -> Answer:
    fits = memory.total <= capacity
    return {
        "precision": precision.name,
        "place": place,
        "engine": runner,
        "memory": _memory(memory),
        "capacity": capacity,
        "fits": fits,
        "seconds_per_token": seconds if fits else None,
        "tokens_per_second": users / seconds if fits else None,
    }


# ---- facts ------------------------------------------------------------------------------------------------------


def _size(reading: Reading) -> Answer:
    return {
        "label": reading.label,
        "note": reading.note,
        "parameters": reading.parameters,
        "active": reading.active,
        "copies": reading.copies,
        "used": reading.used,
    }


def hardware_facts(cluster: Cluster) -> Answer:
    """What was planned with, and which of its figures nobody checked."""
    return {
        "name": cluster.name,
        "title": cluster.device.title,
        "node": cluster.node,
        "nodes": cluster.nodes,
        "devices": cluster.devices,
        "unchecked": cluster.device.unchecked(),
    }


def _assumptions(*beginnings: str) -> Mapping[str, Any]:
    return {
        name: {"value": found.value, "why": found.why}
        for name, found in assumptions().items()
        if name.startswith(beginnings)
    }


def _memory(memory: Memory) -> Answer:
    return {"total": memory.total, "moment": memory.moment, "parts": dict(memory.parts)}


def _time(time: Time) -> Answer:
    return {"total": time.total, "parts": dict(time.parts)}
