"""Which file of a checkpoint each tensor goes into, and where: fixed by names, shapes and dtypes alone.

    shards, places = shard_layout(plan, 5e9)
    number, offset = places["lm_head.weight"]; shards[number].file

So tensors can be written in any order, by several processes too, before the first one is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octad.checkpoint.hf import SINGLE
from octad.checkpoint.shard import encode_header
from octad.checkpoint.source import TensorInfo


@dataclass(frozen=True)
class Shard:
    """A file of a checkpoint: its name, the bytes that open it, and how long it is."""

    file: str
    header: bytes
    size: int


def shard_layout(
    plan: Mapping[str, TensorInfo], max_shard_bytes: float
) -> tuple[list[Shard], dict[str, tuple[int, int]]]:
    """Shards, and for each tensor its shard's number and its offset there; a larger tensor than a shard gets its own."""
    groups: list[dict[str, TensorInfo]] = [{}]
    room = max_shard_bytes
    for name, info in plan.items():
        if info.nbytes > room and groups[-1]:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = info
        room -= info.nbytes
    shards: list[Shard] = []
    places: dict[str, tuple[int, int]] = {}
    for number, group in enumerate(groups):
        header, starts = encode_header(group)
        file = SINGLE if len(groups) == 1 else f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        shards.append(Shard(file, header, len(header) + sum(info.nbytes for info in group.values())))
        places.update({name: (number, start) for name, start in starts.items()})
    return shards, places
