"""The table of families against transformers' own classes: silent configs, names, windows, logits."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from tiny_models import COMMON, FAMILIES, MOE, OWN

from octad.model import families
from octad.model.config import ModelConfig, dense_config
from octad.model.transformer import Transformer

TABLE = families.FAMILIES
NEVER_DEFAULTED = {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer knows them better
Raw = dict[str, Any]


def config_class(family: str) -> type[transformers.PreTrainedConfig]:
    return transformers.CONFIG_MAPPING[family]


def theirs_of(raw: Raw) -> transformers.PreTrainedModel:
    """What transformers makes of a config.json, with random weights."""
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(raw["model_type"], **settings), dtype=torch.float32
    ).eval()


def largest_difference(raw: Raw, tokens: int = 60) -> float:
    """Between their logits and ours for one config, as a share of their largest."""
    theirs, ours = theirs_of(raw), Transformer(ModelConfig.from_dict(raw)).eval()
    state = dict(theirs.state_dict())
    if ours.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    ours.load_state_dict(state)
    ids = torch.randint(0, 96, (2, tokens))
    with torch.no_grad():
        wanted = theirs(ids).logits
        return float((ours(ids) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    theirs = config_class(family)()
    for key, value in TABLE[family].defaults.items():
        if key == "rope_theta":
            assert value == theirs.rope_parameters["rope_theta"]
        elif key == "sliding_window":  # an instance has it only where it is switched on
            switch = {"use_sliding_window": True} if TABLE[family].sliding_switch else {}
            assert value == config_class(family)(**switch).sliding_window
        else:
            assert value == getattr(theirs, key), key


@pytest.mark.parametrize("family", FAMILIES)
def test_no_default_is_missing(family: str) -> None:
    """Every key that some family's row has, and that this family's class has a number or switch for, is in this row."""
    theirs, row = config_class(family)(), TABLE[family].defaults
    known = {key for other in TABLE.values() for key in other.defaults} - {"rope_theta", "sliding_window"}
    for key in known - set(row):
        value = getattr(theirs, key, None)
        follows = {"head_dim": theirs.hidden_size // theirs.num_attention_heads}
        follows["num_key_value_heads"] = theirs.num_attention_heads
        aliased = key in TABLE[family].experts_keys and value == row.get(TABLE[family].experts_keys[0])
        unread = not TABLE[family].is_moe or (key == "max_window_layers" and not TABLE[family].layer_types)
        assert value in (None, follows.get(key)) or aliased or unread, (key, value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_config_gives_their_logits(family: str) -> None:
    """Without any key that has a default, but those that keep the model tiny."""
    sizes = {"num_key_value_heads", "num_experts", "num_local_experts", "num_experts_per_tok"}
    sizes |= {"shared_expert_intermediate_size", "head_dim"}
    raw = {"model_type": family, **COMMON, **OWN[family]}
    raw = {key: v for key, v in raw.items() if key not in TABLE[family].defaults or key in sizes}
    assert largest_difference(raw) < 1e-5
    ours, theirs = ModelConfig.from_dict(raw), theirs_of(raw).config
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_sizes_are_theirs(family: str) -> None:
    raw = {"model_type": family, **COMMON, "num_attention_heads": 32, "hidden_size": 64}
    raw = {key: v for key, v in raw.items() if key != "num_key_value_heads"} | {"moe_intermediate_size": 8}
    ours, theirs = (
        ModelConfig.from_dict(raw),
        config_class(family)(**{k: v for k, v in raw.items() if k != "model_type"}),
    )
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
    if family in MOE:
        assert ours.num_experts == theirs.num_experts
        assert ours.num_experts_per_tok == theirs.num_experts_per_tok
        assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    if family == "qwen2_moe":
        assert ours.shared_expert_intermediate_size == theirs.shared_expert_intermediate_size


WINDOWS: dict[str, Raw] = {
    "a window": {"sliding_window": 8},
    "a window, switched on": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "a window, switched off": {"sliding_window": 8, "use_sliding_window": False},
    "kinds of layers": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "kinds of layers, the other way": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "null": {"sliding_window": None},
}


@pytest.mark.parametrize("given", WINDOWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_slide_in_the_layers_where_theirs_do(family: str, given: str) -> None:
    raw = {"model_type": family, **COMMON, **OWN[family], **WINDOWS[given]}
    assert largest_difference(raw, tokens=30) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_classes_are_theirs(family: str) -> None:
    row = TABLE[family]
    assert row.architecture == transformers.AutoModelForCausalLM._model_mapping[config_class(family)].__name__
    assert row.is_moe == (family in MOE)


def test_dense_and_mixture_families_point_at_each_other() -> None:
    for row in TABLE.values():
        assert (row.mixture is None) or TABLE[row.mixture].is_moe
        assert (row.member is None) or TABLE[row.member].mixture == row.model_type


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_knows_the_architecture(family: str) -> None:
    gguf = pytest.importorskip("gguf")
    assert TABLE[family].gguf in gguf.constants.MODEL_ARCH_NAMES.values()


def test_no_row_can_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE["llama"].gguf = "other"  # type: ignore[misc]


@pytest.mark.parametrize("family", MOE)
def test_one_expert_is_a_dense_model(family: str) -> None:
    config = ModelConfig.from_dict({"model_type": family, **COMMON, **OWN[family], "mlp_only_layers": []})
    member = dense_config(config)
    assert not member.is_moe
    assert member.intermediate_size == config.moe_intermediate_size
    assert not member.shared_expert_intermediate_size
    assert member.model_type == (TABLE[family].member or family)
