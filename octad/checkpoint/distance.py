"""How far a model's feed-forward nets are from another model's, and a mixture's experts from each other.

    found = compare(mixture, base)
    found.experts[3].mean, found.pairs[0][5], found.verdict

The distance of an expert W from its counterpart B in a layer is ||W - B|| / ||B|| over gate, up and down together: 0 for
a copy, a few percent for a fine-tune, sqrt(2) for two independent nets of equal norm. Against a dense model the
counterpart is that layer's net, against a mixture the expert of the same number; a dense model counts as one expert. Two
experts of a mixture are compared likewise, by the root mean square of their two norms.

Memory is one projection of one layer of all experts, and one tensor of the other model: weights are read in that order
and never twice. Differences are taken directly, not through a Gram matrix, so that copies come out as exactly 0; that is
(E - 1) / 2 differences for every value read, of which a core makes about 4e9 a second.

Shapes: E experts, N values of one projection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from functools import partial
from itertools import combinations
from statistics import fmean

import torch

from octad.checkpoint.names import EMBEDDING, HEAD, PARTS, dense_mlp_name, expert_name, part_of, tensor_plan
from octad.checkpoint.source import TensorSource
from octad.errors import CheckpointError
from octad.model.config import ModelConfig
from octad.model.families import Part
from octad.telling import Progress

NEAR_COPY = 1e-3  # two experts closer than this do the same work
RELATED = 0.5  # farther than this, a net is no fine-tune of the other
COMMON_ORIGIN = 0.1  # a cosine that independent weights do not reach
CHUNK = (
    1 << 15
)  # values of each expert compared at a time: a few stay in cache, and float32 sums stay exact enough
_ROUTING = re.compile(r"\.(?:mlp|block_sparse_moe)\.(?:gate|shared_expert|shared_expert_gate)\.")


@dataclass(frozen=True)
class ExpertDistance:
    """One expert beside its counterpart: relative distance per compared layer, and the means over layers."""

    layers: tuple[float, ...]
    mean: float
    cosine: float


@dataclass(frozen=True)
class NearCopy:
    """Two experts closer than NEAR_COPY; `equal` where every value is the same."""

    first: int
    second: int
    distance: float
    equal: bool


@dataclass(frozen=True)
class Comparison:
    """A model beside another. `layers`: those with compared nets; `pairs` [E, E]: mean over layers; `shared`: the
    distance of each other part (attention, norms, embeddings, ...), over all of its tensors."""

    against: str
    layers: tuple[int, ...]
    experts: tuple[ExpertDistance, ...]
    pairs: tuple[tuple[float, ...], ...]
    near_copies: tuple[NearCopy, ...]
    shared: dict[str, float]
    verdict: str


def compare(source: TensorSource, base: TensorSource, progress: Progress | None = None) -> Comparison:
    """The weights of `source` beside those of `base`. Vocabularies of two sizes are compared over the rows of both.

    Raises CheckpointError, one line, for models of different shapes, before any weight is read.
    """
    layers = compared_layers(source.config)
    check_comparable(source, base, layers)
    rows = []
    for done, layer in enumerate(layers):
        if progress:
            progress("comparing", done / (len(layers) + 1))
        rows.append(_layer_sums(source, base, layer))
    shared = shared_distances(source, base, layers)
    if progress:
        progress("comparing", 1.0)
    experts = tuple(_expert_distance([row.expert(e) for row in rows]) for e in range(len(rows[0].own)))
    pairs = _mean_pairs(rows)
    kind = describe_mixtures if base.config.is_moe else partial(describe, mixture=source.config.is_moe)
    verdict = kind(base.label, experts, shared)
    return Comparison(base.label, tuple(layers), experts, pairs, _near_copies(pairs), shared, verdict)


# ---- what is compared with what -----------------------------------------------------------------------------


def compared_layers(config: ModelConfig) -> list[int]:
    """The layers whose nets count as experts: those with a router, or of a dense model all."""
    layers = range(config.num_hidden_layers)
    return [layer for layer in layers if config.is_moe_layer(layer)] or list(layers)


def ffn_names(config: ModelConfig, layer: int, part: Part) -> list[str]:
    """One projection of a layer: of each expert in order, or of the one dense net."""
    if not config.is_moe_layer(layer):
        return [dense_mlp_name(layer, part)]
    return [expert_name(config.model_type, layer, e, part) for e in range(config.num_experts)]


def check_comparable(source: TensorSource, base: TensorSource, layers: Sequence[int]) -> None:
    """Raises CheckpointError naming the first thing in which the two models' shapes differ."""
    ours, theirs = source.config, base.config
    if theirs.is_moe and not ours.is_moe:
        raise CheckpointError(
            f"{source.label}: is dense, {base.label} a mixture of {theirs.num_experts} experts;"
            " compare the mixture against the dense model"
        )
    facts = [
        ("num_hidden_layers", ours.num_hidden_layers, theirs.num_hidden_layers),
        ("hidden_size", ours.hidden_size, theirs.hidden_size),
    ]
    if theirs.is_moe:
        facts += [("num_experts", ours.num_experts, theirs.num_experts)]
    for what, mine, other in facts:
        if mine != other:
            raise _misfit(source, base, what, mine, other)
    for layer in range(ours.num_hidden_layers):
        if theirs.is_moe and ours.is_moe_layer(layer) != theirs.is_moe_layer(layer):
            kinds = ("experts", "one dense net") if ours.is_moe_layer(layer) else ("one dense net", "experts")
            raise _misfit(source, base, f"feed-forward of layer {layer}", *kinds)
        if (mine := _width(ours, layer)) != (other := _width(theirs, layer)):
            raise _misfit(source, base, f"feed-forward width of layer {layer}", mine, other)
    _check_rest(source, base, layers)


def _check_rest(source: TensorSource, base: TensorSource, layers: Sequence[int]) -> None:
    """The same tensors of the same shapes outside the experts; the head and rows of the vocabulary are free."""
    both = base.config.is_moe
    mine, other = _rest(source.config, layers, routing=both), _rest(base.config, layers, routing=both)
    for name in [*mine, *other]:
        found, expected = mine.get(name), other.get(name)
        if name in (EMBEDDING, HEAD) or found == expected:
            continue
        shapes = [list(shape) if shape else "none" for shape in (found, expected)]
        raise _misfit(source, base, f"tensor {name}", *shapes)


def _rest(config: ModelConfig, layers: Sequence[int], *, routing: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that belongs to no expert; with `routing`, routers and shared experts too."""
    experts = {name for layer in layers for part in PARTS for name in ffn_names(config, layer, part)}
    plan = tensor_plan(config).items()
    return {n: shape for n, shape in plan if n not in experts and (routing or not _ROUTING.search(n))}


def _width(config: ModelConfig, layer: int) -> int:
    return config.moe_intermediate_size if config.is_moe_layer(layer) else config.intermediate_size


def _misfit(
    source: TensorSource, base: TensorSource, what: str, mine: object, other: object
) -> CheckpointError:
    return CheckpointError(
        f"{source.label}: cannot be compared with {base.label}: {what} is {mine} here, {other} there;"
        " give a model of the same shape"
    )


# ---- distances ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Squared norms of one layer, over gate, up and down, float64: of each expert [E], of its counterpart [E], of their
    difference [E], and of the difference of every two experts [E (E - 1) / 2]."""

    own: torch.Tensor
    base: torch.Tensor
    apart: torch.Tensor
    pairs: torch.Tensor

    def expert(self, e: int) -> tuple[float, float, float]:
        """Squared norms of expert e: its own, its counterpart's, their difference's."""
        return float(self.own[e]), float(self.base[e]), float(self.apart[e])


def _layer_sums(source: TensorSource, base: TensorSource, layer: int) -> _Sums:
    """Read one layer of both models, a projection of all experts at a time."""
    parts = []
    for part in PARTS:
        experts = [source.read(name) for name in ffn_names(source.config, layer, part)]
        theirs = ffn_names(base.config, layer, part)
        if len(theirs) == 1:
            beside = squares_to(experts, base.read(theirs[0]))
        else:
            rows = [squares_to([w], base.read(n)) for w, n in zip(experts, theirs, strict=True)]
            beside = torch.cat(rows, dim=1)
        parts.append(_Sums(beside[0], beside[1], beside[2], pair_squares(experts)))
        del experts  # before the next projection is read
    return _Sums(*(sum(getattr(p, key) for p in parts) for key in ("own", "base", "apart", "pairs")))


def square_sum(values: torch.Tensor, minus: torch.Tensor | None = None) -> float:
    """||x||^2 of all values, or ||x - minus||^2: summed in float32 over CHUNK values at a time (float64 where one is)."""
    tensors = [values] if minus is None else [values, minus]
    total = 0.0
    for block in _blocks(tensors):
        difference = block[0] if minus is None else block[0].sub_(block[1])
        total += float(difference.square_().sum())
    return total


def squares_to(tensors: Sequence[torch.Tensor], reference: torch.Tensor) -> torch.Tensor:
    """[3, E] float64: ||W||^2, ||B||^2 and ||W - B||^2 of each tensor W [N] beside the reference B [N]."""
    base = square_sum(reference)
    rows = [(square_sum(own), base, square_sum(own, reference)) for own in tensors]
    return torch.tensor(rows, dtype=torch.float64).T


def pair_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[E (E - 1) / 2] float64: ||W_i - W_j||^2 of every two tensors, in the order of itertools.combinations."""
    total = torch.zeros(math.comb(len(tensors), 2), dtype=torch.float64)
    if len(tensors) > 1:
        for block in _blocks(tensors):
            total += torch.pdist(block).double().square()
    return total


def _blocks(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors as rows [E, CHUNK], a block of columns at a time, in float32 (float64 where one of them is)."""
    exact = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if exact else torch.float32
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), CHUNK):
        yield torch.stack([row[start : start + CHUNK].to(dtype) for row in flat])


def cosines_from_mean(blocks: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """[E, E] float64: cosine of every two rows' differences from the mean of all, 1 for near copies (a distance below
    NEAR_COPY of their size); `blocks` are some columns [E, K] at a time. None where there are none."""
    gram, size = None, torch.zeros((), dtype=torch.float64)
    for block_EK in blocks:
        apart_EK = block_EK - block_EK.mean(0)
        size += block_EK.square().sum(dtype=torch.float64).cpu() / len(block_EK)
        part = (apart_EK @ apart_EK.T).double().cpu()
        gram = part if gram is None else gram + part
    if gram is None:
        return None
    square_E = gram.diagonal()
    norms = square_E.sqrt()
    cosine = gram / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)
    distance = (square_E[:, None] + square_E - 2 * gram).clamp(min=0)
    return torch.where(distance <= NEAR_COPY**2 * size, 1.0, cosine.clamp(-1, 1))


def shared_distances(source: TensorSource, base: TensorSource, layers: Sequence[int]) -> dict[str, float]:
    """||ours - theirs|| / ||theirs|| of each part outside the experts, read one tensor of each model at a time."""
    sums: dict[str, torch.Tensor] = {}
    for name in _rest(source.config, layers, routing=base.config.is_moe):
        other = EMBEDDING if name == HEAD and base.config.tie_word_embeddings else name
        squares = _squares_of(source, name, base, other)
        group = _shown(part_of(name))
        sums[group] = sums.get(group, 0) + squares
    if source.config.tie_word_embeddings and not base.config.tie_word_embeddings:
        sums["embeddings"] += _squares_of(source, EMBEDDING, base, HEAD)
    return {group: _ratio(float(apart), float(norm)) for group, (_, norm, apart) in sums.items()}


def _squares_of(source: TensorSource, name: str, base: TensorSource, other: str) -> torch.Tensor:
    """squares_to of two tensors [3], over the rows that both have."""
    rows = min(source.info(name).shape[0], base.info(other).shape[0])
    return squares_to([source.read(name)[:rows]], base.read(other)[:rows])[:, 0]


def _shown(part: str) -> str:
    """What a comparison calls a part: the head goes with the embeddings; a net that is no expert has its own name."""
    return {"head": "embeddings", "ffn": "dense feed-forward"}.get(part, part)


def _ratio(squared: float, norm: float) -> float:
    """sqrt(squared / norm); nothing beside nothing is no distance, something beside nothing is infinitely far."""
    if norm == 0:
        return 0.0 if squared == 0 else math.inf
    return math.sqrt(squared / norm)


def _expert_distance(layers: Sequence[tuple[float, float, float]]) -> ExpertDistance:
    """From one expert's squared norms (own, counterpart's, difference's) of each layer."""
    distances = tuple(_ratio(apart, other) for _, other, apart in layers)
    cosines = [(a + b - d) / (2 * math.sqrt(a * b)) if a * b else 0.0 for a, b, d in layers]
    return ExpertDistance(distances, fmean(distances), fmean(cosines))


def _mean_pairs(rows: Sequence[_Sums]) -> tuple[tuple[float, ...], ...]:
    """[E, E]: relative distance of every two experts, mean over layers."""
    count = len(rows[0].own)
    matrix = [[0.0] * count for _ in range(count)]
    for at, (i, j) in enumerate(combinations(range(count), 2)):
        norms = [float(row.own[i] + row.own[j]) / 2 for row in rows]
        mean = fmean(_ratio(float(row.pairs[at]), norm) for row, norm in zip(rows, norms, strict=True))
        matrix[i][j] = matrix[j][i] = mean
    return tuple(map(tuple, matrix))


def _near_copies(pairs: Sequence[Sequence[float]]) -> tuple[NearCopy, ...]:
    indices = combinations(range(len(pairs)), 2)
    return tuple(NearCopy(i, j, d, d == 0) for i, j in indices if (d := pairs[i][j]) < NEAR_COPY)


# ---- in words -----------------------------------------------------------------------------------------------


def describe(base: str, experts: Sequence[ExpertDistance], shared: dict[str, float], *, mixture: bool) -> str:
    """One sentence on where the model comes from."""
    means = [expert.mean for expert in experts]
    subject, verb = ("every expert", "is") if mixture else ("its feed-forward nets", "are")
    made = "upcycled" if mixture else "tuned"
    near = [mean for mean in means if mean <= RELATED]
    if not all(map(math.isfinite, means)):
        return _unjudged(base)
    if max(means) == 0 and not mixture and not any(shared.values()):
        return _copy(base)
    if max(means) == 0:
        return f"{subject} {verb} equal to {base}: {'copied from it' if mixture else 'its feed-forward is the same'}"
    if len(near) == len(means):
        return f"{subject} {verb} within {_percent(max(near))} % of {base}: {made} from it"
    if near:
        far = min(mean for mean in means if mean > RELATED)
        share = f"{len(near)} of {len(means)} experts are within {_percent(max(near))} % of {base}"
        return f"{share}, the others at a distance of {far:.1f} or more: {made} from it only in part"
    return _far(base, experts)


def describe_mixtures(base: str, experts: Sequence[ExpertDistance], shared: dict[str, float]) -> str:
    """One sentence on a mixture beside another one, each expert beside the one at its place. Nothing says which of the
    two was there first."""
    means = [expert.mean for expert in experts]
    near = [mean for mean in means if mean <= RELATED]
    if not all(map(math.isfinite, means)):
        return _unjudged(base)
    if max(means) == 0:
        other = [name for name, distance in shared.items() if distance]
        same = f"every expert equals the one at its place in {base}; what differs: {', '.join(other)}"
        return same if other else _copy(base)
    if not near:
        return _far(base, experts)
    beside = f"within {_percent(max(near))} % of the one at its place in {base}"
    if len(near) == len(means):
        return f"every expert is {beside}: both of one origin"
    far = min(mean for mean in means if mean > RELATED)
    return f"{len(near)} of {len(means)} experts are {beside}, the others at a distance of {far:.1f} or more"


def _unjudged(base: str) -> str:
    return f"cannot be judged: it or {base} holds weights that are zero or not finite numbers"


def _copy(base: str) -> str:
    return f"every weight equals {base}'s: a copy of it"


def _far(base: str, experts: Sequence[ExpertDistance]) -> str:
    """Of models whose nets are apart: whether their directions have something in common."""
    distance, cosine = (fmean(getattr(e, of) for e in experts) for of in ("mean", "cosine"))
    if cosine >= COMMON_ORIGIN:
        return f"far from {base} (distance about {distance:.1f}), but of one origin (cosine {cosine:.2f})"
    return f"unrelated to {base} (distance about {distance:.1f})"


def _percent(share: float) -> str:
    """A share in percent, rounded up to two digits, so that "within" stays true."""
    up = Context(prec=2, rounding=ROUND_CEILING)
    return f"{float(up.create_decimal(f'{100 * share:.4g}')):g}"
