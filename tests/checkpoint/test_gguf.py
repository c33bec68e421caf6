"""GGUF files written by the gguf package from tiny transformers models, read back and compared with both."""

import json
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from bundled import smollm2_path
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from octad.checkpoint.gguf.header import GGUFHeader
from octad.checkpoint.gguf.reader import GGUFSource
from octad.checkpoint.load import open_source
from octad.checkpoint.names import tensor_plan
from octad.errors import CheckpointError, OctadError
from octad.model import cost

Q = gguf.GGMLQuantizationType
COMMON = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SPARSE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=32),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2),
    "qwen2moe": lambda: transformers.Qwen2MoeConfig(**COMMON, **SPARSE, shared_expert_intermediate_size=64),
    "qwen3moe": lambda: transformers.Qwen3MoeConfig(**COMMON, **SPARSE, head_dim=64, norm_topk_prob=True),
    "olmoe": lambda: transformers.OlmoeConfig(**COMMON, num_experts=3, num_experts_per_tok=2),
}
ARCH = {arch: gguf.MODEL_ARCH_NAMES[arch] for arch in gguf.MODEL_ARCH}
BY_NAME = {name: arch for arch, name in ARCH.items()}


def tiny_model(kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:  # norms and biases start as ones and zeros, which would hide a mix-up
                value.copy_(torch.rand_like(value) + (0.5 if "norm" in name else -0.5))
            else:
                value.mul_(3)
    return model


def interleave(weight, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model, arch):
    """What llama.cpp's converter would store, by the gguf package's own table of names."""
    config = model.config
    names = gguf.get_tensor_name_map(BY_NAME[arch], config.num_hidden_layers)
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            array = interleave(
                array, config.num_attention_heads if ".q_" in name else config.num_key_value_heads
            )
        stem, kind = name.rsplit(".", 1)
        if stem.endswith("experts"):  # transformers keeps them stacked: [E, 2F, D] and [E, D, F]
            block = f"blk.{name.split('.')[2]}"
            if kind == "down_proj":
                yield f"{block}.ffn_down_exps.weight", array
            else:
                half = array.shape[1] // 2
                yield f"{block}.ffn_gate_exps.weight", np.ascontiguousarray(array[:, :half])
                yield f"{block}.ffn_up_exps.weight", np.ascontiguousarray(array[:, half:])
        elif stem.endswith(("mlp.gate", "block_sparse_moe.gate")):
            yield f"blk.{name.split('.')[2]}.ffn_gate_inp.weight", array
        else:
            if stem.endswith("shared_expert_gate"):
                array = array.reshape(-1)
            yield f"{names.get_name(stem)}.{kind}", array


def write_metadata(writer, config, arch):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def write_gguf(path, model, kind, quant=Q.F32, extra=None, tensors=None):
    """Write a model. Returns the float32 values that each stored tensor stands for."""
    arch = "llama" if kind == "mixtral" else kind
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, model.config, arch)
    if extra is not None:
        extra(writer)
    values = {}
    for name, array in tensors if tensors is not None else gguf_tensors(model, arch):
        matrix = array.ndim > 1 and "ffn_gate_inp" not in name
        kept = quant if matrix else Q.F32
        stored = quantize(array, kept)
        writer.add_tensor(name, stored, raw_dtype=kept)
        values[name] = dequantize(stored, kept).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def logits_of(model):
    ids = torch.arange(24).reshape(2, 12) * 3 % 96
    with torch.no_grad():
        return model(ids).logits


def as_transformers_model(source, directory):
    """The source's tensors as a hub checkpoint, loaded by transformers."""
    tensors = {name: source.read(name).contiguous() for name in source.names()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(source.config.raw)))
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_gives_the_original_logits(kind, tmp_path):
    model = tiny_model(kind)
    write_gguf(tmp_path / "tiny.gguf", model, kind)
    source = GGUFSource(tmp_path / "tiny.gguf")
    assert source.info("model.norm.weight").dtype == torch.float32
    loaded = as_transformers_model(source, tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_and_shapes_are_the_plan(kind, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model(kind), kind)
    source = GGUFSource(tmp_path / "tiny.gguf")
    assert {name: source.info(name).shape for name in source.names()} == tensor_plan(source.config)
    assert source.config.eos_token_ids == (2,)


@pytest.mark.parametrize("quant", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1])
def test_quantised_values(quant, tmp_path):
    model = tiny_model("llama")
    values = write_gguf(tmp_path / "tiny.gguf", model, "llama", quant)
    source = GGUFSource(tmp_path / "tiny.gguf", dtype=torch.float32)
    for hub, stored, heads in [
        ("model.embed_tokens.weight", "token_embd.weight", 0),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight", 0),
        ("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight", 4),
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", 2),
    ]:
        read = source.read(hub).numpy()
        np.testing.assert_array_equal(interleave(read, heads) if heads else read, values[stored])
    default = GGUFSource(tmp_path / "tiny.gguf")
    expected = torch.float32 if quant in (Q.F32, Q.F16) else torch.bfloat16  # norms are F32 in every file
    assert default.info("model.norm.weight").dtype == default.read("model.norm.weight").dtype == expected
    weights = torch.float16 if quant == Q.F16 else expected
    assert default.config.torch_dtype == str(weights).removeprefix("torch.")


@pytest.mark.parametrize("quant", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0])
def test_exactly(quant, tmp_path):
    """No value that a file stands for is rounded on reading: F16 stays float16, what is quantised comes in float32."""
    values = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), "llama", quant)
    source = open_source(tmp_path / "tiny.gguf", exact=True)
    name, stored = "model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"
    found = source.read(name)
    expected = {Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(quant, torch.float32)
    assert found.dtype == source.info(name).dtype == expected
    np.testing.assert_array_equal(found.float().numpy(), values[stored])
    assert source.read("model.norm.weight").dtype == torch.float32
    if quant == Q.F16:
        default = open_source(tmp_path / "tiny.gguf").read(name)
        np.testing.assert_array_equal(default.float().numpy(), values[stored])


@pytest.mark.parametrize("quant", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL, Q.IQ4_XS])
def test_quantised_bytes_made_by_hand(quant, tmp_path):
    """For the types that gguf cannot quantise: random bytes (scales kept finite), stacked experts included."""
    model, random = tiny_model("mixtral"), np.random.default_rng(0)
    writer, raw = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama"), {}
    write_metadata(writer, model.config, "llama")
    for name, array in gguf_tensors(model, "llama"):
        if "_exps" in name or "ffn_down" in name:
            block, size = gguf.GGML_QUANT_SIZES[quant]
            shape = (*array.shape[:-1], array.shape[-1] // block * size)
            raw[name] = random.integers(0, 0x38, shape, dtype=np.uint8)  # no byte makes a half an inf or nan
            writer.add_tensor(name, raw[name], raw_dtype=quant)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "tiny.gguf", dtype=torch.float32)
    for part, letter in [("gate", "w1"), ("up", "w3"), ("down", "w2")]:
        expected = dequantize(raw[f"blk.1.ffn_{part}_exps.weight"], quant)
        for expert in range(3):
            read = source.read(f"model.layers.1.block_sparse_moe.experts.{expert}.{letter}.weight")
            np.testing.assert_array_equal(read.numpy(), expected[expert])


def test_header_agrees_with_the_gguf_package(tmp_path):
    def extra(writer):
        writer.add_chat_template("{{ messages }}")
        writer.add_token_list(["a", "ä", "€"])
        writer.add_token_scores([0.5, -1.0, 2.0])
        writer.add_token_types([1, 3, 4])
        writer.add_add_bos_token(True)
        writer.add_uint64("llama.some.big", 2**40)
        writer.add_custom_alignment(64)

    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), "llama", Q.Q8_0, extra)
    ours, theirs = GGUFHeader.read(tmp_path / "tiny.gguf"), gguf.GGUFReader(tmp_path / "tiny.gguf")
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value, found = field.contents(), ours.metadata[key]
            assert (list(found) if isinstance(value, list) else found) == value, key
    for tensor in theirs.tensors:
        row = ours.tensors[tensor.name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        assert (row.shape, row.type, row.offset) == (shape, int(tensor.tensor_type), tensor.data_offset)


def test_one_tensor_per_expert_as_in_old_files(tmp_path):
    model = tiny_model("mixtral")
    tensors = []
    for name, array in gguf_tensors(model, "llama"):
        if "_exps" in name:
            stem = name.removesuffix("_exps.weight")
            tensors += [(f"{stem}.{e}.weight", array[e]) for e in range(3)]
        else:
            tensors.append((name, array))
    write_gguf(tmp_path / "old.gguf", model, "mixtral", tensors=tensors)
    loaded = as_transformers_model(GGUFSource(tmp_path / "old.gguf"), tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-5, atol=1e-5)


def test_tied_head(tmp_path):
    model = tiny_model("llama")
    tensors = [(n, a) for n, a in gguf_tensors(model, "llama") if n != "output.weight"]
    write_gguf(tmp_path / "tied.gguf", model, "llama", tensors=tensors)
    source = GGUFSource(tmp_path / "tied.gguf")
    assert source.config.tie_word_embeddings
    assert "lm_head.weight" not in source.names()


def llama3_file(tmp_path, factors):
    model = tiny_model("llama")
    tensors = [*gguf_tensors(model, "llama"), ("rope_freqs.weight", factors)]
    write_gguf(tmp_path / "rope.gguf", model, "llama", tensors=tensors)
    return tmp_path / "rope.gguf"


def test_llama3_rope_is_recovered_from_its_factors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(**{**COMMON, "rope_theta": None}, rope_parameters=scaling)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 50000.0 ** (-torch.arange(0, 64, 2) / 64)
    source = GGUFSource(llama3_file(tmp_path, (plain / scaled).numpy().astype(np.float32)))
    rope = source.config.rope
    assert (rope.type, rope.theta) == ("llama3", 50000.0)
    assert {key: rope.get(key) for key in scaling if "rope" not in key} == {
        key: value for key, value in scaling.items() if "rope" not in key
    }


def test_other_rope_factors_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="rope_freqs"):
        GGUFSource(llama3_file(tmp_path, np.linspace(1, 9, 32, dtype=np.float32)))


def test_linear_and_yarn_scaling(tmp_path):
    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    def longrope(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_factor(2.0)

    found = {}
    for name, extra in {"linear": linear, "yarn": yarn}.items():
        write_gguf(tmp_path / f"{name}.gguf", tiny_model("qwen3"), "qwen3", extra=extra)
        found[name] = GGUFSource(tmp_path / f"{name}.gguf").config.rope
    assert (found["linear"].type, found["linear"].get("factor")) == ("linear", 4.0)
    assert (found["yarn"].type, found["yarn"].get("original_max_position_embeddings")) == ("yarn", 64)
    write_gguf(tmp_path / "long.gguf", tiny_model("qwen3"), "qwen3", extra=longrope)
    with pytest.raises(CheckpointError, match="longrope"):
        GGUFSource(tmp_path / "long.gguf")


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write_gguf(path, tiny_model("llama"), "llama", Q.Q8_0)
    return path.read_bytes()


def test_not_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFSource(tmp_path / "x.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFSource(tmp_path / "empty.gguf")
    with pytest.raises(CheckpointError, match="no such file"):
        GGUFSource(tmp_path / "absent.gguf")


def test_every_truncation_is_one_clear_error(good, tmp_path):
    path = tmp_path / "cut.gguf"
    for size in [4, 7, 20, 30, 100, 333, 700, 1500, 2500, len(good) // 2, len(good) - 40]:
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match="truncated") as error:
            GGUFSource(path)
        assert "\n" not in str(error.value)


def test_random_damage_to_the_header_never_ends_in_anything_but_an_octad_error(good, tmp_path):
    random, path, messages = np.random.default_rng(1), tmp_path / "bad.gguf", []
    for _ in range(150):
        data = bytearray(good)
        at = int(random.integers(0, 3000))
        data[at : at + 4] = random.integers(0, 256, 4, dtype=np.uint8).tobytes()
        path.write_bytes(data)
        try:
            source = GGUFSource(path)
            source.read("model.layers.0.self_attn.q_proj.weight")
        except OctadError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)


def test_lying_counts_do_not_hang(good, tmp_path):
    path = tmp_path / "lie.gguf"
    path.write_bytes(good[:16] + struct.pack("<Q", 2**60) + good[24:])
    with pytest.raises(CheckpointError, match="damaged"):
        GGUFSource(path)
    array = (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", 1)
        + b"k"
        + struct.pack("<IIQ", 9, 0, 2**60)
    )
    path.write_bytes(array)
    with pytest.raises(CheckpointError, match="damaged"):
        GGUFSource(path)


def test_big_endian(good, tmp_path):
    (tmp_path / "big.gguf").write_bytes(b"GGUF" + struct.pack(">I", 3) + good[8:])
    with pytest.raises(CheckpointError, match="big-endian"):
        GGUFSource(tmp_path / "big.gguf")


def test_unsupported_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'bert' is not supported"):
        GGUFSource(tmp_path / "bert.gguf")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale"),
        (lambda w: w.add_sliding_window(64), "llama.attention.sliding_window"),
        (lambda w: w.add_rope_dimension_count(16), "rope.dimension_count"),
        (lambda w: w.add_uint16("split.count", 2), "llama-gguf-split"),
        (lambda w: w.add_causal_attention(False), "causal"),
        (lambda w: w.kv_data[0]["llama.block_count"].__setattr__("value", 2**31), "2147483648 layers"),
        (lambda w: w.add_expert_count(2**31) or w.add_expert_used_count(2), "2147483648 experts"),
    ],
)
def test_what_changes_the_arithmetic_is_refused_by_name(extra, message, tmp_path):
    write_gguf(tmp_path / "x.gguf", tiny_model("llama"), "llama", extra=extra)
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(tmp_path / "x.gguf")


def test_missing_strange_and_misshapen_tensors(tmp_path):
    model = tiny_model("llama")
    tensors = dict(gguf_tensors(model, "llama"))
    missing = [(n, a) for n, a in tensors.items() if n != "blk.1.ffn_up.weight"]
    write_gguf(tmp_path / "missing.gguf", model, "llama", tensors=missing)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight \[256, 256\] is missing"):
        GGUFSource(tmp_path / "missing.gguf")
    strange = [*tensors.items(), ("blk.0.ssm_a.weight", np.ones(4, np.float32))]
    write_gguf(tmp_path / "strange.gguf", model, "llama", tensors=strange)
    with pytest.raises(CheckpointError, match=r"blk.0.ssm_a.weight has no place"):
        GGUFSource(tmp_path / "strange.gguf")
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:128]
    write_gguf(tmp_path / "shape.gguf", model, "llama", tensors=tensors.items())
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight is \[128, 256\].*\[256, 256\]"):
        GGUFSource(tmp_path / "shape.gguf")


def test_unknown_tensor_name_on_reading(good, tmp_path):
    (tmp_path / "good.gguf").write_bytes(good)
    with pytest.raises(CheckpointError, match="there is no tensor nope"):
        GGUFSource(tmp_path / "good.gguf").read("nope")


def test_without_the_gguf_package(good, tmp_path, monkeypatch):
    (tmp_path / "good.gguf").write_bytes(good)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(CheckpointError, match=r"pip install 'octad\[gguf\]'"):
        GGUFSource(tmp_path / "good.gguf")


# ---- the real base ---------------------------------------------------------------------------------------


def test_smollm2_configuration():
    config = GGUFSource(smollm2_path()).config
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("llama", 49152, 576)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope.theta, config.rms_norm_eps, config.tie_word_embeddings) == (100000.0, 1e-5, True)
    assert cost.parameters(config) == 134_515_008


@pytest.mark.slow
def test_smollm2_tensors_are_those_that_transformers_reads():
    path = smollm2_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs, source = model.state_dict(), GGUFSource(path, dtype=torch.float32)
    for name in source.names():
        assert torch.equal(source.read(name), theirs[name]), name
    digest = source.provenance()["files"][0]
    assert (digest["bytes"], len(digest["sha256"])) == (path.stat().st_size, 64)
