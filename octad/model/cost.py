"""What a model costs: parameters, FLOPs and bytes, counted from its config. Imports no torch.

    parameters(config), parameters(config, active=True)          # in all, and of what one token passes through
    flops_per_token(config, context=512), prefill_flops(config, tokens=512), training_flops(config, sizes, window=512)
    kv_bytes_per_token(config), kv_bytes(config, [512.0, 80.0]), expected_experts(config, tokens=16)

A product of a token with a matrix is two FLOPs a weight; looking up an embedding is none; rotations and softmaxes are not
counted (below a thousandth). Attention is counted by the positions that a token sees, windows heeded.
Sources: Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) for 2 a weight forward and 4 backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from octad.model.config import ModelConfig

# of each weight that learns: a float32 master, its gradient and two moments
OPTIMIZER_BYTES = 16


# ---- parameters -------------------------------------------------------------------------------------------------


def attention_parameters(config: ModelConfig) -> int:
    """One layer's attention: projections, biases, norms of q and k."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = {"none": 0, "head": 2 * config.head_dim, "full": q + kv}[config.qk_norm]
    biases = (q + 2 * kv if config.qkv_bias else 0) + (config.hidden_size if config.o_bias else 0)
    return config.hidden_size * (2 * q + 2 * kv) + biases + norms


def attention_share(config: ModelConfig) -> float:
    """Of all parameters, the part that is attention's."""
    return config.num_hidden_layers * attention_parameters(config) / parameters(config)


def expert_parameters(config: ModelConfig) -> int:
    """One expert of one layer: gate, up and down projections."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def mlp_parameters(config: ModelConfig, layer: int, *, active: bool = False) -> int:
    """One layer's feed-forward part, router and shared expert included; with `active`, what one token uses of it."""
    d = config.hidden_size
    if not config.is_moe_layer(layer):
        biases = 2 * config.intermediate_size + d if config.mlp_bias else 0
        return 3 * d * config.intermediate_size + biases
    count = config.num_experts_per_tok if active else config.num_experts
    shared = config.shared_expert_intermediate_size
    return count * expert_parameters(config) + config.num_experts * d + (3 * d * shared + d if shared else 0)


def layer_parameters(config: ModelConfig, layer: int, *, active: bool = False) -> int:
    """One block: attention, feed-forward part, two norms."""
    return (
        attention_parameters(config) + 2 * config.hidden_size + mlp_parameters(config, layer, active=active)
    )


def embedding_parameters(config: ModelConfig) -> int:
    """The table of embeddings; the head is another one of this size, unless it is tied."""
    return config.vocab_size * config.hidden_size


def parameters(config: ModelConfig, *, active: bool = False) -> int:
    """All parameters, or with `active` those that one token passes through (a tied head counts once)."""
    tables = embedding_parameters(config) * (1 if config.tie_word_embeddings else 2)
    layers = range(config.num_hidden_layers)
    return tables + config.hidden_size + sum(layer_parameters(config, i, active=active) for i in layers)


def moe_layers(config: ModelConfig) -> int:
    """How many layers have a router."""
    return sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))


def routed_parameters(config: ModelConfig) -> int:
    """All experts of all layers: what expert parallelism spreads, and what off-loading leaves in slower memory."""
    return moe_layers(config) * config.num_experts * expert_parameters(config)


# ---- FLOPs ------------------------------------------------------------------------------------------------------


def score_flops(config: ModelConfig, layer: int, seen: float) -> float:
    """One token's attention over `seen` positions: scores and weighted values."""
    return 4 * config.num_attention_heads * config.head_dim * min(seen, config.window(layer) or seen)


def body_parameters(config: ModelConfig) -> int:
    """What a token is multiplied with below the head."""
    tables = embedding_parameters(config) * (1 if config.tie_word_embeddings else 2)
    return parameters(config, active=True) - tables


def flops_per_token(config: ModelConfig, context: int = 0) -> int:
    """Forward pass of one token that sees `context` positions, logits included."""
    matrices = body_parameters(config) + embedding_parameters(config)
    return 2 * matrices + sum(int(score_flops(config, i, context)) for i in range(config.num_hidden_layers))


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """A prompt of so many tokens: attention over what each position sees, logits of the last position only."""
    heads = 4 * config.num_attention_heads * config.head_dim
    seen = sum(positions_seen(tokens, config.window(layer)) for layer in range(config.num_hidden_layers))
    return 2 * body_parameters(config) * tokens + heads * seen + 2 * embedding_parameters(config)


def training_flops(config: ModelConfig, learning: Mapping[str, int], window: int) -> float:
    """A token's forward and backward pass in windows of so many positions: the products with the weights and with their
    transposes, and once more for the gradient of each matrix that learns (experts by the share that works).

    learning: the parameters' names and sizes; norms and biases count for nothing, an embedding only as a tied head."""
    active = config.num_experts_per_tok / config.num_experts if config.is_moe else 1.0
    counted = sum(
        size * (active if ".experts." in name else 1.0)
        for name, size in learning.items()
        if "embed_tokens" not in name or config.tie_word_embeddings
    )
    return 2 * flops_per_token(config, window // 2) + 2 * counted


def positions_seen(tokens: int, window: int | None) -> int:
    """1 + 2 + ... + tokens, each term at most the window."""
    w = min(tokens, window or tokens)
    return w * (w + 1) // 2 + (tokens - w) * w


# ---- bytes ------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes that one more token adds to the key/value cache over all layers."""
    return config.num_hidden_layers * _kv_row(config, itemsize)


def kv_bytes(config: ModelConfig, lengths: Iterable[float], itemsize: int = 2) -> float:
    """Bytes of keys and values of sequences of these lengths, which one step reads; a sliding layer has its window's."""
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    seen = sum(min(length, window or length) for length in lengths for window in windows)
    return _kv_row(config, itemsize) * seen


def _kv_row(config: ModelConfig, itemsize: int) -> int:
    return 2 * config.num_key_value_heads * config.head_dim * itemsize


def per_parameter(config: ModelConfig, rest: float, attention: float) -> float:
    """Bits or bytes of a mean parameter, where attention is kept at another precision than the rest."""
    return rest + attention_share(config) * (attention - rest)


def expected_experts(config: ModelConfig, tokens: float) -> float:
    """How many different experts of a layer a batch of tokens uses, on average, where every choice is as likely."""
    if not config.is_moe:
        return 0.0
    missed = float((1 - config.num_experts_per_tok / config.num_experts) ** tokens)
    return config.num_experts * (1 - missed)
