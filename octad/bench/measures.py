"""From measured seconds to figures: medians with their spread, shares of the machine's limits, ratios to the peers.

    figures = report(entry, options, limits)
    summary(contestants)

MBU: the bytes that a decoding step must read (weights in use as they lie in memory, keys and values), times steps a
second, over the read bandwidth: the best that was found (`mbu`), and that at the moment of each repeat (`mbu_now`),
which on a machine with neighbours may be half of it. MFU: the arithmetic that a prompt takes, times prompts a second,
over the peak of matrix products in the contestant's dtype (of its activations, where weights are quantised). What is
missing is null with the reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from octad.bench.cases import BITS, BenchOptions, Cell, Entry
from octad.bench.traffic import WeightBytes
from octad.machine import Limits
from octad.model import cost

NOISE = 0.97  # of a speed; what is nearer is as fast
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, extremes and all values, in the order measured."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found), "all": found}


def missing(reason: str) -> dict[str, Any]:
    """In the place of a spread: null, and why."""
    return {"median": None, "reason": reason}


def report(entry: Entry, options: BenchOptions, limits: Limits) -> dict[str, Any]:
    """One contestant's part of the results."""
    facts = dict(entry.contestant.facts)
    loaded = facts.pop("memory_loaded", {})
    memory = {"weights": facts.get("weight_bytes"), "resident": loaded.get("resident")}
    memory |= {"resident_peak": entry.memory.get("peak"), "device": loaded.get("device")}
    cells = [figures(entry, cell, limits) for cell in options.cells() if entry.wants(cell, options)]
    return {
        "name": entry.contestant.name,
        "system": entry.contestant.system,
        "role": entry.role,
        "quantize": entry.quantize,
        "variant": entry.variant,
        "dtype": entry.dtype,
        "experts_per_token": entry.shape.num_experts_per_tok or None,
        "failed": entry.reason,
        "facts": facts,
        "memory_bytes": memory,
        "limits": _limits(entry, limits),
        "cells": cells,
    }


def _limits(entry: Entry, limits: Limits) -> dict[str, float | None]:
    """What its shares are taken of: the best of the probes while it was measured."""
    if not limits.read[entry.probes]:
        return {}
    flops = limits.peak(entry.dtype or "", entry.probes)
    return {"read_bytes_per_s": limits.bandwidth(entry.probes), "matmul_flops_per_s": flops}


def figures(entry: Entry, cell: Cell, limits: Limits) -> dict[str, Any]:
    """One cell of one contestant."""
    found = entry.found.get(cell, [])
    head: dict[str, Any] = {"measure": cell.measure, "length": cell.length, "users": cell.users}
    reason = entry.reason or entry.failed.get(cell)
    if reason or not found:
        return head | {"tokens_per_s": missing(reason or "not measured")}
    if cell.measure == "prefill":
        speeds = spread(cell.length / f["seconds"] for f in found)
        times = [f["ttft"] for f in found if f["ttft"] is not None]
        ttft = (
            spread(times) if times else missing("this contestant's prompt is read without sampling a token")
        )
        return head | {"tokens_per_s": speeds, "ttft_s": ttft} | _mfu(entry, cell, speeds["median"], limits)
    speeds = spread(f["tokens"] / f["seconds"] for f in found)
    first = [statistics.median(f["ttft"]) for f in found if f["ttft"]]
    return head | {
        "tokens_per_s": speeds,
        "tpot_s": spread(f["seconds"] * cell.users / f["tokens"] for f in found),
        "ttft_s": spread(first) if first else missing("llama-bench does not tell"),
        **_mbu(entry, cell, speeds["median"], limits),
        **_store([f["expert_store"] for f in found if f.get("expert_store")]),
    }


def _store(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What experts on the disk cost: means of the repeats."""
    if not found:
        return {}
    return {"expert_store": {key: statistics.mean(f[key] for f in found) for key in found[0]}}


def _mfu(entry: Entry, cell: Cell, speed: float, limits: Limits) -> dict[str, Any]:
    """Model FLOPs utilisation: the arithmetic that the prompt takes, over the matrix-product peak of the dtype."""
    flops = cost.prefill_flops(entry.shape, cell.length)
    peak = limits.peak(entry.dtype or "", entry.probes)
    if peak is None:
        return {"flops": flops, "mfu": None, "mfu_reason": "the dtype that it multiplies in is not known"}
    return {"flops": flops, "mfu": flops * speed / cell.length / peak}


def _mbu(entry: Entry, cell: Cell, speed: float, limits: Limits) -> dict[str, Any]:
    """Model bandwidth utilisation: bytes that a step must read (weights in use, keys and values), over the limit."""
    if entry.role == "memory":
        return {"step_bytes": None, "mbu": None, "mbu_reason": "experts are read from the disk, too"}
    weights, distinct, why = step_weights(entry, cell)
    if weights is None:
        return {"step_bytes": None, "mbu": None, "mbu_reason": why}
    itemsize = ITEMSIZE.get(entry.dtype or "", 2)
    kv = statistics.mean(cost.kv_bytes(entry.shape, f["lengths"], itemsize) for f in entry.found[cell])
    needed = (weights + kv) / cell.users
    now = [(f["tokens"] / f["seconds"], f.get("read_bytes_per_s")) for f in entry.found[cell]]
    shares = [needed * tokens_per_s / read for tokens_per_s, read in now if read]
    return {
        "distinct_experts": distinct,
        "weight_bytes_per_step": weights,
        "kv_bytes_per_step": kv,
        "mbu": needed * speed / limits.bandwidth(entry.probes),
        "mbu_now": spread(shares) if shares else missing("the bandwidth was not taken beside it"),
    }


def step_weights(entry: Entry, cell: Cell) -> tuple[float | None, float | None, str | None]:
    """Bytes of weights that a step reads, different experts that it uses in a layer, or why that is not known."""
    facts, config = entry.contestant.facts, entry.shape
    if parts := facts.get("weight_bytes_by_use"):
        weights = WeightBytes(**parts)
        if not weights.num_experts:
            return weights.step(0), None, None
        one = config.num_experts_per_tok if cell.users == 1 else None
        distinct = one or entry.warm.get(cell, {}).get("distinct_experts")
        if distinct is None:
            return None, None, "how many experts a step of this batch uses was not seen"
        return weights.step(distinct), distinct, None
    if "weight_bytes" not in facts:
        return None, None, "this contestant does not tell the size of its weights"
    if cell.users > 1 and config.is_moe:
        return None, None, "how many experts a step of this batch uses is not known of this contestant"
    each = facts["weight_bytes"] / facts.get("parameters", cost.parameters(config))
    idle = 0 if config.tie_word_embeddings else cost.embedding_parameters(config)
    return each * (cost.parameters(config, active=True) - idle), None, None


# ---- ratios ------------------------------------------------------------------------------------------------------


def summary(contestants: Sequence[dict[str, Any]], context: int) -> dict[str, Any]:
    """Ratios of medians: octad over each peer (one user behind `context`, and each prompt length), the price of the
    mixture by quantisation, the tokens/s of a batch over those of one user, and where fewer bits are slower."""
    mine = [c for c in contestants if c["role"] == "model"]
    peers = [c for c in contestants if c["role"] == "peer"]
    one = ("decode", context, 1)
    lengths = [c["length"] for c in mine[0]["cells"] if c["measure"] == "prefill"] if mine else []
    return {
        "decode_over_peers": {m["name"]: _over(m, peers, one) for m in mine},
        "prefill_over_peers": {
            m["name"]: {str(n): _over(m, peers, ("prefill", n, 1)) for n in lengths} for m in mine
        },
        "price": _price(contestants, one),
        "batch_over_one": {m["name"]: _scaling(m) for m in mine},
        "slower_with_fewer_bits": slower(mine),
    }


def speed(contestant: Mapping[str, Any], key: tuple[str, int, int]) -> float | None:
    """The median tokens/s of a cell (measure, length, users); None where there is none."""
    for cell in contestant["cells"]:
        if (cell["measure"], cell["length"], cell["users"]) == key:
            found: float | None = cell["tokens_per_s"]["median"]
            return found
    return None


def ratio(a: float | None, b: float | None) -> float | None:
    """a over b, three decimals; None where either is missing."""
    return None if a is None or b is None else round(a / b, 3)


def slower(mine: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each thing that a quantisation does more slowly than the next one with more bits."""
    by_bits = sorted(mine, key=lambda m: -BITS[m["quantize"] or "none"])
    told = []
    for more, fewer in pairwise(by_bits):
        for cell in fewer["cells"]:
            key = (cell["measure"], cell["length"], cell["users"])
            if (times := ratio(speed(fewer, key), speed(more, key))) is not None and times < NOISE:
                what = Cell(*key)
                told.append(
                    f"{fewer['name']} is slower than {more['name']} at {what}: {times:.2f} of its speed"
                )
    return told


def _over(
    mine: dict[str, Any], peers: Sequence[dict[str, Any]], key: tuple[str, int, int]
) -> dict[str, float | None]:
    return {peer["name"]: ratio(speed(mine, key), speed(peer, key)) for peer in peers}


def _price(contestants: Sequence[dict[str, Any]], key: tuple[str, int, int]) -> dict[str, Any]:
    """By quantisation: the decode speed at top-1, top-2, ... over that of one dense member."""
    dense = {c["quantize"]: speed(c, key) for c in contestants if c["variant"] == "dense"}
    found: dict[str, Any] = {quantize: {} for quantize in dense}
    for c in contestants:
        if c["role"] != "peer" and c["quantize"] in dense and c["variant"] != "dense":
            label = c["variant"] if c["variant"] != "as made" else f"top-{c['experts_per_token']}"
            found[c["quantize"]][label] = ratio(speed(c, key), dense[c["quantize"]])
    return found


def _scaling(mine: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """By context, by users: tokens/s over those of one user behind the same context."""
    found: dict[str, dict[str, float | None]] = {}
    for cell in mine["cells"]:
        if cell["measure"] == "decode":
            alone = speed(mine, ("decode", cell["length"], 1))
            row = found.setdefault(str(cell["length"]), {})
            row[str(cell["users"])] = ratio(cell["tokens_per_s"]["median"], alone)
    return found


def nearest(contestant: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The peer to compare with: the only one, or of several (GGUF files) that whose weights take the most similar number
    of bits."""
    bits = BITS[contestant["quantize"] or "none"]
    if len(peers) < 2:
        return peers[0] if peers else None
    return min(peers, key=lambda p: abs(_bits(p) - bits))


def _bits(peer: Mapping[str, Any]) -> float:
    facts = peer["facts"]
    return 8 * facts["weight_bytes"] / facts["parameters"] if facts.get("parameters") else 16.0
