"""ModelConfig: everything that defines a decoder's shape and arithmetic, in the words of config.json.

    config = ModelConfig.from_dict(json.load(open("config.json")))
    config.is_moe_layer(3), config.window(3), dense_config(config)

One frozen dataclass serves the four dense families (llama, mistral, qwen2, qwen3) and the four sparse ones (mixtral,
qwen2_moe, qwen3_moe, olmoe). Families differ in a dozen switches (biases, q/k norms, where windows slide, how the router
normalises): `families` lists them, from_dict resolves them once, and nothing else in octad asks for the family by name.
What it all costs is counted in `cost`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from octad.errors import ConfigError
from octad.model.families import FAMILIES, Family, QKNorm, Switch
from octad.model.keys import MOST_EXPERTS_IN_ALL, Keys, number, whole

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
ROPE_INERT = ("finetuned",)  # says how the model was made, not how it computes


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and, for long contexts, the scaling and its parameters (as in rope_scaling)."""

    theta: float = 10000.0
    type: str = "default"
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], theta: float = 10000.0) -> RopeConfig:
        """Read `rope_theta` + `rope_scaling` (the older layout) or `rope_parameters` (transformers 5); `theta` is the
        family's default. Raises ConfigError for what would turn positions in another way."""
        given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"config.json: rope scaling must be keys and values, found {ascii(given)[:60]}")
        scaling = dict(given)
        own = scaling.pop("rope_theta", None)
        theta = number("rope_theta", own if own is not None else _or(raw.get("rope_theta"), theta))
        kinds = [kind for key in ("rope_type", "type") if (kind := scaling.pop(key, None)) is not None]
        kind = kinds[0] if kinds else "default"
        if kind not in ROPE_TYPES:
            raise ConfigError(
                f"config.json: rope scaling {ascii(kind)[:60]} is not supported (supported: {', '.join(ROPE_TYPES)})"
            )
        scaling.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor"))
        parameters = _rope_parameters(scaling)
        if kind == "default":
            return cls(theta)
        if "factor" not in parameters:
            raise ConfigError(f"config.json: rope scaling {kind!r} needs a 'factor'")
        if kind in ("llama3", "yarn") and raw.get("max_position_embeddings") is not None:
            parameters.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
        return cls(theta, kind, tuple(sorted(parameters.items())))

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


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rope_parameters(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling's numbers. Raises ConfigError for a key that is not understood (kinds of layers, say)."""
    if (part := scaling.get("partial_rotary_factor")) not in (None, 1):
        raise ConfigError(
            f"config.json: partial_rotary_factor {ascii(part)[:60]} is not supported (only 1 is)"
        )
    found: dict[str, Any] = {}
    for key, value in scaling.items():
        if key in ROPE_NUMBERS and value is not None:
            number(key, value)
            found[key] = value
        elif key == "truncate" and isinstance(value, bool):
            found[key] = value
        elif value is not None and key not in (*ROPE_NUMBERS, *ROPE_INERT, "partial_rotary_factor"):
            raise ConfigError(f"config.json: rope scaling has {ascii(key)[:60]}, which is not supported")
    low, high = found.get("low_freq_factor", 1.0), found.get("high_freq_factor", 4.0)
    if low >= high:
        raise ConfigError(
            f"config.json: rope scaling's low_freq_factor {low} must be below its high_freq_factor {high}"
        )
    return found


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
        name = raw.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise ConfigError(
                f"config.json: model_type {ascii(name)[:60]} is not supported (supported: {', '.join(FAMILIES)})"
            )
        family = FAMILIES[name]
        keys = Keys(raw, family.defaults)
        if (act := keys.text("hidden_act", "silu")) not in ("silu", "swish"):
            raise ConfigError(f"config.json: hidden_act {ascii(act)[:60]} is not supported (supported: silu)")
        layers = keys.whole("num_hidden_layers")
        experts = _experts(family, keys, layers)
        window, sliding = _sliding(family, keys, layers)
        return cls(
            model_type=name,
            vocab_size=keys.whole("vocab_size"),
            intermediate_size=_dense_width(keys, experts),
            num_hidden_layers=layers,
            **_heads(keys),
            max_position_embeddings=keys.whole("max_position_embeddings"),
            rms_norm_eps=keys.number("rms_norm_eps"),
            rope=RopeConfig.from_dict(raw, family.defaults["rope_theta"]),
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            qkv_bias=_switch(keys, family.qkv_bias),
            o_bias=_switch(keys, family.o_bias),
            mlp_bias=_switch(keys, family.mlp_bias),
            qk_norm=family.qk_norm,
            clip_qkv=keys.number("clip_qkv")
            if family.clips_qkv and keys.get("clip_qkv") is not None
            else None,
            sliding_window=window,
            sliding_layers=sliding,
            **experts,
            torch_dtype=keys.text("torch_dtype", "") or keys.text("dtype", "") or "float32",
            bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
            eos_token_ids=keys.token_ids("eos_token_id"),
            raw=dict(raw),
        )

    @property
    def family(self) -> Family:
        """What the table says of this model's family."""
        return FAMILIES[self.model_type]

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


def dense_config(config: ModelConfig) -> ModelConfig:
    """The dense model that one expert of a mixture makes with the shared part, in the family that has such models; no
    router, no shared expert.

    Raises ConfigError where one such config cannot say it: layers without a router that have another width."""
    if config.dense_layers and config.intermediate_size != config.moe_intermediate_size:
        raise ConfigError(
            "layers with and without experts differ in width: there is no dense member to compare"
        )
    return replace(
        config,
        model_type=config.family.member or config.model_type,
        num_experts=0,
        num_experts_per_tok=0,
        intermediate_size=config.moe_intermediate_size,
        moe_intermediate_size=0,
        shared_expert_intermediate_size=0,
        dense_layers=frozenset(),
    )


def _heads(keys: Keys) -> dict[str, Any]:
    """Widths of the model and of attention."""
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    kv_heads = keys.nullable("num_key_value_heads")
    kv_heads = heads if kv_heads is None else whole("num_key_value_heads", kv_heads)
    if heads % kv_heads:
        given = "" if keys.raw.get("num_key_value_heads") else ", the family's default"
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}{given}"
        )
    if keys.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim"
        )
    head_dim = hidden // heads if keys.get("head_dim") is None else keys.whole("head_dim")
    if head_dim % 2:
        raise ConfigError(
            f"config.json: head_dim {head_dim} must be even: rotary positions turn pairs of values"
        )
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _switch(keys: Keys, switch: Switch) -> bool:
    return keys.flag(switch) if isinstance(switch, str) else switch


def _dense_width(keys: Keys, experts: Mapping[str, Any]) -> int:
    """The width of layers without experts; where there are none, the file need not tell."""
    if keys.get("intermediate_size") is None and experts and not experts["dense_layers"]:
        return int(experts["moe_intermediate_size"])
    return keys.whole("intermediate_size")


def _sliding(family: Family, keys: Keys, layers: int) -> tuple[int | None, frozenset[int]]:
    """The window, and the layers that have it: by the family's rule, or as layer_types says where the family heeds it."""
    if family.sliding == "never":
        return None, frozenset()
    on = keys.flag("use_sliding_window") if family.sliding_switch else True
    window = keys.nullable("sliding_window") if on else None
    sliding = _sliding_layers(family, keys, layers, window is not None)
    if window is None or not sliding:
        return None, frozenset()
    return whole("sliding_window", window), frozenset(sliding)


def _sliding_layers(family: Family, keys: Keys, layers: int, on: bool) -> set[int]:
    kinds = keys.items("layer_types", str) if family.layer_types else ()
    if kinds:
        if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise ConfigError(
                f"config.json: layer_types must name sliding_attention or full_attention for each of {layers} layers"
            )
        if not on and "sliding_attention" in kinds:
            raise ConfigError(
                "config.json: layer_types names sliding_attention, but no sliding window is in use"
            )
        return {i for i, kind in enumerate(kinds) if kind == "sliding_attention"}
    if not on or family.sliding == "everywhere":
        return set(range(layers)) if on else set()
    first = keys.whole("max_window_layers", least=0)
    return set(range(first, layers)) if family.sliding == "upper" else set(range(0, min(first, layers), 2))


def _experts(family: Family, keys: Keys, layers: int) -> dict[str, Any]:
    """Experts: how many, how wide, in which layers, how the router normalises."""
    if not family.is_moe:
        return {}
    experts, per_tok = _num_experts(family, keys), keys.whole("num_experts_per_tok")
    if per_tok > experts:
        raise ConfigError(f"config.json: num_experts_per_tok {per_tok} must lie in 1..{experts}")
    if experts * layers > MOST_EXPERTS_IN_ALL:
        raise ConfigError(
            f"config.json: {experts} experts in {layers} layers are more than any model has; the file is damaged"
        )
    return {
        "num_experts": experts,
        "num_experts_per_tok": per_tok,
        "moe_intermediate_size": keys.whole(family.expert_width_key),
        "norm_topk_prob": family.always_normalised or keys.flag("norm_topk_prob"),
        "dense_layers": _dense_layers(keys, layers) if family.dense_layers else frozenset(),
        "shared_expert_intermediate_size": (
            keys.whole("shared_expert_intermediate_size", least=0) if family.shared_expert else 0
        ),
    }


def _num_experts(family: Family, keys: Keys) -> int:
    given = {key: whole(key, keys.raw[key]) for key in family.experts_keys if keys.raw.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ConfigError(
            f"config.json: {' and '.join(f'{k} {n}' for k, n in given.items())} contradict each other"
        )
    return next(iter(given.values()), None) or int(family.defaults[family.experts_keys[0]])


def _dense_layers(keys: Keys, layers: int) -> frozenset[int]:
    """Layers without a router: those named, and those that no multiple of decoder_sparse_step counts."""
    step, only = keys.whole("decoder_sparse_step"), set(keys.items("mlp_only_layers", int))
    return frozenset(i for i in range(layers) if i in only or (i + 1) % step)
