"""Quantised checkpoints: what is on disk by hand and by other people's code, loaded as it is, refused where damaged."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from tiny import byte_tokenizer, ids, prompts
from tiny_models import FAMILIES, Octad, TinyCheckpoint

from octad import LLM, SamplingParams
from octad.checkpoint.inspect import inspect
from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.checkpoint.names import is_linear, tensor_plan
from octad.checkpoint.quantized import ATTENTION_TARGET, QuantizedSource, pack_int32, unpack_int32
from octad.checkpoint.schemes import Scheme
from octad.errors import CheckpointError, OutputError, RequestError
from octad.evaluate import rounding
from octad.evaluate.heldout import read_texts
from octad.evaluate.nats import bits_per_byte, window_nats
from octad.evaluate.price import bytes_per_parameter
from octad.evaluate.rounding import quantize_and_judge
from octad.fast.held import load_quantized
from octad.fast.optimize import native_kernels, optimize
from octad.fast.probe import Probe
from octad.fast.quantize import (
    PackedExperts,
    PackedLinear,
    Precision,
    head_weight,
    held_precision,
    swap_linears,
)
from octad.fast.saved import save_quantized
from octad.kernels.packed import Packed, pack
from octad.kernels.packing import quick_pack
from octad.model.moe import MoE
from octad.model.transformer import Transformer

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=1)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}  # whole groups of inputs
OWN = {
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 64},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def original(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Any:
    """original("mixtral") -> a checkpoint with a tokenizer, in bfloat16, of sizes that groups divide."""

    def make(family: str, **changes: Any) -> Path:
        made = tiny_checkpoint(family, **SIZES | OWN.get(family, {}) | changes)
        path = Path(shutil.copytree(made, tmp_path / f"{family}-original"))
        byte_tokenizer().save(path)
        return path

    return make


def save(path: Path, name: str, **options: Any) -> Path:
    return save_quantized(open_source(path), path.with_name(f"{path.name}-{name}"), name, **options)


def by_hand(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """A weight from the file, value by value: the lowest bits of an int32 first, 2^(bits-1) too much, times its scale."""
    outputs, inputs = tensors[f"{name}_shape"].tolist()
    packed, scales = tensors[f"{name}_packed"].tolist(), tensors[f"{name}_scale"].double().tolist()
    each, group = 32 // bits, inputs // len(scales[0])
    return torch.tensor(
        [
            [
                (((packed[o][k // each] >> (bits * (k % each))) & (2**bits - 1)) - 2 ** (bits - 1))
                * scales[o][k // group]
                for k in range(inputs)
            ]
            for o in range(outputs)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_int32_and_back(bits: int) -> None:
    raw = torch.randint(0, 1 << bits, (5, 24), dtype=torch.uint8)
    packed = pack_int32(raw, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, 24 * bits // 32)
    assert torch.equal(unpack_int32(packed, bits), raw)


def assert_nearest_at_a_tried_scale(w: torch.Tensor, raw: torch.Tensor, scales: torch.Tensor) -> None:
    """Each scale puts the group's largest value at -8, or a little inside or outside; integers are the nearest to it."""
    blocks, steps = w.view(*scales.shape, 32), scales.float()[..., None]
    assert torch.equal(raw.view(blocks.shape).float() - 8, (blocks / steps).round().clamp(-8, 7))
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    places = torch.tensor([0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05])
    assert ((steps * 8 / largest).abs() - places).abs().amin(-1).max() < 0.01


@pytest.mark.parametrize(("name", "bits", "group"), [("int8", 8, 64), ("int4", 4, 32)])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written(family: str, name: str, bits: int, group: int, original: Any) -> None:
    """The integers and scales of rounding in memory; everything else byte for byte; a config that says so."""
    path = original(family)
    before = open_source(path)
    made = save(path, name)
    tensors = safetensors.torch.load_file(made / "model.safetensors")
    source = QuantizedSource(made)
    checked = 0
    for tensor, shape in tensor_plan(before.config).items():
        own = 8 if tensor == "lm_head.weight" or ".self_attn." in tensor else bits
        if is_linear(tensor) or tensor == "lm_head.weight":
            assert source.info(tensor).shape == shape
            wanted = source.read(tensor)
            if own == 8:
                assert torch.equal(wanted, pack(before.read(tensor), own).unpack())
            else:
                assert_nearest_at_a_tried_scale(before.read(tensor).float(), *source.integers(tensor))
            if checked < 3:
                assert torch.equal(by_hand(tensors, tensor, own), wanted.double())
            checked += 1
        else:
            assert torch.equal(tensors.pop(tensor), before.read(tensor))
            assert torch.equal(source.read(tensor), before.read(tensor))
    assert checked > 3
    assert {n.rpartition("_")[2] for n in tensors} == {"packed", "scale", "shape"}
    config = json.loads((made / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == json.loads((path / "config.json").read_text())
    assert said["quant_method"] == "compressed-tensors"
    groups = {one["targets"][0]: one["weights"] for one in said["config_groups"].values()}
    assert (groups["Linear"]["num_bits"], groups["Linear"]["group_size"]) == (bits, group)
    attention = [weights for target, weights in groups.items() if "self_attn" in target]
    assert [(own["num_bits"], own["group_size"]) for own in attention] == ([(8, 64)] if bits == 4 else [])
    assert (
        ("re:.*lm_head$" in groups)
        == ("lm_head" not in said["ignore"])
        == (not before.config.tie_word_embeddings)
    )
    assert "Rounded to" in (made / "README.md").read_text()


def test_the_attention_target_finds_attention_alone() -> None:
    """By the names that transformers gives its modules, and vLLM, which fuses some; a regex counts from the start."""
    found = {
        name: re.match(ATTENTION_TARGET.removeprefix("re:"), f"model.layers.3.{name}") is not None
        for name in (
            *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "o", "qkv")),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down", "gate_up")),
            *("self_attn.q_norm", "self_attn.rotary_emb", "mlp.gate", "mlp.shared_expert.up_proj"),
            *("mlp.experts.0.up_proj", "block_sparse_moe.experts.1.w2", "block_sparse_moe.experts"),
        )
    }
    assert {name for name, matches in found.items() if matches} == set(list(found)[:5])


def test_scales_may_be_negative(original: Any) -> None:
    """At 4 bits the value of largest magnitude is at -8, whatever its sign."""
    source = QuantizedSource(save(original("llama"), "int4"))
    raw, scales = source.integers("model.layers.0.mlp.up_proj.weight")
    assert (scales < 0).any()
    assert (scales > 0).any()
    assert int(raw.min()) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_weights(family: str, original: Any) -> None:
    """Through the compressed-tensors library. It keeps experts in bfloat16, everything else exactly."""
    import transformers

    path = original(family)
    for name in ("int8", "int4"):
        made = save(path, name)
        model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
        ours = load_model(QuantizedSource(made), torch.float32)
        for parameter, weight in ours.named_parameters():
            if ".experts." in parameter:
                weight.data = weight.data.bfloat16().float()
        tokens = torch.randint(0, 95, (2, 9))
        with torch.inference_mode():
            theirs, expected = model(tokens).logits, ours(tokens)
        off = (theirs - expected).abs().amax(-1) / expected.abs().mean()
        if ours.config.is_moe:  # experts multiply in bfloat16; and one token or another is routed otherwise
            assert off.median() < 0.03
        else:
            assert off.max() < 1e-6


# ---- loading -------------------------------------------------------------------------------------------------


def packed_weights(model: Transformer) -> dict[str, torch.Tensor]:
    found = {n: m.weight.unpack() for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    for n, m in model.named_modules():
        if isinstance(m, PackedExperts):
            for part in ("gate", "up", "down"):
                found |= {f"{n}.{part}.{e}": w.unpack() for e, w in enumerate(getattr(m, part))}
    return found


def rounded_by_costs(path: Path) -> Transformer:
    """By hand: all feed-forward nets in 4 bits, by what a probe finds."""
    model = load_model(open_source(path), torch.bfloat16)
    probe = Probe(model, native_kernels())

    def net(gate: Any, up: Any, down: Any, biases: Any = (None, None, None)) -> tuple[Packed, Packed, Packed]:
        first, second = (quick_pack(w.detach(), 4, cost_K=probe.cost_D) for w in (gate, up))
        last = quick_pack(down.detach(), 4, cost_K=probe.hidden(first, second, biases[:2]))
        probe.through(last, biases[2])
        return first, second, last

    for layer in model.model.layers:
        mlp: Any = layer.mlp
        swap_linears(layer.self_attn, 8)  # type: ignore[arg-type]
        probe.enter(layer)  # type: ignore[arg-type]
        if isinstance(mlp, MoE):
            stacks = zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)
            made = [net(*gate_up.chunk(2), down) for gate_up, down in stacks]
            mlp.experts, mlp = PackedExperts(*zip(*made, strict=True)), mlp.shared_expert
        if mlp is not None:
            parts = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
            packed = net(*(part.weight for part in parts), [part.bias for part in parts])
            for name, part, weight in zip(("gate", "up", "down"), parts, packed, strict=True):
                setattr(mlp, f"{name}_proj", PackedLinear(weight, part.bias))
    model.lm_head = PackedLinear(quick_pack(head_weight(model).detach(), 8))
    return model


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3", "qwen2"])
def test_a_saved_model_is_one_rounded_in_memory(family: str, name: str, native: bool, original: Any) -> None:
    """The same integers, so the same tokens and log-probabilities to the bit, natively and not."""
    path = original(family)
    made = save(path, name)
    options: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "block_size": 4, "num_blocks": 100}
    options["enable_prefix_caching"] = False  # every answer from the start
    given: Any = path if name == "int8" else (rounded_by_costs(path), load_tokenizer(open_source(path)))
    rounded = LLM(given, quantize=name, native=native, **options)
    for quantize in (None, name):
        saved = LLM(made, quantize=quantize, native=native, **options)
        expected, found = (llm.generate(prompts(4), GREEDY) for llm in (rounded, saved))
        assert ids(found) == ids(expected)
        assert [o.outputs[0].logprobs for o in found] == [o.outputs[0].logprobs for o in expected]


def test_integers_are_not_rounded_again(original: Any) -> None:
    """Into a model of bfloat16, float32 and float16 alike."""
    made = save(original("mixtral"), "int4")
    source = QuantizedSource(made)
    loaded = [
        packed_weights(load_quantized(source, t)) for t in (torch.float32, torch.bfloat16, torch.float16)
    ]
    for name, weight in loaded[0].items():
        assert all(torch.equal(other[name], weight) for other in loaded)
    at = "model.layers.1.block_sparse_moe.experts.2"
    for part, hub in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        found = loaded[1][f"model.layers.1.mlp.experts.{part}.2"]
        assert torch.equal(found, source.read(f"{at}.{hub}.weight"))
    biased = load_quantized(QuantizedSource(save(original("qwen2"), "int8")), torch.float32)
    assert biased.model.layers[0].self_attn.q_proj.bias is not None  # type: ignore[union-attr]
    assert not any(parameter.is_meta for parameter in biased.parameters())


def test_sizes_that_the_usual_group_does_not_divide(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """The largest that does; none at all is refused before anything is written."""
    odd = Path(shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "odd"))
    byte_tokenizer().save(odd)
    source = QuantizedSource(save(odd, "int8"))
    assert source.schemes.ffn.group == 8  # experts are 24 wide
    assert source.schemes.attention.group == 32  # heads of 16, four of them, on 32 inputs
    assert LLM(tmp_path / "odd-int8", num_blocks=20).generate([[1, 2]], GREEDY)
    worse = Path(shutil.copytree(tiny_checkpoint("llama", intermediate_size=20), tmp_path / "worse"))
    byte_tokenizer().save(worse)
    with pytest.raises(RequestError, match=r"down_proj.weight has 20 inputs, no multiple of 8"):
        save(worse, "int8")
    assert not (tmp_path / "worse-int8").exists()


def test_in_shards_and_over_an_earlier_one(original: Any) -> None:
    path = original("mixtral")
    whole, sharded = (
        save(path, "int8"),
        save_quantized(open_source(path), path.with_name("sharded"), "int8", max_shard_bytes=100e3),
    )
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, other = QuantizedSource(whole), QuantizedSource(sharded)
    assert one.names() == other.names()
    assert all(torch.equal(one.read(n), other.read(n)) for n in one.names())
    with pytest.raises(OutputError, match="exists"):
        save(path, "int8")
    save(path, "int4", overwrite=True)
    assert QuantizedSource(save(path, "int4", overwrite=True)).schemes.ffn.bits == 4


def test_it_is_itself_quantised(original: Any) -> None:
    made = save(original("llama"), "int8")
    with pytest.raises(CheckpointError, match="weights are quantised"):
        open_source(made)
    with pytest.raises(RequestError, match="found int4, but the checkpoint is int8 already"):
        optimize(load_quantized(QuantizedSource(made), torch.float32), quantize="int4")
    with pytest.raises(RequestError, match="allowed: int8, int4"):
        save_quantized(open_source(made.with_name("llama-original")), made.with_name("x"), "int2")


def test_inspect_counts_what_is_on_disk(original: Any) -> None:
    path = original("mixtral")
    plain, small = (inspect(s) for s in (open_source(path), open_source(save(path, "int4"), quantised=True)))
    assert plain.parameters == small.parameters
    linear = {n: s[0] * s[1] for n, s in tensor_plan(open_source(path).config).items() if is_linear(n)}
    attention = sum(size for n, size in linear.items() if ".self_attn." in n)
    assert small.bytes_on_disk["int4"] == (sum(linear.values()) - attention) // 2
    assert small.bytes_on_disk["int8"] == attention + 96 * 64  # and the head
    assert sum(small.bytes_on_disk.values()) < 0.6 * sum(plain.bytes_on_disk.values())
    assert [r.frobenius for r in small.routers] == [r.frobenius for r in plain.routers]


def test_4_bits_in_attention_as_earlier_versions_wrote_them(
    original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They load, run as they are, and answer to the name of int4."""
    path = original("mixtral")
    now = save(path, "int4")
    earlier = path.with_name("earlier")
    with monkeypatch.context() as patched:
        patched.setattr(Precision, "of", lambda name: Precision(4, 4, 8))
        save_quantized(open_source(path), earlier, "int4")
    source = QuantizedSource(earlier)
    assert source.schemes.attention == source.schemes.ffn == Scheme(4, 32)
    assert QuantizedSource(now).schemes.attention == Scheme(8, 64)
    model = load_quantized(source, torch.float32)
    assert held_precision(model) == Precision(4, 4, 8)
    for quantize in (None, "int4"):
        assert LLM(earlier, quantize=quantize, num_blocks=20).generate([[1, 2]], GREEDY)
    with pytest.raises(RequestError, match="found int8, but the checkpoint is int4 already"):
        optimize(model, quantize="int8")


def test_what_a_parameter_takes(original: Any) -> None:
    """Attention's share of a model of the asked-for shape in its bits, the rest in the experts'."""
    source, dense = QuantizedSource(save(original("mixtral"), "int4")), open_source(original("llama")).config
    for config in (source.config, dense):
        sizes = {n: torch.Size(s).numel() for n, s in tensor_plan(config).items()}
        attention = sum(size for n, size in sizes.items() if ".self_attn." in n)
        rest = sum(sizes.values()) - attention
        by_hand = attention * (1 + 2 / 64) + rest * (0.5 + 2 / 32)
        found = bytes_per_parameter(source, torch.bfloat16, config) * sum(sizes.values())
        assert found == pytest.approx(by_hand)
    assert bytes_per_parameter(open_source(original("qwen3")), torch.bfloat16, dense) == 2


# ---- damage --------------------------------------------------------------------------------------------------


def test_what_octad_does_not_write_is_refused(original: Any) -> None:
    made = save(original("llama"), "int4")
    config = json.loads((made / "config.json").read_text())

    def refused(match: str, **changes: Any) -> None:
        said = json.loads(json.dumps(config["quantization_config"]))
        weights = said["config_groups"]["group_0"]["weights"]
        for key, value in changes.items():
            (said if key in said else weights)[key] = value
        (made / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
        with pytest.raises(CheckpointError, match=match):
            open_source(made, quantised=True)

    refused("quant_method 'gptq'", quant_method="gptq")
    refused("format 'int-quantized'", format="int-quantized")
    refused("symmetric False", symmetric=False)
    refused("strategy 'channel'", strategy="channel")
    refused("actorder", actorder="group")


@pytest.mark.parametrize(
    ("suffix", "change", "match"),
    [
        ("packed", None, "is not quantised, which octad does not read"),
        ("scale", None, "do not make a weight"),
        ("shape", None, "do not make a weight"),
        ("scale", lambda t: t.half(), "do not make a weight"),
        ("scale", lambda t: t[:, :1].contiguous(), "differ in the precision of feed-forward nets"),
        ("scale", lambda t: t[1:].contiguous(), "do not make a weight"),
        ("packed", lambda t: t[:, 1:].contiguous(), "do not make a weight"),
        ("packed", lambda t: t.to(torch.int64), "do not make a weight"),
    ],
)
def test_damaged_files(suffix: str, change: Any, match: str, original: Any) -> None:
    made = save(original("llama"), "int4")
    file = made / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = f"model.layers.1.mlp.up_proj.weight_{suffix}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=match):
        open_source(made, quantised=True)


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_tells_what_rounding_costs(original: Any, octad: Octad) -> None:
    """The figures of the model card are those of the model before, and of what an LLM of the output runs."""
    path = original("mixtral", num_hidden_layers=1)
    texts = {"one": "abc def ghi jkl " * 20, "two": "the quick brown fox jumps over " * 12}
    for domain, text in texts.items():
        (path.parent / f"{domain}.txt").write_text(text)
    data = path.parent / "domains.yaml"
    data.write_text(yaml.safe_dump({"domains": {d: f"{d}.txt" for d in texts}}))
    (path / "octad.json").write_text(json.dumps({"experts": [{"name": n} for n in ("a", "b", "c")]}))
    output = path.with_name("out")
    code, printed, err = octad(
        "quantize", path, "-o", output, "--to", "int4", "--data", data, "--tokens", 200, "--window", 64
    )
    assert code == 0, err
    source = open_source(path)
    windows = read_texts(
        source, {d: [path.parent / f"{d}.txt"] for d in texts}, tokens=200, window=64
    ).domains
    llm = LLM(output, num_blocks=50)
    assert llm.expert_names == ["a", "b", "c"]
    written = (output / "README.md").read_text()
    before_model = load_model(source, llm.model.model.norm.weight.dtype)  # embeddings may be narrower
    for domain, part in windows.items():
        before, after = (bits_per_byte(window_nats(model, part), part) for model in (before_model, llm.model))
        assert before != after
        assert f"| {domain} | {before:.4f} | {after:.4f} |" in written
        assert f"{after:.4f}" in printed
    assert not list(output.glob(".*"))


def test_nothing_appears_before_it_is_judged(original: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = original("llama", num_hidden_layers=1), list[bool]()
    output = path.with_name("out")

    def judged(*arguments: Any) -> dict[str, float]:
        seen.append(output.exists())
        if len(seen) == 4:
            raise KeyboardInterrupt
        return {"one": 1.0}

    monkeypatch.setattr(rounding, "domain_bits", judged)
    quantize_and_judge(open_source(path), output, "int8", {"one": []})
    assert seen == [False, False]
    assert "| one | 1.0000 | 1.0000 |" in (output / "README.md").read_text()
    shutil.rmtree(output)
    with pytest.raises(KeyboardInterrupt):
        quantize_and_judge(open_source(path), output, "int8", {"one": []})
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


@pytest.mark.parametrize("place", [".", ".."])
def test_it_never_takes_the_place_of_what_it_reads(original: Any, place: str) -> None:
    path = original("llama", num_hidden_layers=1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(OutputError, match="what is read; choose another -o"):
        save_quantized(open_source(path), path / place, "int8", overwrite=True)
    assert before == {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_command_refuses_before_it_works(original: Any, octad: Octad) -> None:
    path = original("llama")
    for output, to, match in ((None, "int8", "add -o"), (path.with_name("o"), "int5", "allowed: int8, int4")):
        code, _, err = octad("quantize", path, "--to", to, *([] if output is None else ["-o", output]))
        assert code == 2
        assert match in err
    assert not path.with_name("o").exists()
