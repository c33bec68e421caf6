"""Adapters made by peft from tiny models, compared with peft's merging or, where that is not exact, its forward."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.source import TensorInfo
from octad.errors import CheckpointError
from octad.model.config import ModelConfig

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class MemorySource:
    """A TensorSource over a transformers model."""

    label, directory = "tiny base", None

    def __init__(self, model, dtype=torch.float32):
        self.config = ModelConfig.from_dict(json.loads(model.config.to_json_string()))
        tied = self.config.tie_word_embeddings
        self.tensors = {
            name: value.detach().clone().to(dtype)
            for name, value in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }

    def names(self):
        return list(self.tensors)

    def info(self, name):
        return TensorInfo(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def read(self, name):
        return self.tensors[name].clone()

    def extent(self, name):
        return None

    def provenance(self):
        return {"kind": "memory"}


def base_model(*, tied=False, bias=False, kind=transformers.LlamaConfig):
    torch.manual_seed(0)
    extra = {"attention_bias": bias, "mlp_bias": bias} if kind is transformers.LlamaConfig else {}
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES, tie_word_embeddings=tied, **extra))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model.eval()


def train(model, tmp_path, **settings):
    """Wrap, fill every trained tensor with noise (as training would), save. Returns the peft model."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted


def assert_same_as_merged(base, directory, merged):
    """Every tensor equals peft's, and `changed` names exactly those that differ from the base."""
    source, theirs = AdapterSource(base, directory), merged.state_dict()
    assert set(source.names()) == set(theirs)
    for name in source.names():
        torch.testing.assert_close(source.read(name), theirs[name], rtol=1e-5, atol=1e-6)
    assert source.changed() == {n for n in theirs if not torch.equal(theirs[n], base.read(n))}
    return source


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ALL_LINEAR},
        {"target_modules": "all-linear", "use_rslora": True},
        {
            "target_modules": ALL_LINEAR,
            "rank_pattern": {"up_proj": 2, "layers.1.mlp.down_proj": 7},
            "alpha_pattern": {r".*layers\.0\..*q_proj": 3, "up_proj": 20},
        },
        {
            "target_modules": ALL_LINEAR,
            "use_rslora": True,
            "rank_pattern": {r"model\.layers\.\d+\.self_attn\.(q|k)_proj": 3, "q_proj": 9},
        },
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["norm", "input_layernorm"]},
        {"target_modules": ["gate_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.1\.(mlp|self_attn)\.(up|v)_proj"},
    ],
    ids=[
        "plain",
        "rslora",
        "patterns",
        "patterns-rslora",
        "embeddings",
        "saved",
        "saved-norms",
        "layers",
        "regex",
    ],
)
def test_equals_merge_and_unload(settings, tmp_path):
    model = base_model()
    base = MemorySource(model)
    merged = train(model, tmp_path, **settings).merge_and_unload()
    assert_same_as_merged(base, tmp_path / "adapter", merged)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias, tmp_path):
    model = base_model(bias=True)
    base = MemorySource(model)
    merged = train(model, tmp_path, target_modules=["q_proj", "down_proj"], bias=bias).merge_and_unload()
    source = assert_same_as_merged(base, tmp_path / "adapter", merged)
    assert "model.layers.0.self_attn.q_proj.bias" in source.changed()


def test_lora_bias(tmp_path):
    model = base_model(bias=True)
    base = MemorySource(model)
    settings = {"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "use_rslora": True}
    merged = train(model, tmp_path, **settings).merge_and_unload()
    source = assert_same_as_merged(base, tmp_path / "adapter", merged)
    assert "model.layers.1.mlp.up_proj.bias" in source.changed()


def test_lora_bias_without_a_bias_to_merge_into(tmp_path):
    model = base_model()
    base = MemorySource(model)
    with pytest.warns(UserWarning, match="has no bias"):
        train(model, tmp_path, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(CheckpointError, match="no such bias"):
        AdapterSource(base, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_fan_in_fan_out_is_ignored_for_linear_layers_as_peft_does(tmp_path):
    model = base_model()
    base = MemorySource(model)
    train(model, tmp_path, target_modules=["q_proj", "up_proj"])
    edit_config(tmp_path / "adapter", fan_in_fan_out=True)
    merged = peft.PeftModel.from_pretrained(base_model(), tmp_path / "adapter").merge_and_unload()
    assert_same_as_merged(base, tmp_path / "adapter", merged)


def test_qwen2_with_its_biases(tmp_path):
    model = base_model(kind=transformers.Qwen2Config)
    base = MemorySource(model)
    merged = train(model, tmp_path, target_modules=ALL_LINEAR, bias="all").merge_and_unload()
    assert_same_as_merged(base, tmp_path / "adapter", merged)


def test_dtype_is_the_bases_and_the_sum_is_in_float32(tmp_path):
    model = base_model()
    base = MemorySource(model, torch.bfloat16)
    train(model, tmp_path, target_modules=["up_proj"])
    source, name = AdapterSource(base, tmp_path / "adapter"), "model.layers.0.mlp.up_proj.weight"
    a, b, scale = source.delta_factors(name)
    expected = (base.read(name).double() + scale * (b.double() @ a.double())).float().bfloat16()
    assert source.info(name).dtype == torch.bfloat16
    assert (source.read(name) != expected).float().mean() < 1e-3  # a tie may round either way
    assert source.delta_factors("model.norm.weight") is None
    assert torch.equal(source.read("model.norm.weight"), base.read("model.norm.weight"))


# ---- a tied head -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "up_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["embedding", "head", "both", "saved-head", "saved-embedding"],
)
def test_a_tied_head_is_untied_where_the_adapter_parts_it(settings, tmp_path):
    model = base_model(tied=True)
    base = MemorySource(model)
    adapted = train(model, tmp_path, **settings)
    ids = torch.arange(20).reshape(2, 10)
    expected = adapted(ids).logits
    source = AdapterSource(base, tmp_path / "adapter")
    assert not source.config.tie_word_embeddings
    assert source.config.raw["tie_word_embeddings"] is False
    assert source.names()[-1] == "lm_head.weight"
    untied = base_model(tied=False)
    untied.load_state_dict({name: source.read(name) for name in source.names()})
    torch.testing.assert_close(untied(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["lora", "saved"],
)
def test_a_head_that_peft_keeps_tied_stays_tied(settings, tmp_path):
    model = base_model(tied=True)
    base = MemorySource(model)
    adapted = train(model, tmp_path, ensure_weight_tying=True, **settings)
    ids = torch.arange(20).reshape(2, 10)
    expected = adapted(ids).logits
    source = AdapterSource(base, tmp_path / "adapter")
    assert source.config.tie_word_embeddings
    tied = base_model(tied=True)
    tied.load_state_dict({name: source.read(name) for name in source.names()}, strict=False)
    torch.testing.assert_close(tied(ids).logits, expected, rtol=1e-4, atol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def adapter(tmp_path):
    """A base and the directory of a plain adapter for it."""
    model = base_model()
    base = MemorySource(model)
    train(model, tmp_path, target_modules=["up_proj"])
    return base, tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": None}, "peft_type None"),
        ({"rank_pattern": {"up_proj": 3}}, "rank 3"),
        ({"rank_pattern": {"(": 3}}, "bad rank or alpha"),
        ({"r": 0}, "bad rank or alpha"),
    ],
)
def test_refused_by_the_name_of_the_field(adapter, changes, message):
    base, directory = adapter
    edit_config(directory, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        AdapterSource(base, directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings", [peft.LoraConfig(target_modules=["up_proj"], use_dora=True), peft.IA3Config()]
)
def test_real_dora_and_ia3(settings, tmp_path):
    model = base_model()
    base = MemorySource(model)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"use_dora is not supported|peft_type 'IA3'"):
        AdapterSource(base, tmp_path)


def test_an_adapter_for_another_base(adapter):
    base, directory = adapter
    name = "model.layers.1.mlp.up_proj.weight"
    base.tensors[name] = torch.zeros(64, 32)
    with pytest.raises(CheckpointError, match=r"made for another base: .*up_proj.*\[64, 32\].*\[48, 32\]"):
        AdapterSource(base, directory)
    del base.tensors[name]
    with pytest.raises(CheckpointError, match="tiny base lacks"):
        AdapterSource(base, directory)


def test_missing_and_damaged_files(adapter):
    base, directory = adapter
    weights = directory / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="adapter_model"):
        AdapterSource(base, directory)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        AdapterSource(base, directory)
    (directory / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        AdapterSource(base, directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is not valid JSON"):
        AdapterSource(base, directory)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="not a PEFT adapter"):
        AdapterSource(base, directory)


def test_keys_that_are_not_understood(adapter):
    base, directory = adapter
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    save_file({k: v for k, v in tensors.items() if k != f"{stem}.lora_B.weight"}, weights)
    with pytest.raises(CheckpointError, match=r"factors .* missing"):
        AdapterSource(base, directory)
    save_file({**tensors, f"{stem}.lora_magnitude_vector": torch.ones(48)}, weights)
    with pytest.raises(CheckpointError, match="lora_magnitude_vector is not understood"):
        AdapterSource(base, directory)
    save_file({**tensors, "model.layers.0.strange": torch.ones(1)}, weights)
    with pytest.raises(CheckpointError, match="is not understood"):
        AdapterSource(base, directory)


def test_provenance(adapter):
    base, directory = adapter
    facts = AdapterSource(base, directory, label="french").provenance()
    assert (facts["kind"], facts["label"], facts["base"]) == ("adapter", "french", {"kind": "memory"})
    sizes = {entry["name"]: entry["bytes"] for entry in facts["files"]}
    weights = directory / "adapter_model.safetensors"
    assert sizes[weights.name] == weights.stat().st_size


# ---- the real adapters -----------------------------------------------------------------------------------


def test_a_bundled_specialist_fits_the_bundled_base():
    from bundled import smollm2_path

    import octad
    from octad.checkpoint.gguf.reader import GGUFSource

    directory = Path(octad.__file__).parent / "demo" / "specialists" / "french"
    base = GGUFSource(smollm2_path(), dtype=torch.float32)
    source, name = AdapterSource(base, directory), "model.layers.7.mlp.down_proj.weight"
    tensors = load_file(directory / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    product = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
    expected = base.read(name).double() + 2.0 * product  # alpha 32, rank 16
    torch.testing.assert_close(source.read(name), expected.float(), rtol=1e-5, atol=1e-6)
    parts = {n.split(".")[-2] for n in source.changed()}
    assert (len(source.changed()), parts) == (90, {"gate_proj", "up_proj", "down_proj"})
    assert source.config == base.config


# ---- as adapters lie about ---------------------------------------------------------------------------------


def resized(model, rows):
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [99, 90])
def test_a_base_whose_vocabulary_was_resized(tied, rows, tmp_path):
    """The embedding and head that the adapter carries are the vocabulary; the base's own does not matter."""
    base = MemorySource(base_model(tied=tied))
    adapted = train(
        resized(base_model(tied=tied), rows),
        tmp_path,
        target_modules=["up_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    source = AdapterSource(base, tmp_path / "adapter")
    assert source.config.vocab_size == rows
    tokens = torch.arange(24).view(2, 12)
    assert_same_logits(source, adapted, tokens)


def assert_same_logits(source, adapted, tokens):
    from octad.checkpoint.load import load_model

    with torch.no_grad():
        theirs = adapted(tokens).logits
        torch.testing.assert_close(load_model(source)(tokens), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_were_added_and_saved_with_the_adapter(tied, tmp_path):
    """`save_embedding_layers`: nothing of the vocabulary was trained; embedding and head are saved whole, tied or not."""
    base = MemorySource(base_model(tied=tied))
    adapted = peft.get_peft_model(
        resized(base_model(tied=tied), 100), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"])
    ).eval()
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.2)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    source = AdapterSource(base, tmp_path / "adapter")
    assert source.config.vocab_size == 100
    assert source.config.tie_word_embeddings == tied
    assert_same_logits(source, adapted, torch.arange(24).view(2, 12))


def test_rows_that_were_added_and_not_saved(tmp_path):
    """The line names what the adapter lacks, not the base."""
    base = MemorySource(base_model())
    train(resized(base_model(), 100), tmp_path, target_modules=["up_proj"], modules_to_save=["embed_tokens"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "lm_head" not in k}, weights)
    with pytest.raises(
        CheckpointError, match=r"trained with 100 vocabulary rows \(the base has 96\)"
    ) as caught:
        AdapterSource(base, tmp_path / "adapter")
    assert "save_embedding_layers=True" in str(caught.value)
    factors = {k: v for k, v in load_file(weights).items() if "embed_tokens" not in k}
    stem = "base_model.model.lm_head.lora_"
    save_file(
        {**factors, f"{stem}A.weight": torch.ones(4, 32), f"{stem}B.weight": torch.ones(100, 4)}, weights
    )
    with pytest.raises(CheckpointError, match=r"does not carry all of lm_head\.weight"):
        AdapterSource(base, tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ALL_LINEAR},
        {"target_modules": ["embed_tokens", "up_proj"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_keys_that_name_the_adapter(settings, tmp_path):
    """A raw state dict: lora_A.default.weight, modules_to_save.default.weight beside original_module.weight."""
    base = MemorySource(base_model())
    adapted = train(base_model(), tmp_path, **settings)
    expected = AdapterSource(base, tmp_path / "adapter")
    raw = {k: v.contiguous() for k, v in adapted.state_dict().items() if "lora_" in k or "modules_to_save" in k
           or "original_module" in k}  # fmt: skip
    assert any(".default" in key for key in raw)
    shutil.copytree(tmp_path / "adapter", tmp_path / "raw")
    weights = tmp_path / "raw" / "adapter_model.safetensors"
    save_file(raw, weights)
    found = AdapterSource(base, tmp_path / "raw")
    assert found.changed() == expected.changed() != set()
    for name in found.changed():
        assert torch.equal(found.read(name), expected.read(name))
    twice = {key.replace(".default", ".other"): value for key, value in raw.items()}
    save_file({**raw, **{k: v.clone() for k, v in twice.items()}}, weights)
    with pytest.raises(CheckpointError, match=r"several adapters \(default, other\)"):
        AdapterSource(base, tmp_path / "raw")


def test_an_empty_file(adapter):
    base, directory = adapter
    save_file({}, directory / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is empty: it holds no tensor"):
        AdapterSource(base, directory)


def test_exactly(adapter):
    """A bfloat16 base: the sum is rounded by whoever writes it, once."""
    base, directory = adapter
    for name in base.tensors:
        base.tensors[name] = base.tensors[name].bfloat16()
    plain, exact = AdapterSource(base, directory), AdapterSource(base, directory, exact=True)
    name = "model.layers.1.mlp.up_proj.weight"
    assert exact.read(name).dtype == exact.info(name).dtype == torch.float32
    a, b, scale = exact.delta_factors(name)
    torch.testing.assert_close(exact.read(name), base.read(name).float() + scale * (b @ a))
    assert torch.equal(exact.read(name).bfloat16(), plain.read(name))
    untouched = "model.layers.1.mlp.down_proj.weight"
    assert exact.read(untouched).dtype == torch.bfloat16
