"""Bytes of memory, by part: of one rank that trains, and of one device that serves.

    training_memory(config, Layout(data=2, expert=8), window=2048).total
    serving_memory(config, bits=8, context=4096, users=16).parts

Training in bfloat16 as octad does it: bfloat16 weights, float32 masters, gradients and two moments of each that learns. A
rank's peak is what it always holds, the activations that are kept for the backward pass, one block at work, and the
weights that are gathered for it. What libraries reserve for themselves and fragmentation are not in it: the search leaves
room for them. Activations after Korthikanti et al. 2022 (arXiv 2205.05198), without scores (attention never writes them).

Letters: D model, F feed-forward hidden, A experts a token, V vocabulary, N tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octad.model import cost
from octad.model.config import ModelConfig
from octad.plan.layouts import Layout

WEIGHT, MASTER, GRADIENT, MOMENTS = 2, 4, 4, 8  # bytes of a parameter
LOGIT_SLICE = 512  # positions whose logits octad's loss has at one time
LOGIT_BYTES = 6  # elsewhere: a bfloat16 logit and its float32 gradient
PREFILL_CHUNK = 2048  # tokens of prompts that serving engines read at a time


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the moment when most are held."""

    parts: Mapping[str, float]
    moment: str = ""

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Share:
    """Parameters of one rank: what it computes with, of experts and of everything else, and over how many replicas each
    may be divided; `block`: of its largest block; `tables`: of embeddings, head and last norm."""

    dense: float
    routed: float
    block_dense: float
    block_routed: float
    tables: float
    dense_replicas: int
    routed_replicas: int

    @classmethod
    def of(cls, config: ModelConfig, layout: Layout) -> Share:
        """The fullest rank's."""
        layers, stages = config.num_hidden_layers, layout.pipeline
        own = -(-layers // stages)
        routed = cost.routed_parameters(config)
        count = 1 if config.tie_word_embeddings or stages > 1 else 2
        tables = (count * cost.embedding_parameters(config) + config.hidden_size) / layout.tensor
        body = (sum(cost.layer_parameters(config, i) for i in range(layers)) - routed) / layers
        block_dense = body / layout.tensor
        block_routed = routed / max(1, cost.moe_layers(config)) / (layout.expert * layout.tensor)
        mean_routed = routed / layers / (layout.expert * layout.tensor)
        return cls(
            own * block_dense + tables,
            own * mean_routed,
            block_dense,
            block_routed,
            tables,
            layout.replicas,
            layout.data,
        )

    @property
    def whole(self) -> float:
        """Parameters that this rank computes with."""
        return self.dense + self.routed

    @property
    def divided(self) -> float:
        """Parameters that are left of them where replicas divide them."""
        return self.dense / self.dense_replicas + self.routed / self.routed_replicas


def training_memory(
    config: ModelConfig,
    layout: Layout,
    window: int,
    micro_batches: int = 1,
    *,
    learns: float = 1.0,
    fused_norms: bool = True,
) -> Memory:
    """One rank's peak: at the first block of the backward pass (all activations are there), at the last (all gradients
    are), or in the optimiser's step. `micro_batches`: a step's, a rank; `learns`: the share of the weights that learn;
    `fused_norms`: see kept_values."""
    share, N = Share.of(config, layout), layout.micro * window
    state = share.whole if layout.shard == "nothing" else share.divided
    held = {
        "weights": WEIGHT * (share.divided if layout.shard == "weights" else share.whole),
        "masters": MASTER * state * learns,
        "moments": MOMENTS * state * learns,
    }
    gradients = (share.whole if layout.shard == "optimizer" else state) * learns
    before, own = _gradient_bytes(layout, micro_batches)
    passing = {"logits": _logits(config, layout, N), "exchange": _exchange(config, layout, N)}
    layers = -(-config.num_hidden_layers // layout.pipeline)
    kept = kept_values(config, layout, fused_norms=fused_norms)
    moments = [Memory(held | {"gradients": GRADIENT * gradients}, "optimiser's step")]
    for name, done in (
        ("first block of the backward pass", 0.0),
        ("last block of the backward pass", 1 - 1 / layers),
    ):
        parts = held | {"gradients": (before + own * done) * gradients}
        flying = layers * (1 - done) * min(layout.pipeline, micro_batches)
        parts |= _activations(config, layout, N, flying, kept)
        parts |= passing | {"gathered": _gathered(share, layout, learns, last=done > 0)}
        moments.append(Memory(parts, name))
    if layout.shard == "weights" and layout.replicas > 1:
        moments.append(
            Memory(held | _summing_tables(config, share, before, learns), "sum of the embeddings' gradients")
        )
    return max(moments, key=lambda m: m.total)


def _gradient_bytes(layout: Layout, micro_batches: int) -> tuple[int, int]:
    """Of a gradient, what earlier micro-batches have left, and what this backward pass adds: octad's gradients are in the
    model's precision until they are collected in float32."""
    if layout.shard == "optimizer":
        return GRADIENT, 0
    return (GRADIENT if micro_batches > 1 else 0), WEIGHT


def _activations(config: ModelConfig, layout: Layout, N: int, blocks: float, kept: float) -> dict[str, float]:
    """What `blocks` blocks keep for the backward pass, and what one needs while its own runs."""
    held = config.hidden_size / layout.tensor if layout.recompute else kept
    again = kept if layout.recompute else 0.0
    return {
        "activations": 2.0 * N * blocks * held,
        "block at work": 2.0 * N * (again + work_values(config, layout)),
    }


def kept_values(config: ModelConfig, layout: Layout, *, fused_norms: bool = True) -> float:
    """Values of 16 bits that a token leaves in one block for its backward pass. Without a fused kernel for norms, as on
    CPUs, each keeps its input and its result in float32 too."""
    D, A = config.hidden_size, max(1, config.num_experts_per_tok)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = (4 if fused_norms else 12) * D  # two inputs, two results
    attention = norms + 2 * q + 2 * kv  # q, k, v and what attention gives
    if not config.is_moe:
        return (attention + 4 * config.intermediate_size) / layout.tensor
    rows = A * (D + 2 * config.moe_intermediate_size)  # sorted by expert: their inputs, gate and up
    travelled = A * D if layout.expert > 1 else 0
    return (attention + rows + travelled + 4 * config.shared_expert_intermediate_size) / layout.tensor


def work_values(config: ModelConfig, layout: Layout) -> float:
    """Values a token that come and go while a block's backward pass runs: gradients of its rows, of one expert's hidden
    ones at a time."""
    if not config.is_moe:
        return (4 * config.hidden_size + 3 * config.intermediate_size) / layout.tensor
    mine = config.num_experts / layout.expert
    hidden = 3 * config.num_experts_per_tok * config.moe_intermediate_size / mine
    return (4 * config.num_experts_per_tok * config.hidden_size + hidden) / layout.tensor


def _gathered(share: Share, layout: Layout, learns: float, *, last: bool) -> float:
    """FSDP: one block's weights and gradients, what is fetched early of the next, and the tables for the whole of a pass.

    Gradients are float32 while they are summed, which the last block's wait for. Experts that are dealt out over ranks
    are gathered by themselves, and let go before their gradients are summed. Otherwise they are a part of the block, and
    their stacks' gradients are copied first."""
    if layout.shard != "weights" or layout.replicas == 1:
        return 0.0
    tables = WEIGHT * share.tables
    apart = layout.expert > 1
    routed = share.block_routed if share.routed_replicas > 1 else 0.0
    block, together = share.block_dense + routed, share.block_dense + (0.0 if apart else routed)
    if not last:
        return WEIGHT * (1 + learns) * block + WEIGHT * together + tables
    copied = 0.0 if apart else WEIGHT * routed * learns
    return (WEIGHT + GRADIENT) * learns * block + WEIGHT * together + copied + tables


def _summing_tables(config: ModelConfig, share: Share, before: int, learns: float) -> dict[str, float]:
    """FSDP at the end of a backward pass: embeddings and head are still whole, with one's gradient, and both gradients in
    float32 to be summed; the blocks' are all there."""
    blocks = share.divided - share.tables / share.dense_replicas
    return {
        "gradients": learns
        * (before * share.divided + WEIGHT * (blocks + cost.embedding_parameters(config))),
        "gathered": WEIGHT * share.tables + GRADIENT * learns * share.tables,
    }


def _logits(config: ModelConfig, layout: Layout, N: int) -> float:
    """Octad's loss makes a slice of logits at a time, and the head's gradient in the model's precision."""
    if layout.trainer == "octad":
        return WEIGHT * float(min(N, LOGIT_SLICE) * config.vocab_size + cost.embedding_parameters(config))
    return LOGIT_BYTES * N * config.vocab_size / layout.tensor


def _exchange(config: ModelConfig, layout: Layout, N: int) -> float:
    """Rows that leave and arrive where experts live on several ranks."""
    if layout.expert == 1 or not config.is_moe:
        return 0.0
    return 2 * 2 * N * config.num_experts_per_tok * config.hidden_size / layout.tensor


# ---- serving ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Bits a weight with its part of a scale: of feed-forward nets and experts, attention, embeddings, and the head."""

    name: str
    rest: float
    attention: float
    embedding: float
    head: float


# octad's int8 has a 16-bit scale for 64 weights, its int4 for 32; attention and head keep 8 bits, embeddings 16.
# That is what `octad quantize` writes; rounded on loading, a model has down projections and its first layers in 8 bits.
# llama.cpp's blocks of 32 weights have a 16-bit scale each.
PRECISIONS = {
    p.name: p
    for p in (
        Precision("bf16", 16, 16, 16, 16),
        Precision("fp8", 8, 8, 16, 16),
        Precision("int8", 8.25, 8.25, 16, 8.25),
        Precision("int4", 4.5, 8.25, 16, 8.25),
        Precision("q8_0", 8.5, 8.5, 8.5, 8.5),
        Precision("q4_0", 4.5, 4.5, 4.5, 4.5),
    )
}
WEIGHTS = ("experts", "attention and dense layers", "embeddings", "head")


def weight_bytes(config: ModelConfig, precision: Precision) -> dict[str, float]:
    """By WEIGHTS. Norms, biases and routers are small, and are kept in 16 bits. A tied head is the embeddings, unless it
    has another precision: then it is held a second time."""
    layers = range(config.num_hidden_layers)
    routed = cost.routed_parameters(config)
    attention = len(layers) * cost.attention_parameters(config)
    routers = cost.moe_layers(config) * config.num_experts * config.hidden_size
    norms = (2 * len(layers) + 1) * config.hidden_size
    table = cost.embedding_parameters(config)
    tables = table * (1 if config.tie_word_embeddings else 2)
    other = cost.parameters(config) - routed - attention - routers - norms - tables
    same = config.tie_word_embeddings and precision.head == precision.embedding
    body = attention * precision.attention + other * precision.rest + 16 * (routers + norms)
    sizes = (
        routed * precision.rest,
        body,
        table * precision.embedding,
        0 if same else table * precision.head,
    )
    return {name: bits / 8 for name, bits in zip(WEIGHTS, sizes, strict=True)}


def serving_memory(
    config: ModelConfig,
    precision: Precision,
    context: int,
    users: int,
    kv_itemsize: int = 2,
    overhead: float = 0.0,
) -> Memory:
    """Weights, keys and values of all users at full context (windows heeded), what a chunk of prompt needs while it is
    read, logits, and `overhead` of the engine."""
    N = min(PREFILL_CHUNK, max(context, users))
    A = max(1, config.num_experts_per_tok)
    width = config.moe_intermediate_size or config.intermediate_size
    chunk = 2 * N * (4 * config.hidden_size + A * (2 * config.hidden_size + 3 * width))
    return Memory(
        weight_bytes(config, precision)
        | {
            "keys and values": cost.kv_bytes(config, [float(context)], kv_itemsize) * users,
            "a chunk of prompt": float(chunk),
            "logits": 4.0 * users * config.vocab_size,
            "engine": overhead,
        }
    )
