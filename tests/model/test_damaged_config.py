"""Damaged and hostile config.json files: one line that names the key, never another exception or a hang."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import COMMON, FAMILIES, OWN

from octad.checkpoint.hf import read_config
from octad.checkpoint.load import open_source
from octad.errors import ConfigError, OctadError
from octad.model.config import ModelConfig

Raw = dict[str, Any]
ODD = [
    10**40,
    -(10**40),
    -1,
    0,
    True,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "8",
    "",
    "\ud800",
    "x\x00y",
    [],
    {},
    [[1]],
    {"a": 1},
    [10**40],
    ["sliding_attention"] * 3,
    None,
]


def tiny(family: str, **changes: Any) -> Raw:
    return {"model_type": family, **COMMON, **OWN[family], **changes}


WRONG: list[tuple[str, Raw, str]] = [
    ("mixtral", {"num_local_experts": 10**40}, "num_local_experts is a number of about 41 digits"),
    ("mixtral", {"num_local_experts": 60000, "num_hidden_layers": 900}, "60000 experts in 900 layers"),
    ("mixtral", {"num_local_experts": 3, "num_experts": 4}, "contradict"),
    ("mixtral", {"num_experts_per_tok": 4}, "num_experts_per_tok 4 must lie in 1..3"),
    ("llama", {"hidden_size": "32"}, "hidden_size must be a positive whole number, found '32'"),
    ("llama", {"hidden_size": True}, "hidden_size must be a positive whole number, found True"),
    ("llama", {"vocab_size": 10**12}, "vocab_size is 1000000000000, more than any model has"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number above 0"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number above 0"),
    ("llama", {"rope_theta": 0}, "rope_theta must be a finite number above 0"),
    ("llama", {"rope_scaling": "yarn"}, "rope scaling must be keys and values"),
    ("llama", {"rope_scaling": {"type": ["yarn"]}}, "rope scaling ['yarn'] is not supported"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": -2}}, "factor must be a finite number above 0"),
    ("llama", {"rope_scaling": {"full_attention": {"rope_theta": 5e5}}}, "'full_attention'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ("llama", {"head_dim": 7}, "head_dim 7 must be even"),
    ("llama", {"hidden_size": 33}, "hidden_size 33 is not a multiple"),
    ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false"),
    ("llama", {"torch_dtype": 3}, "torch_dtype must be a string"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act must be a string"),
    ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id must be a whole number"),
    ("mistral", {"sliding_window": 0}, "sliding_window must be a positive whole number"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers"),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types must name"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding window is in use"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive whole number"),
    ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers must be a list of whole numbers"),
    ("olmoe", {"clip_qkv": "8"}, "clip_qkv must be a finite number above 0"),
]


@pytest.mark.parametrize(("family", "changes", "words"), WRONG, ids=[w for _, _, w in WRONG])
def test_what_is_wrong_is_named(family: str, changes: Raw, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(tiny(family, **changes))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_odd_value_anywhere_is_read_or_refused(family: str) -> None:
    """Two thousand configs with one or two odd values each."""
    draw = random.Random(1)
    switches = (
        "sliding_window",
        "use_sliding_window",
        "layer_types",
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
    )
    more = (
        "tie_word_embeddings",
        "attention_bias",
        "mlp_only_layers",
        "max_window_layers",
        "eos_token_id",
        "dtype",
    )
    base = tiny(family)
    keys, refused = [*base, *switches, *more], list[str]()
    for _ in range(2000):
        raw = dict(base)
        for key in draw.sample(keys, draw.choice((1, 2))):
            raw[key] = draw.choice(ODD)
        try:
            config = ModelConfig.from_dict(raw)
        except ConfigError as error:
            refused.append(str(error))
        else:
            assert 0 < config.head_dim * config.num_attention_heads < 1 << 33
    assert all(line.startswith("config.json: ") and line.isprintable() for line in refused)
    assert 500 < len(refused) < 2000


def test_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 1e999}')
    with pytest.raises(OctadError, match=str(tmp_path)):
        read_config(tmp_path)


GROUP = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}


@pytest.mark.parametrize("weights", [2, None, "x", [], [[1, 2]], GROUP | {"strategy": ["group"]}])
def test_odd_groups_of_quantised_weights(weights: Any, tmp_path: Path) -> None:
    told = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    groups = {"group_0": {"targets": ["Linear"], "weights": GROUP}, "group_1": {"weights": weights}}
    raw = tiny("llama", quantization_config=told | {"config_groups": groups})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(OctadError, match=str(tmp_path)):
        open_source(tmp_path, quantised=True)
