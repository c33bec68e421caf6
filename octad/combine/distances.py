"""How far each member lies from the base, and if it differs in its feed-forward nets alone.

    found = measure(base, members)[3]
    found.groups["ffn"]              # ||member - base|| / ||base||, layer by layer
    found.same_shared_part           # True: attention, norms and embeddings are the base's, to the last bit

Distances come from BLOCKS evenly spaced blocks of BLOCK values of each tensor, so they cost the same at any size;
`margin` says how far off they may be. What decides if a mixture holds a member exactly is not sampled: where no sampled
value of the shared part differs, all its bytes are compared. An adapter's change is computed from its factors. What is
not on disk as it is (a GGUF file) has to be read whole: of such members, at most WHOLE_BYTES, on evenly spaced layers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from octad.checkpoint.extent import same_bytes
from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.names import EMBEDDING, HEAD, is_ffn, layer_of, part_of, tensor_plan
from octad.checkpoint.source import TensorInfo, TensorSource

BLOCKS, BLOCK = 32, 1 << 13
WHOLE_BYTES = 16e9


@dataclass(frozen=True)
class Distances:
    """groups[part]: one value a measured layer for 'ffn' and 'attention', one in all for 'norms' and 'embeddings'.

    margin: half the width of the 95 % interval of the least certain value, relative to it; 0 where nothing was sampled.
    same_shared_part: None where it was not looked at in every layer. same_ffn: no value of a feed-forward net differs.
    lost_share: the part of all squared change that lies outside feed-forward nets; None where nothing changed."""

    groups: dict[str, list[float]]
    margin: float
    same_shared_part: bool | None
    same_ffn: bool = False
    lost_share: float | None = None


@dataclass(frozen=True)
class _Part:
    """Of one tensor: ||member - base||^2 and ||base||^2 of each block seen, [n]; scale: all its values / those seen.

    Plain numbers: small tensors that stay would lie between the blocks' memory and keep it from being used again."""

    squares: list[float]
    norms: list[float]
    scale: float


@dataclass
class _Ledger:
    """What has been seen of one member."""

    names: set[str]
    parts: dict[tuple[str, int], list[_Part]] = field(default_factory=dict)
    differs: dict[bool, bool] = field(default_factory=lambda: {True: False, False: False})  # by is_ffn

    def add(self, name: str, part: _Part) -> None:
        """Enter a tensor under its group and, for the large groups, its layer."""
        group = part_of(name)
        layer = (layer_of(name) or 0) if group in ("ffn", "attention") else 0
        self.parts.setdefault((group, layer), []).append(part)
        if any(part.squares):
            self.differs[is_ffn(name)] = True


def measure(
    base: TensorSource, members: Sequence[TensorSource], tokens: int | None = None
) -> list[Distances]:
    """One entry a member. Of vocabularies, the rows of `tokens` (by default the base's) that a member has are compared.

    Reads; raises CheckpointError for a file that has become unreadable."""
    layers = measured_layers(base, members)
    ledgers = [_Ledger(set(member.names())) for member in members]
    untied = not all(source.config.tie_word_embeddings for source in (base, *members))
    for name in [*dict.fromkeys([*tensor_plan(base.config), *([HEAD] if untied else [])])]:
        if (layer := layer_of(name)) is not None and layer not in layers:
            continue
        _measure_tensor(name, base, members, ledgers, tokens)
    complete = len(layers) == base.config.num_hidden_layers
    return [
        _distances(ledger, complete or member is base)
        for member, ledger in zip(members, ledgers, strict=True)
    ]


def measured_layers(base: TensorSource, members: Sequence[TensorSource]) -> set[int]:
    """All layers, or where reading members whole would pass WHOLE_BYTES, evenly spaced ones."""
    names = list(tensor_plan(base.config))
    size = sum(base.info(name).nbytes for name in names)
    whole = [
        m
        for m in members
        if not isinstance(m, AdapterSource) and m is not base and m.extent(names[0]) is None
    ]
    step = max(1, math.ceil(size * len(whole) / WHOLE_BYTES))
    return set(range(0, base.config.num_hidden_layers, step))


def _measure_tensor(
    name: str,
    base: TensorSource,
    members: Sequence[TensorSource],
    ledgers: Sequence[_Ledger],
    tokens: int | None,
) -> None:
    """Enter one tensor of every member. A head tied to the embeddings is these."""
    info = base.info(_held(base, name))
    if name in (EMBEDDING, HEAD):
        have = [m.info(_held(m, name)).shape[0] for m in members]
        rows = min(info.shape[0], *have, *([tokens] if tokens else []))
        info = TensorInfo((rows, *info.shape[1:]), info.dtype)
    starts, count = _grid(info.numel)
    scale = info.numel / (len(starts) * count)
    ours = _blocks(base, _held(base, name), info, starts, count)
    norms = _squares(ours)
    unsure = []
    for member, ledger in zip(members, ledgers, strict=True):
        theirs = _held(member, name)
        if theirs not in ledger.names:
            continue
        if name == HEAD and member.config.tie_word_embeddings and base.config.tie_word_embeddings:
            continue
        if (known := _known_square(member, base, name)) is not None:
            squares = [known / scale / len(norms)] * len(norms)
        else:
            squares = _squares(_blocks(member, theirs, info, starts, count), ours)
        ledger.add(name, _Part(squares, norms, scale))
        if known is None and not ledger.differs[is_ffn(name)]:
            unsure.append((member, ledger))
    if len(starts) > 1:
        _compare(name, base, unsure, info.shape)


def _held(source: TensorSource, name: str) -> str:
    """What a source keeps a tensor under: a tied head is the embedding."""
    return EMBEDDING if name == HEAD and source.config.tie_word_embeddings else name


def _grid(numel: int) -> tuple[list[int], int]:
    """Where the blocks of a tensor begin, and their length: one block of all values for a small tensor."""
    if numel <= BLOCKS * BLOCK:
        return [0], numel
    return [place * (numel - BLOCK) // (BLOCKS - 1) for place in range(BLOCKS)], BLOCK


def _blocks(
    source: TensorSource, name: str, info: TensorInfo, starts: Sequence[int], count: int
) -> torch.Tensor:
    """The blocks [n, count] of a tensor, its rows being those that the base has too."""
    if (extent := source.extent(name)) is not None:
        return extent.blocks(starts, count)
    values = source.read(name)[: info.shape[0]].reshape(-1)
    return torch.stack([values[start : start + count] for start in starts])


def _squares(blocks: torch.Tensor, minus: torch.Tensor | None = None) -> list[float]:
    """||x||^2 of each block, or ||x - minus||^2: [n]; in float32, in float64 where one of them is."""
    given = [blocks] if minus is None else [blocks, minus]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    values = blocks.to(dtype, copy=True) if minus is None else blocks.to(dtype) - minus.to(dtype)
    return [float(value) for value in values.square_().sum(1)]


def _known_square(member: TensorSource, base: TensorSource, name: str) -> float | None:
    """||member - base||^2 of one tensor, where it is known without reading the member."""
    if member is base:
        return 0.0
    if isinstance(member, AdapterSource) and not (name == HEAD and _held(base, name) != _held(member, name)):
        if name not in member.changed():
            return 0.0
        if name in (EMBEDDING, HEAD):
            return None  # rows may have been added
        if factors := member.delta_factors(name):  # ||BA||^2 = <B'B, AA'>: no need to multiply it out
            a, b, scale = factors
            return scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
    return None


def _compare(
    name: str,
    base: TensorSource,
    unsure: Sequence[tuple[TensorSource, _Ledger]],
    shape: tuple[int, ...],
) -> None:
    """Whether a tensor of members that agreed so far is the base's throughout: on disk in one pass over all of them."""
    ours, kind = base.extent(_held(base, name)), is_ffn(name)
    on_disk = []
    for member, ledger in unsure:
        extent = member.extent(_held(member, name))
        if ours is not None and extent is not None and extent.info.dtype == ours.info.dtype:
            on_disk.append((ledger, extent.part(0, shape)))
        else:
            mine, other = (source.read(_held(source, name))[: shape[0]] for source in (base, member))
            ledger.differs[kind] |= not _equal(mine, other)
    if ours is not None:
        same = same_bytes(ours.part(0, shape), [extent for _, extent in on_disk])
        for (ledger, _), equal in zip(on_disk, same, strict=True):
            ledger.differs[kind] |= not equal


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The same values, whatever the dtypes."""
    dtype = torch.promote_types(ours.dtype, theirs.dtype)
    return torch.equal(ours.to(dtype), theirs.to(dtype))


def _distances(ledger: _Ledger, complete: bool) -> Distances:
    groups: dict[str, list[float]] = {}
    margin = 0.0
    for (group, _), parts in sorted(ledger.parts.items(), key=lambda item: item[0]):
        squared = sum(part.scale * sum(part.squares) for part in parts)
        norm = sum(part.scale * sum(part.norms) for part in parts)
        groups.setdefault(group, []).append(math.sqrt(squared / norm) if norm else 0.0)
        if squared and norm and math.isfinite(squared / norm):
            margin = max(margin, _margin(parts, squared, norm))
    changed = {True: 0.0, False: 0.0}
    for (group, _), parts in ledger.parts.items():
        changed[group == "ffn"] += sum(part.scale * sum(part.squares) for part in parts)
    total = sum(changed.values())
    return Distances(
        groups,
        margin,
        None if not ledger.differs[False] and not complete else not ledger.differs[False],
        not ledger.differs[True],
        changed[False] / total if total else None,
    )


def _margin(parts: Sequence[_Part], squared: float, norm: float) -> float:
    """1.96 standard errors of sqrt(squared / norm), relative: a ratio estimate from stratified blocks (delta method)."""
    variance = 0.0
    for part in parts:
        if len(part.squares) > 1:
            pairs = zip(part.squares, part.norms, strict=True)
            residual = [square - squared / norm * own for square, own in pairs]
            variance += part.scale**2 * len(residual) * statistics.variance(residual)
    return 1.96 * math.sqrt(variance) / (2 * squared)
