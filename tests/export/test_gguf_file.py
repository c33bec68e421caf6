"""GGUF files of every family: read back bit by bit, by the gguf package, and run by transformers' own loader."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from bundled import smollm2_path
from tiny import byte_tokenizer
from tiny_models import FAMILIES, TinyCheckpoint

from octad.checkpoint.gguf.reader import GGUFSource, deinterleave
from octad.checkpoint.gguf.vocabulary import gguf_tokenizer
from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.checkpoint.names import tensor_plan
from octad.errors import CheckpointError, OutputError
from octad.export.gguf_file import TYPES, interleave, write_gguf
from octad.export.gguf_vocabulary import PROBES
from octad.model.families import FAMILIES as FACTS

TOKENS = torch.arange(3, 25).view(1, -1)
HOLDS: dict[str, dict[str, Any]] = {  # what llama.cpp's graph of the family computes
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [], "moe_intermediate_size": 768},
    "mistral": {"sliding_window": None},
    "olmoe": {"num_key_value_heads": 4},
}
Make = Callable[..., Path]


@pytest.fixture
def checkpoint(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Make:
    """checkpoint("mixtral", **config) -> a directory with a tokenizer, in bfloat16."""

    def make(family: str, **changes: Any) -> Path:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "dtype": torch.bfloat16}
        made = tiny_checkpoint(family, **sizes | HOLDS.get(family, {}) | changes)
        path = Path(shutil.copytree(made, tmp_path / f"{family}{len(changes)}"))
        byte_tokenizer().save(path)
        return path

    return make


def yarn(**values: Any) -> dict[str, Any]:
    plain = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": plain | values}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_comes_back_exactly(checkpoint: Make, tmp_path: Path, family: str, tied: bool) -> None:
    source = open_source(checkpoint(family, tie_word_embeddings=tied))
    made = GGUFSource(write_gguf(source, tmp_path / "m.gguf", "bf16"), exact=True)
    for name in tensor_plan(source.config):
        assert torch.equal(made.read(name).float(), source.read(name).float()), name
    ours, theirs = (load_model(s, torch.float32) for s in (source, made))
    assert torch.equal(logits(ours), logits(theirs))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_transformers_runs_the_file(checkpoint: Make, tmp_path: Path, family: str) -> None:
    """Their reading of GGUF: other names, rows put back by other code."""
    path = checkpoint(family, **{"head_dim": 128} if family == "qwen3" else {})  # the only one that they read
    write_gguf(open_source(path), tmp_path / "m.gguf", "f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    original = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(original), rtol=1e-4, atol=1e-4)


def test_layout_by_the_gguf_package(checkpoint: Make, tmp_path: Path) -> None:
    """Names, shapes and types as llama.cpp's graph of "llama" asks for them."""
    source = open_source(checkpoint("mixtral"))
    reader = gguf.GGUFReader(write_gguf(source, tmp_path / "new" / "place" / "m.gguf", "q8_0"))
    tensors = {t.name: t for t in reader.tensors}
    config = source.config
    E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
    assert tensors["blk.1.ffn_gate_exps.weight"].shape.tolist() == [D, F, E]  # innermost first
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [F, D, E]
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q8_0"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.expert_count"] == E
    assert fields["llama.expert_used_count"] == config.num_experts_per_tok
    assert fields["llama.feed_forward_length"] == F
    assert fields["tokenizer.ggml.eos_token_id"] == 95
    # one block of 32, by hand: scale is the largest / 127
    weight = interleave(source.read("model.layers.0.self_attn.q_proj.weight"), config.num_attention_heads)[
        0, :32
    ]
    block = tensors["blk.0.attn_q.weight"].data.reshape(config.hidden_size, -1)[0, :34]
    scale = block[:2].view(np.float16)[0].astype(np.float32)
    assert abs(scale - weight.float().abs().max() / 127) < 1e-3 * scale
    assert (block[2:].view(np.int8) * scale - weight.float().numpy()).max() <= scale * 0.51


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_types(checkpoint: Make, tmp_path: Path, kind: str) -> None:
    source = open_source(checkpoint("mixtral"))
    made = GGUFSource(write_gguf(source, tmp_path / "m.gguf", kind), exact=True)
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    worst = {"q8_0": 0.01, "q5_0": 0.1, "q5_1": 0.1, "q4_0": 0.2, "q4_1": 0.2}.get(kind, 1e-3)
    difference = (made.read(name).float() - source.read(name).float()).norm() / source.read(
        name
    ).float().norm()
    assert difference < worst
    assert difference > 0 or kind in ("f32", "bf16", "f16")


def test_interleaving_is_undone() -> None:
    x = torch.arange(4 * 16 * 3).view(64, 3)
    assert torch.equal(deinterleave(interleave(x, 4), 4), x)
    assert interleave(torch.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_qwen2_mixture_whose_shared_expert_adds_nothing_is_a_llama(
    checkpoint: Make, tmp_path: Path
) -> None:
    """llama.cpp's qwen2moe never makes the weights sum to 1; its llama always does, and reads the biases."""
    path = checkpoint("qwen2_moe", norm_topk_prob=True)
    source = open_source(path)
    with pytest.raises(CheckpointError, match="qwen2moe never makes"):
        write_gguf(source, tmp_path / "m.gguf")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if ".shared_expert." in name:
            tensor.zero_()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    source = open_source(path)
    reader = gguf.GGUFReader(write_gguf(source, tmp_path / "m.gguf"))
    assert reader.fields["general.architecture"].contents() == FACTS["mixtral"].gguf
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert not [name for name in tensors if "shexp" in name]
    own = source.read("model.layers.0.self_attn.q_proj.bias").float()
    found = tensors["blk.0.attn_q.bias"].data
    assert np.array_equal(found, interleave(own, source.config.num_attention_heads).numpy())
    again = open_source(tmp_path / "m.gguf")
    assert again.config.model_type == "qwen2_moe"
    assert torch.equal(*(logits(load_model(s, torch.float32)) for s in (source, again)))


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("mistral", {"sliding_window": 16}, "slides over 16"),
        ("qwen3_moe", {"norm_topk_prob": False}, "always makes"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "experts in all layers"),
        ("olmoe", {"norm_topk_prob": True}, "never makes"),
        ("olmoe", {"clip_qkv": 5.0}, "clip"),
        ("qwen3", {"attention_bias": True}, "biases"),
        ("qwen2_moe", {"norm_topk_prob": False, "head_dim": 32}, "heads that fill the width"),
        ("olmoe", {"num_key_value_heads": 2}, "as many key as query heads"),
        ("llama", yarn(beta_fast=16), "beta_fast 16"),
        ("llama", yarn(truncate=False), "truncate False"),
        ("llama", yarn(attention_factor=1.5), "attention scale of its own"),
    ],
)
def test_what_the_graphs_cannot_compute_is_refused(
    checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        write_gguf(open_source(checkpoint(family, **changes)), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_refusals_leave_nothing(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(checkpoint("llama"))
    with pytest.raises(OutputError, match="llama-quantize"):
        write_gguf(source, tmp_path / "m.gguf", "q4_k_m")
    with pytest.raises(OutputError, match="is a directory; name a file"):
        write_gguf(source, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10))
        with pytest.raises(OutputError, match="bytes are needed, 10 bytes are free"):
            write_gguf(source, tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        write_gguf(source, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    write_gguf(source, tmp_path / "m.gguf", overwrite=True)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("context", [8192, 64])
def test_llama3_scaling_comes_back(checkpoint: Make, tmp_path: Path, context: int) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
        "rope_theta": 5e5,
    }
    source = open_source(checkpoint("llama", rope_parameters=scaling))
    made = open_source(write_gguf(source, tmp_path / "m.gguf"))
    assert made.config.rope == source.config.rope


def test_smollm2_goes_out_as_it_came_in(tmp_path: Path) -> None:
    """The tokenizer, its chat template and its ends, from the file of other people's making."""
    path = smollm2_path()
    original = load_tokenizer(open_source(path))
    from octad.export.gguf_vocabulary import vocabulary_values

    values = vocabulary_values(original, 49152)
    assert (values["ggml.model"], values["ggml.pre"]) == ("gpt2", "smollm")
    theirs = gguf.GGUFReader(path)
    for key in ("tokens", "token_type", "merges"):
        assert values[f"ggml.{key}"] == theirs.fields[f"tokenizer.ggml.{key}"].contents(), key
    assert values["ggml.eos_token_id"] == theirs.fields["tokenizer.ggml.eos_token_id"].contents()
    assert values["chat_template"] == theirs.fields["tokenizer.chat_template"].contents()


def test_a_sentencepiece_vocabulary_comes_back(checkpoint: Make, tmp_path: Path) -> None:
    from vocabularies import sentencepiece

    tokenizer = sentencepiece()
    path = checkpoint("llama", vocab_size=tokenizer.vocab_size)
    tokenizer.save(path)
    made = write_gguf(open_source(path), tmp_path / "m.gguf")
    again = gguf_tokenizer(made)
    assert [again.encode(p) for p in PROBES] == [load_tokenizer(open_source(path)).encode(p) for p in PROBES]


@pytest.mark.parametrize("minds", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_mind_their_neighbours_are_refused(checkpoint: Make, tmp_path: Path, minds: str) -> None:
    """llama.cpp finds added tokens anywhere and takes no blank along; tokenizers' own ids say what was lost."""
    plain, odd = byte_tokenizer(256), byte_tokenizer(256)
    for made, options in ((plain, {}), (odd, {minds: True})):
        made.core.add_tokens([tokenizers.AddedToken("zq", normalized=False, **options)])
    text = "xzq zq y"
    assert plain.core.encode(text).ids != odd.core.encode(text).ids
    path = checkpoint("llama", vocab_size=257)
    plain.save(path)
    assert gguf_tokenizer(write_gguf(open_source(path), tmp_path / "plain.gguf")).encode(
        text
    ) == plain.encode(text)
    odd.save(path)
    with pytest.raises(CheckpointError, match=r"'zq' minds its neighbours \(lstrip, rstrip or single_word\)"):
        write_gguf(open_source(path), tmp_path / "odd.gguf")
    assert not (tmp_path / "odd.gguf").exists()


def test_overwrite_replaces_a_gguf_file_alone(checkpoint: Make, tmp_path: Path) -> None:
    """A slip in -o takes no weights away, neither those that are read nor anybody else's."""
    path = checkpoint("llama")
    weights = path / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(OutputError, match="is no GGUF file to overwrite"):
        write_gguf(open_source(path), weights, overwrite=True)
    assert weights.read_bytes() == before
    made = write_gguf(open_source(path), tmp_path / "m.gguf", "f32")
    assert write_gguf(open_source(path), made, "q8_0", overwrite=True).read_bytes()[:4] == b"GGUF"
