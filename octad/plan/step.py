"""Seconds, by part: of a training step, of a prompt, of a decoded token. A roofline: arithmetic, memory, links.

    step_time(reading, cluster, layout, window=4096, batch=4e6).total
    decode_time(config, precision, cluster, context=4096, users=1).total

Each part is work over a peak times what is reached of it (efficiencies.yaml). Exchanges that hide behind arithmetic count
with the share that does not. Where the hardware table does not know a figure, RecipeError says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octad.errors import RecipeError
from octad.model import cost
from octad.model.config import ModelConfig
from octad.plan.hardware import Cluster, reached
from octad.plan.layouts import Layout
from octad.plan.memory import Precision, Share, weight_bytes

WIDE = 4096  # hidden units of an expert, from which on its products are large


@dataclass(frozen=True)
class Time:
    """Seconds by part; `flops`: the model's own of one step over all devices (nothing recomputed)."""

    parts: Mapping[str, float]
    flops: float = 0.0

    @property
    def total(self) -> float:
        """All parts, one after another."""
        return sum(self.parts.values())


def training_flops(config: ModelConfig, window: int) -> float:
    """One token's forward and backward pass: three times the forward pass, half the window seen on average."""
    return 3.0 * cost.flops_per_token(config, window // 2)


def kind_of_products(config: ModelConfig, cluster: Cluster) -> str:
    """Which of the assumptions on training holds for a model."""
    if cluster.device.unified:
        return "training_cpu"
    if not config.is_moe:
        return "training_dense"
    return "training_moe" if config.moe_intermediate_size >= WIDE else "training_moe_narrow"


def micro_batches(layout: Layout, window: int, batch: float) -> int:
    """Of one replica in one step, at least one."""
    return max(1, round(batch / (layout.replicas * layout.micro * window)))


def step_time(config: ModelConfig, cluster: Cluster, layout: Layout, window: int, batch: float) -> Time:
    """One step over `batch` tokens, rounded to what the replicas can share. Raises RecipeError for unknown figures."""
    count = micro_batches(layout, window, batch)
    N = layout.micro * window  # of one replica, at a time
    tokens = count * N * layout.replicas
    flops = tokens * training_flops(config, window)
    peak = need(cluster, "tflops") * reached(kind_of_products(config, cluster))
    arithmetic = flops * (4 / 3 if layout.recompute else 1) / (layout.world * peak)
    hidden = reached("overlap") * arithmetic
    weights = _weights_seconds(config, cluster, layout, count)
    bubble = (layout.pipeline - 1) / (
        count * min(reached("interleave"), config.num_hidden_layers / layout.pipeline)
    )
    tensor = _tensor_seconds(config, cluster, layout, N * count)
    expert = _expert_seconds(config, cluster, layout, N * count)
    return Time(
        {
            "arithmetic": arithmetic,
            "pipeline bubble": bubble * (arithmetic + tensor + expert),
            "tensor exchange": tensor,
            "expert exchange": expert,
            "weights and gradients": max(0.0, weights - hidden),
        },
        flops,
    )


def _tensor_seconds(config: ModelConfig, cluster: Cluster, layout: Layout, tokens: int) -> float:
    """Two sums of the residual stream a block, forward and backward (arXiv 1909.08053), and again if recomputed."""
    if layout.tensor == 1:
        return 0.0
    passes = 6 if layout.recompute else 4
    volume = 2 * (layout.tensor - 1) / layout.tensor * 2 * tokens * config.hidden_size
    blocks = config.num_hidden_layers / layout.pipeline
    return passes * blocks * volume / rate(cluster, layout.tensor)


def _expert_seconds(config: ModelConfig, cluster: Cluster, layout: Layout, tokens: int) -> float:
    """Rows to their experts and back, forward and backward; nothing of it is assumed hidden."""
    if layout.expert == 1 or not config.is_moe:
        return 0.0
    passes = 6 if layout.recompute else 4
    away = (layout.expert - 1) / layout.expert
    volume = 2 * tokens * config.num_experts_per_tok * config.hidden_size * away / layout.tensor
    blocks = cost.moe_layers(config) / layout.pipeline
    return passes * blocks * volume / rate(cluster, layout.expert * layout.tensor)


def _weights_seconds(config: ModelConfig, cluster: Cluster, layout: Layout, count: int) -> float:
    """Gradients summed once a step; with FSDP weights are gathered twice and gradients summed for every micro-batch."""
    share, seconds = Share.of(config, layout), 0.0
    parts = ((share.dense, share.dense_replicas), (share.routed, share.routed_replicas))
    for parameters, replicas in parts:
        if replicas > 1 and parameters:
            away = (replicas - 1) / replicas
            gathers, sums = (2 * count, count) if layout.shard == "weights" else (1, 1)
            volume = away * parameters * (2 * gathers + 4 * sums)
            seconds += volume / rate(cluster, layout.world)
    return seconds


def rate(cluster: Cluster, group: int) -> float:
    """Bytes a second that exchanges in a group of devices reach. Raises RecipeError where the table does not know."""
    found = cluster.rate(group)
    if found is None:
        which = "link (between devices of a node)" if group <= cluster.node else "network (between nodes)"
        raise RecipeError(f"hardware {cluster.name}: its {which} is not known; give it with --hardware-file")
    return found * reached("link")


def need(cluster: Cluster, name: str) -> float:
    """A device's peak rate of arithmetic, FLOP/s. Raises RecipeError where the table does not know."""
    if (flops := cluster.device.flops) is None:
        raise RecipeError(
            f"hardware {cluster.name}: its {name} are not known; give them with --hardware-file"
        )
    return flops


# ---- serving ----------------------------------------------------------------------------------------------------


def decode_share(config: ModelConfig, precision: Precision, cluster: Cluster) -> float:
    """The part of the memory's bandwidth that decoding is assumed to reach."""
    if cluster.device.tflops is None:
        return reached("decode_cpu" if on_cpu(cluster) else "decode_unified")
    if not config.is_moe:
        return reached("decode_dense")
    return reached("decode_moe" if precision.rest >= 16 else "decode_moe_quantised")


def step_bytes(config: ModelConfig, precision: Precision, users: int) -> tuple[float, float]:
    """Weights that one decoding step reads: of experts (each once, however many users chose it), and of all else. Looking
    up an embedding reads next to nothing, the head is read whole."""
    parts = weight_bytes(config, precision)
    distinct = cost.expected_experts(config, users)
    experts = parts["experts"] * distinct / config.num_experts if config.is_moe else 0.0
    return experts, parts["attention and dense layers"] + (parts["head"] or parts["embeddings"])


def decode_time(
    config: ModelConfig,
    precision: Precision,
    cluster: Cluster,
    context: int,
    users: int,
    kv_itemsize: int = 2,
) -> Time:
    """One token of every user, weights divided over the devices of a node."""
    experts, rest = step_bytes(config, precision, users)
    bandwidth = cluster.node * cluster.device.bytes_per_second * decode_share(config, precision, cluster)
    layers = config.num_hidden_layers
    sums = 2 * layers * reached("reduction_seconds") if cluster.node > 1 else 0.0
    between = layers * reached("layer_seconds") if on_cpu(cluster) else 0.0
    return Time(
        {
            "experts": experts / bandwidth,
            "other weights": rest / bandwidth,
            "keys and values": cost.kv_bytes(config, [float(context)], kv_itemsize) * users / bandwidth,
            "sums between devices": sums,
            "between the products": between,
        }
    )


def on_cpu(cluster: Cluster) -> bool:
    """Whether a desktop's CPU decodes."""
    return cluster.device.tflops is None and cluster.name.startswith("desktop")


def offloaded_time(
    config: ModelConfig, precision: Precision, cluster: Cluster, host: Cluster, context: int, users: int
) -> Time:
    """One token of every user with all experts in the host's memory and computed there: hidden states travel, weights
    stay (llama.cpp's --cpu-moe)."""
    experts, rest = step_bytes(config, precision, users)
    device = cluster.device.bytes_per_second * decode_share(config, precision, cluster)
    slow = host.device.bytes_per_second * reached("decode_cpu")
    return Time(
        {
            "experts, on the host": experts / slow,
            "other weights": rest / device,
            "keys and values": cost.kv_bytes(config, [float(context)]) * users / device,
        }
    )


def prefill_time(config: ModelConfig, cluster: Cluster, tokens: int) -> float | None:
    """Seconds to the first token of a prompt alone, by its arithmetic; None where the arithmetic's peak is not known."""
    if cluster.device.flops is None:
        return None
    return cost.prefill_flops(config, tokens) / (cluster.node * cluster.device.flops * reached("prefill"))
