"""ModelConfig: everything that defines a decoder's shape and arithmetic, in the words of config.json.

    config = ModelConfig.from_dict(json.load(open("config.json")))
    config.num_parameters(), config.flops_per_token(512), config.kv_bytes_per_token()

One frozen dataclass serves the four dense families (llama, mistral, qwen2, qwen3) and the four sparse ones (mixtral,
qwen2_moe, qwen3_moe, olmoe). Families differ in a dozen switches (biases, q/k norms, where windows slide, how the router
normalises); from_dict resolves them once, so that nothing else in octad asks for the family by name. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from octad.errors import ConfigError

DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
FAMILIES = DENSE_FAMILIES + MOE_FAMILIES
LARGEST = {
    "num_hidden_layers": 10_000
}  # a file that claims more is damaged, and its list of tensors would not end
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

QKNorm = Literal["none", "head", "full"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and, for long contexts, the scaling and its parameters (as in rope_scaling)."""

    theta: float = 10000.0
    type: str = "default"
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RopeConfig:
        """Read `rope_theta` + `rope_scaling` (the older layout) or `rope_parameters` (transformers 5)."""
        scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = float(scaling.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        if kind not in ROPE_TYPES:
            raise ConfigError(
                f"config.json: rope scaling {kind!r} is not supported (supported: {', '.join(ROPE_TYPES)})"
            )
        if kind != "default" and "factor" not in scaling:
            raise ConfigError(f"config.json: rope scaling {kind!r} needs a 'factor'")
        if kind == "default":
            scaling = {}
        return cls(theta, kind, tuple(sorted(scaling.items())))

    def get(self, key: str, default: Any = None) -> Any:
        """A scaling parameter such as 'factor', or `default` where the file is silent."""
        return dict(self.parameters).get(key, default)

    def to_dict(self) -> dict[str, Any]:
        """The older layout, which every loader reads."""
        if self.type == "default":
            return {"rope_theta": self.theta, "rope_scaling": None}
        return {
            "rope_theta": self.theta,
            "rope_scaling": {"rope_type": self.type, **dict(self.parameters)},
        }


@dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of one decoder; field names as in config.json. Sizes are counts, not bytes."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = "none"
    clip_qkv: float | None = None
    sliding_window: int | None = None
    sliding_layers: frozenset[int] = frozenset()
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: frozenset[int] = frozenset()
    shared_expert_intermediate_size: int = 0
    torch_dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json. Raises ConfigError naming the key for what cannot be represented exactly."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ConfigError(
                f"config.json: model_type {family!r} is not supported (supported: {', '.join(FAMILIES)})"
            )
        if (act := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ConfigError(f"config.json: hidden_act {act!r} is not supported (supported: silu)")
        layers = _positive(raw, "num_hidden_layers")
        heads = _positive(raw, "num_attention_heads")
        hidden = _positive(raw, "hidden_size")
        kv_heads = int(raw.get("num_key_value_heads") or heads)
        head_dim = int(raw.get("head_dim") or hidden // heads)
        if heads % kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        window, sliding = _sliding(raw, layers)
        config = cls(
            model_type=family,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=int(raw.get("intermediate_size") or raw.get("moe_intermediate_size") or 0),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=int(raw.get("max_position_embeddings") or 2048),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_dict(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_window=window,
            sliding_layers=sliding,
            torch_dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "float32"),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=_ids(raw.get("eos_token_id")),
            raw=dict(raw),
            **_family_switches(family, raw),
            **_moe_switches(family, raw, layers),
        )
        if config.is_moe and not 1 <= config.num_experts_per_tok <= config.num_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok {config.num_experts_per_tok} must lie in 1..{config.num_experts}"
            )
        return config

    @property
    def is_moe(self) -> bool:
        """True where at least one layer has a router and experts."""
        return self.num_experts > 0

    def is_moe_layer(self, layer: int) -> bool:
        """True where this layer's feed-forward network is a mixture."""
        return self.is_moe and layer not in self.dense_layers

    def window(self, layer: int) -> int | None:
        """How many past positions (itself included) a token of this layer attends to; None for all."""
        return self.sliding_window if layer in self.sliding_layers else None

    # ---- counts ---------------------------------------------------------------------------------------------

    def attention_parameters(self) -> int:
        """Parameters of one layer's attention, norms of q and k included."""
        q, kv, d = (
            self.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
            self.hidden_size,
        )
        norms = {"none": 0, "head": 2 * self.head_dim, "full": q + kv}[self.qk_norm]
        return d * (2 * q + 2 * kv) + (q + 2 * kv if self.qkv_bias else 0) + (d if self.o_bias else 0) + norms

    def attention_share(self) -> float:
        """Of all parameters, the part that is attention's."""
        return self.num_hidden_layers * self.attention_parameters() / self.num_parameters()

    def expert_parameters(self) -> int:
        """Parameters of one expert of one layer (gate, up and down projections)."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def mlp_parameters(self, layer: int, *, active: bool = False) -> int:
        """Parameters of one layer's feed-forward part; with `active`, only those that one token uses."""
        d = self.hidden_size
        if not self.is_moe_layer(layer):
            return 3 * d * self.intermediate_size + (2 * self.intermediate_size + d if self.mlp_bias else 0)
        count = self.num_experts_per_tok if active else self.num_experts
        shared = self.shared_expert_intermediate_size
        return count * self.expert_parameters() + self.num_experts * d + (3 * d * shared + d if shared else 0)

    def num_parameters(self, *, active: bool = False) -> int:
        """All parameters, or with `active` those that one token passes through (tied head counted once)."""
        d, layers = self.hidden_size, range(self.num_hidden_layers)
        mlp = sum(self.mlp_parameters(layer, active=active) for layer in layers)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + d + len(layers) * (self.attention_parameters() + 2 * d) + mlp

    def flops_per_token(self, context: int = 0) -> int:
        """Forward FLOPs of one token that sees `context` positions: 2 per active matrix weight + attention scores."""
        matrices = self.num_parameters(active=True)
        if not self.tie_word_embeddings:
            matrices -= self.vocab_size * self.hidden_size
        scores = 0
        for layer in range(self.num_hidden_layers):
            seen = min(context, self.window(layer) or context)
            scores += 4 * self.num_attention_heads * self.head_dim * seen
        return 2 * matrices + scores

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one more token adds to the key/value cache over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value


def _positive(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key} must be a positive whole number, found {value!r}")
    if value > LARGEST.get(key, value):
        raise ConfigError(f"config.json: {key} is {value}, more than any model has; the file is damaged")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)


def _sliding(raw: Mapping[str, Any], layers: int) -> tuple[int | None, frozenset[int]]:
    """Which layers slide, by family: all (mistral, mixtral), from max_window_layers on (qwen), or as layer_types says."""
    window, family = raw.get("sliding_window"), raw["model_type"]
    if not window or family in ("llama", "olmoe"):
        return None, frozenset()
    if family.startswith("qwen") and not raw.get("use_sliding_window", False):
        return None, frozenset()
    if types := raw.get("layer_types"):
        sliding = {i for i, kind in enumerate(types[:layers]) if kind == "sliding_attention"}
    elif family in ("qwen2", "qwen3"):
        sliding = {i for i in range(layers) if i >= raw.get("max_window_layers", 28)}
    elif family == "qwen2_moe":
        sliding = {i for i in range(0, layers, 2) if i < raw.get("max_window_layers", 28)}
    else:
        sliding = set(range(layers))
    return (int(window), frozenset(sliding)) if sliding else (None, frozenset())


def _family_switches(family: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Biases, q/k norms and clipping of a family."""
    bias = bool(raw.get("attention_bias", False))
    match family:
        case "llama":
            return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}
        case "qwen2":
            return {"qkv_bias": True}
        case "qwen2_moe":
            return {"qkv_bias": bool(raw.get("qkv_bias", True))}
        case "qwen3" | "qwen3_moe":
            return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head"}
        case "olmoe":
            return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "full", "clip_qkv": raw.get("clip_qkv")}
        case _:
            return {}


def _moe_switches(family: str, raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Experts of a family: how many, how wide, which layers, how the router normalises."""
    if family not in MOE_FAMILIES:
        return {}
    per_tok = int(raw.get("num_experts_per_tok") or {"mixtral": 2, "qwen2_moe": 4}.get(family, 8))
    if family == "mixtral":
        return {
            "num_experts": int(raw.get("num_local_experts") or raw.get("num_experts") or 8),
            "num_experts_per_tok": per_tok,
            "moe_intermediate_size": _positive(raw, "intermediate_size"),
            "norm_topk_prob": True,
        }
    switches: dict[str, Any] = {
        "num_experts": int(raw.get("num_experts") or raw.get("num_local_experts") or 0),
        "num_experts_per_tok": per_tok,
        "norm_topk_prob": bool(raw.get("norm_topk_prob", False)),
    }
    if family == "olmoe":
        return switches | {"moe_intermediate_size": _positive(raw, "intermediate_size")}
    step = int(raw.get("decoder_sparse_step") or 1)
    only = set(raw.get("mlp_only_layers") or ())
    switches["moe_intermediate_size"] = _positive(raw, "moe_intermediate_size")
    switches["dense_layers"] = frozenset(i for i in range(layers) if i in only or (i + 1) % step)
    if family == "qwen2_moe":
        switches["shared_expert_intermediate_size"] = int(raw.get("shared_expert_intermediate_size") or 0)
    return switches
