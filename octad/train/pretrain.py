"""Models from nothing: a dense one and its mixture twin of equal active cost, both from one dial.

    raw = architecture(spec, "mixture", vocab_size=49152, window=512, top1="switch")       # a config.json
    learner = pretrain_learner(config)

size n means n layers, width 64 n, heads of 64 (as in nanochat); the feed-forward hidden size is 8/3 of the width. The
twin's experts are 1 / top_k as wide, so that a token costs the same in both and only the router's few products are on
top. Dense models are Qwen3, mixtures Qwen3-MoE: normalised queries and keys, and the one public mixture format that can
say whether weights are renormalised (Switch's are not). Upcycling (arXiv 2212.05055) starts every expert as a copy of a
dense run's network: with renormalised weights the mixture begins as exactly that model.

Shapes: E experts, F feed-forward hidden, D model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.load import load_tokenizer, open_source, state_tensors
from octad.checkpoint.names import layer_of
from octad.checkpoint.writer import CheckpointWriter
from octad.dist import World, dtype_name
from octad.errors import RecipeError
from octad.fast.weights import bare_model, fill_drawn
from octad.model.config import ModelConfig
from octad.text.tokenizer import Tokenizer
from octad.train.export import common_files, write_new
from octad.train.learner import TRAINING, Learner, choose, compute_settings, prepare_mixture
from octad.train.run_config import ArchitectureSpec, PretrainConfig
from octad.train.state import FACTS, latest_state, load_facts, read_masters

HEAD_DIM, DEVIATION = 64, 0.02


def architecture(
    spec: ArchitectureSpec,
    mode: str,
    *,
    vocab_size: int,
    window: int,
    top1: str = "straight-through",
    expert_width: int | None = None,
) -> dict[str, Any]:
    """config.json of a model of this size. Raises RecipeError for sizes that do not fit together."""
    width = spec.width or 64 * spec.size
    heads = spec.heads or max(1, width // HEAD_DIM)
    hidden = spec.feed_forward or 64 * math.ceil(8 * width / 3 / 64)
    if width % (2 * heads):
        raise RecipeError(f"architecture: width {width} is no multiple of 2 * heads ({heads})")
    raw: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if mode == "dense" else "Qwen3MoeForCausalLM"],
        "model_type": "qwen3" if mode == "dense" else "qwen3_moe",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": spec.layers or spec.size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": max(2048, window),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_bias": False,
        "use_sliding_window": False,
        "use_cache": True,
    }
    return raw if mode == "dense" else raw | _mixture_keys(spec, expert_width or hidden // spec.top_k, top1)


def pretrain_learner(config: PretrainConfig) -> Learner:
    """A new model. Raises RecipeError where the architecture or the run to upcycle does not fit."""
    dtype, device = compute_settings(config)
    tokenizer = _tokenizer(config.resolve(config.tokenizer))
    dense = open_dense(config.resolve(config.upcycle)) if config.upcycle else None
    raw = architecture(
        config.architecture,
        config.mode,
        vocab_size=tokenizer.vocab_size,
        window=config.data.window,
        top1=config.routing.top1,
        expert_width=dense.width if dense else None,
    )
    raw |= {"torch_dtype": dtype_name(dtype), "eos_token_id": list(tokenizer.eos_ids)}
    model = bare_model(ModelConfig.from_dict(raw), dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if dense is not None:
        check_upcycled(shapes, dense)
    routers = prepare_mixture(model, config.routing, device)
    model.requires_grad_(True)

    def side_files(writer: CheckpointWriter) -> None:
        common_files(writer, raw, tokenizer)
        writer.add_json(TRAINING, [config.to_dict()])

    def write(run: Path, values: Mapping[str, torch.Tensor], world: World) -> Path:
        return write_new(run, model.config, values, dtype, side_files, world)

    return Learner(
        model=model,
        tokenizer=tokenizer,
        config=config,
        data=config.data,
        evaluate=config.evaluate,
        write=write,
        trainable=choose(model, ""),
        routers=routers,
        routing=config.routing,
        identity={"files": dense.files if dense else None},
        fill=fill_drawn(lambda: first_values(shapes, config.seed, dense, dtype)),
    )


def first_values(
    shapes: Mapping[str, torch.Size], seed: int, dense: Dense | None, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model's parameters begin with, one after another: normal weights of deviation 0.02, those that write into
    the residual stream less by the root of their number; for all but routers a dense run's where there is one."""
    torch.manual_seed(seed)
    layers = 1 + max((layer for layer in map(layer_of, shapes) if layer is not None), default=0)
    inner = DEVIATION / math.sqrt(2 * layers)
    for name, shape in shapes.items():
        value = torch.empty(shape)
        if len(shape) < 2:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            value.normal_(0.0, inner if "o_proj" in name or "down_proj" in name else DEVIATION)
        known = None if dense is None or ".mlp.gate." in name else _dense_value(name, dense.weights)
        yield name, (value if known is None else known.expand(shape)).to(dtype)


@dataclass(frozen=True)
class Dense:
    """A dense model to upcycle: its weights by parameter name, float32, and what tells it from others."""

    label: str
    weights: Mapping[str, torch.Tensor]
    files: Any

    @property
    def width(self) -> int | None:
        """Its feed-forward hidden size, where it has such a network."""
        gate = self.weights.get("model.layers.0.mlp.gate_proj.weight")
        return None if gate is None else len(gate)


def open_dense(reference: str) -> Dense:
    """A finished model, or one state of a dense run that is on its way. Raises RecipeError, CheckpointError."""
    path = Path(reference)
    if (path / FACTS).is_file():
        facts = load_facts(path)
        return Dense(reference, read_masters(path), {"step": facts["step"], **facts["files"]})
    state = latest_state(path) if path.is_dir() and not (path / "config.json").is_file() else None
    if state is not None:
        raise RecipeError(f"upcycle: {reference} is not finished; name one of its states, {state} say")
    source = open_source(reference)
    weights = state_tensors(source, source.config, dtype=torch.float32)
    return Dense(source.label, weights, source.provenance().get("files"))


def check_upcycled(shapes: Mapping[str, torch.Size], dense: Dense) -> None:
    """Raises RecipeError where the mixture's parameters, but for routers, cannot begin as the dense run's."""
    for name, shape in shapes.items():
        if ".mlp.gate." in name:
            continue
        value = _dense_value(name, dense.weights)
        if value is None or value.shape != shape[-value.dim() :]:
            found = "nothing" if value is None else list(value.shape)
            raise RecipeError(
                f"upcycle: {dense.label} has {found} for {name} {list(shape)}; use the architecture of the dense run"
            )


def _dense_value(name: str, found: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    if name.endswith("experts.down_proj"):
        return found.get(name.replace("experts.down_proj", "down_proj.weight"))
    if not name.endswith("experts.gate_up_proj"):
        return found.get(name)
    parts = [
        found.get(name.replace("experts.gate_up_proj", f"{part}_proj.weight")) for part in ("gate", "up")
    ]
    return None if any(part is None for part in parts) else torch.cat([p for p in parts if p is not None])


def _mixture_keys(spec: ArchitectureSpec, expert_width: int, top1: str) -> dict[str, Any]:
    if spec.top_k > spec.num_experts:
        raise RecipeError(f"architecture: top_k {spec.top_k} is more than num_experts {spec.num_experts}")
    return {
        "num_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k,
        "moe_intermediate_size": expert_width,
        "norm_topk_prob": spec.top_k > 1 or top1 != "switch",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }


def _tokenizer(reference: str) -> Tokenizer:
    """A tokenizer by itself, or that of a model."""
    if (Path(reference).expanduser() / "tokenizer.json").is_file():
        return Tokenizer.from_directory(reference)
    return load_tokenizer(open_source(reference))
