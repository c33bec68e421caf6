"""Exports in the hub's layout, loaded by transformers; members taken out again; the Modelfile; the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bundled import smollm2_path
from members import adapter, full_member, make_base, text_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer
from tiny_models import Octad, TinyCheckpoint

from octad.checkpoint.load import load_tokenizer, open_source
from octad.errors import CheckpointError, RequestError
from octad.export.gguf_file import write_gguf
from octad.export.hub import Changes, export_hub, member_source
from octad.export.modelfile import chatml_system, modelfile

TOKENS = torch.arange(3, 25).view(1, -1)


def theirs(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = theirs(path)(TOKENS).logits
    return found


@pytest.fixture
def mixture(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    made = tiny_checkpoint("mixtral", dtype=torch.bfloat16, tie_word_embeddings=True)
    path = Path(shutil.copytree(made, tmp_path / "mixture"))
    byte_tokenizer().save(path)
    (path / "octad.json").write_text(json.dumps({"experts": [{"name": n} for n in ("one", "two", "three")]}))
    return path


def test_untied_and_sharded(mixture: Path, tmp_path: Path) -> None:
    """SGLang looks for lm_head.weight: it is there, and says what the tied one said."""
    out = tmp_path / "out"
    assert export_hub(open_source(mixture), out, Changes(untie=True), max_shard_bytes=20_000).changed == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(out / index["lm_head.weight"], "pt") as file:
        head = file.get_tensor("lm_head.weight")
    assert torch.equal(head, load_file(mixture / "model.safetensors")["model.embed_tokens.weight"])
    assert not theirs(out).config.tie_word_embeddings
    assert torch.equal(logits(out), logits(mixture))


def test_another_type_is_measured_and_never_overflows(mixture: Path, tmp_path: Path) -> None:
    rounding = export_hub(open_source(mixture), tmp_path / "half", Changes(dtype="float16"))
    assert rounding.changed < rounding.weights / 100  # bfloat16 has fewer digits; only the smallest lose any
    tensors = load_file(mixture / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name][0, 0] = 1e6
    save_file(tensors, mixture / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: has values up to 999424, float16 ends at 65504"):
        export_hub(open_source(mixture), tmp_path / "lost", Changes(dtype="float16"))
    assert not (tmp_path / "lost").exists()
    wide = tmp_path / "wide"
    export_hub(open_source(mixture), wide, Changes(dtype="float32"))
    assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float32}
    assert torch.equal(logits(wide), logits(mixture))


def test_a_tokenizer_with_ids_that_have_no_row(mixture: Path, tmp_path: Path) -> None:
    byte_tokenizer(120).save(mixture)
    with pytest.raises(CheckpointError, match="has 120 ids, the model 96 rows: it is another model's"):
        export_hub(open_source(mixture), tmp_path / "out", Changes())
    later = byte_tokenizer(96)
    later.core.add_tokens([f"<later {i}>" for i in range(24)])
    later.save(mixture)
    with pytest.raises(CheckpointError, match="has the id 119, its embeddings 96 rows"):
        export_hub(open_source(mixture), tmp_path / "out", Changes())
    with pytest.raises(CheckpointError, match="has the id 119, its embeddings 96 rows"):
        write_gguf(open_source(mixture), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


def test_top_k(mixture: Path, tmp_path: Path) -> None:
    export_hub(open_source(mixture), tmp_path / "one", Changes(top_k=1))
    assert theirs(tmp_path / "one").config.num_experts_per_tok == 1
    with pytest.raises(RequestError, match="found 4"):
        export_hub(open_source(mixture), tmp_path / "four", Changes(top_k=4))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_member_comes_out_as_it_went_in(octad: Octad, tmp_path: Path, family: str) -> None:
    """A specialist of the feed-forward nets: transformers' logits of what comes out are those of what went in."""
    import yaml

    base = make_base(tmp_path / "base", family)
    full = full_member(base, tmp_path / "full", 2, only=".mlp.")
    lora = adapter(base, tmp_path / "lora", 1)
    experts = [
        {"name": name, "model": str(path), "data": str(text_file(tmp_path, seed))}
        for seed, (name, path) in enumerate({"lora": lora, "full": full}.items())
    ]
    recipe = {"base": str(base), "experts": experts, "router": {"tokens": 100, "window": 32}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert octad("combine", tmp_path / "r.yaml", "-o", tmp_path / "m")[0] == 0
    code, out, err = octad("export", tmp_path / "m", "--member", "full", "-o", tmp_path / "again")
    assert code == 0, err
    assert "wrote" in out
    assert torch.equal(logits(tmp_path / "again"), logits(full))
    assert octad("inspect", tmp_path / "again")[0] == 0
    assert not (tmp_path / "again" / "octad.json").exists()
    if family == "llama":
        code, out, err = octad("export", tmp_path / "m", "--to", "gguf", "-o", tmp_path / "m.gguf")
        assert code == 0, err
        assert (tmp_path / "Modelfile").read_text().startswith("FROM ./m.gguf\n")
        assert octad("inspect", tmp_path / "m.gguf")[0] == 0


def test_a_member_of_a_mixture_with_dense_layers(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Layers without experts are shared; transformers' own tensors of expert 1 and of layer 0 are found."""
    path = Path(shutil.copytree(tiny_checkpoint("qwen3_moe", moe_intermediate_size=48), tmp_path / "m"))
    byte_tokenizer().save(path)
    member = member_source(open_source(path), "1")
    tensors = load_file(path / "model.safetensors")
    shared, own = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(member.read(shared), tensors[shared])
    assert torch.equal(member.read(own), tensors["model.layers.1.mlp.experts.1.up_proj.weight"])
    export_hub(member, tmp_path / "out", Changes())
    assert type(theirs(tmp_path / "out")).__name__ == "Qwen3ForCausalLM"


def test_members_that_are_not_there(mixture: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    assert torch.equal(
        member_source(open_source(mixture), "two").read("model.layers.1.mlp.down_proj.weight"),
        load_file(mixture / "model.safetensors")["model.layers.1.block_sparse_moe.experts.1.w2.weight"],
    )
    with pytest.raises(RequestError, match="there are one, two, three"):
        member_source(open_source(mixture), "four")
    with pytest.raises(RequestError, match="is dense"):
        member_source(open_source(tiny_checkpoint("llama")), "one")
    with pytest.raises(RequestError, match="no dense family here holds"):
        member_source(open_source(tiny_checkpoint("olmoe")), "0")
    with pytest.raises(RequestError, match="has a shared expert beside the others"):
        member_source(open_source(tiny_checkpoint("qwen2_moe")), "0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "onnx"), "allowed: hf, gguf, compressed-tensors"),
        (("--to", "gguf", "--untie"), "--untie has no effect"),
        (("--to", "gguf", "--for", "sglang"), "--for has no effect with --to gguf"),
        (("--to", "gguf", "--top-k", "0"), "--top-k has no effect with --to gguf"),
        (("--to", "gguf", "--shard-size", "1"), "--shard-size has no effect with --to gguf"),
        (("--shard-size", "nan"), "--shard-size: found nan;"),
        (("--quantize", "int8"), "--quantize has no effect with --to hf"),
        (("--for", "tgi"), "known: sglang"),
        (("--to", "compressed-tensors", "--quantize", "int5"), "allowed: int8, int4"),
        (("--dtype", "int3"), "allowed: float32"),
    ],
)
def test_what_cannot_be_is_refused(
    octad: Octad, mixture: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    code, _, err = octad("export", mixture, *arguments, "-o", tmp_path / "out")
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_groups_that_no_fast_kernel_takes_are_refused(octad: Octad, mixture: Path, tmp_path: Path) -> None:
    code, _, err = octad("export", mixture, "--to", "compressed-tensors", "-o", tmp_path / "out")
    assert code == 2
    assert "groups of 8" in err or "groups of 16" in err


def test_the_modelfile_of_smollm2() -> None:
    """Its template is ChatML with a system text of its own."""
    tokenizer = load_tokenizer(open_source(smollm2_path()))
    system = chatml_system(tokenizer)
    assert system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    text, has_template = modelfile(tokenizer, "m.gguf")
    assert has_template
    assert f'SYSTEM """{system}"""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert modelfile(byte_tokenizer(), "m.gguf") == ("FROM ./m.gguf\n", False)


def test_a_member_of_a_gguf_mixture_has_its_tokenizer(octad: Octad, mixture: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    assert octad("export", mixture, "--to", "gguf", "-o", file)[0] == 0
    code, _, err = octad("export", file, "--member", "1", "-o", tmp_path / "one")
    assert code == 0, err
    with torch.no_grad():
        wanted = theirs(mixture).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(theirs(tmp_path / "one").state_dict()["model.embed_tokens.weight"], wanted)
    ours = load_tokenizer(open_source(tmp_path / "one"))
    assert ours.encode("hello") == load_tokenizer(open_source(mixture)).encode("hello")
