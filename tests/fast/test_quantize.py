"""Quantised modules without native kernels, and what `quantize` and `native` mean to an LLM."""

from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, ids, load, prompts
from tiny_models import FAMILIES, TinyCheckpoint
from torch import nn

from octad import LLM, SamplingParams
from octad.errors import RequestError
from octad.fast.native_layer import NativeLayer
from octad.fast.optimize import native_kernels, optimize
from octad.fast.quantize import PackedExperts, PackedLinear, Precision, held_precision, quantize_modules
from octad.kernels.compile import IsaError
from octad.kernels.packed import Packed, pack
from octad.model.moe import Experts, MoE
from octad.model.transformer import Transformer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
needs_native = pytest.mark.skipif(native_kernels() is None, reason="no native kernels on this machine")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def unpacked(model: Transformer, precision: Precision) -> Transformer:
    """The model's own modules with every weight rounded and unpacked again, one by one."""

    def rounded(weight: torch.Tensor, bits: int) -> nn.Parameter:
        return nn.Parameter(pack(weight.detach(), bits).unpack(), requires_grad=False)

    if model.lm_head is None:
        model.lm_head = nn.Linear(1, 1, bias=False)
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, module in model.named_modules():
        pair, down = precision.net(int((name.split(".") + ["0"] * 3)[2]), len(model.model.layers))
        if isinstance(module, nn.Linear) and not name.endswith("shared_expert_gate"):
            net = down if name.endswith("down_proj") else pair
            own = precision.attention if ".self_attn." in name else net
            module.weight = rounded(module.weight, precision.head if name == "lm_head" else own)
        if isinstance(module, Experts):
            for stack, bits in ((module.gate_up_proj, pair), (module.down_proj, down)):
                for weight in stack.data:
                    weight.copy_(rounded(weight, bits))
    return model


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpacking_on_the_fly_is_the_unpacked_model(
    family: str, name: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    model, twin = load(tiny_checkpoint(family)), load(tiny_checkpoint(family))
    quantize_modules(model, Precision.of(name))
    tokens = torch.randint(0, 96, (2, 11))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), unpacked(twin, Precision.of(name))(tokens))
    assert held_precision(model) == Precision.of(name)
    assert held_precision(twin) is None
    left = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Experts))}
    assert all(n.endswith("shared_expert_gate") for n in left)


def test_what_costs_most_keeps_8_bits_and_embeddings_stay(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("qwen3", num_hidden_layers=6))
    before = model.model.embed_tokens.weight.clone()
    quantize_modules(model, Precision.of("int4"))
    assert isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.weight.bits == 8
    assert torch.equal(model.model.embed_tokens.weight, before)
    bits = {n: m.weight.bits for n, m in model.model.named_modules() if isinstance(m, PackedLinear)}
    parts = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 8)
    parts |= {"gate_proj": 4, "up_proj": 4, "down_proj": 8}
    first = {name: own for name, own in bits.items() if name.startswith("layers.0.")}
    assert set(first.values()) == {8}  # of six layers the first
    assert {name.rpartition(".")[2]: own for name, own in bits.items() if name not in first} == parts
    assert [Precision.of("int4").first(layers) for layers in (1, 4, 5, 24, 30, 32, 80)] == [
        0,
        0,
        1,
        2,
        3,
        3,
        8,
    ]


@pytest.mark.parametrize("native", [True, False])
def test_4_bits_in_attention_run_as_they_were_saved(native: bool, tiny_checkpoint: TinyCheckpoint) -> None:
    """Earlier versions' int4: asked for by name or not, its integers are kept."""
    tokens, found = torch.randint(0, 96, (2, 11)), []
    for quantize in (None, "int4"):
        model = load(tiny_checkpoint("mixtral"))
        earlier = Precision(4, 4, 8)
        quantize_modules(model, earlier)
        assert held_precision(model) == earlier
        optimize(model, quantize=quantize, native=native)
        with torch.inference_mode():
            found.append(model(tokens))
    twin = load(tiny_checkpoint("mixtral"))
    quantize_modules(twin, earlier)
    with torch.inference_mode():
        expected = twin(tokens)
    assert torch.equal(found[0], found[1])
    off = (found[0] - expected).square().mean(-1).sqrt() / expected.square().mean().sqrt()
    assert off.median() < 0.03
    if not native:
        assert torch.equal(found[0], expected)


def test_quantising_twice_changes_nothing(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("mixtral"))
    quantize_modules(model, Precision.of("int4"))
    kept = {n: m for n, m in model.named_modules() if isinstance(m, (PackedLinear, PackedExperts))}
    quantize_modules(model, Precision.of("int4"))
    assert all(model.get_submodule(n) is m for n, m in kept.items())


def test_a_precision_that_cannot_be(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(RequestError, match="found 'int3', allowed: int8, int4"):
        optimize(load(tiny_checkpoint("llama")), quantize="int3")
    held = load(tiny_checkpoint("llama"))
    quantize_modules(held, Precision.of("int4"))
    with pytest.raises(RequestError, match="found int8, but the checkpoint is int4 already"):
        optimize(held, quantize="int8")


# ---- a whole LLM ---------------------------------------------------------------------------------------------


def make_llm(checkpoint: Path, dtype: torch.dtype, quantize: str | None, *, native: bool = True) -> LLM:
    model = load(checkpoint).to(dtype)
    given = (model, byte_tokenizer())
    sizes = {"block_size": 4, "num_blocks": 400, "max_num_batched_tokens": 2048}
    return LLM(given, quantize=quantize, native=native, enable_prefix_caching=False, **sizes)


def is_native(llm: LLM) -> bool:
    return all(isinstance(layer, NativeLayer) for layer in llm.model.model.layers)


@needs_native
@pytest.mark.parametrize("quantize", ["int8", "int4", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2", "olmoe"])
def test_batched_is_alone_to_the_bit(
    family: str, dtype: torch.dtype, quantize: str | None, tiny_checkpoint: TinyCheckpoint
) -> None:
    """With 15 others of mixed lengths, some of one token, which come and go: the same tokens, the same log-probabilities,
    the same routing."""
    llm = make_llm(tiny_checkpoint(family), dtype, quantize)
    assert is_native(llm)
    batch = prompts(16)
    batch[7] = [5]
    params = [
        SamplingParams(**vars(GREEDY) | {"max_tokens": 3 + n, "routed_experts": bool(llm.expert_names)})
        for n in range(16)
    ]
    together = llm.generate(batch, params)
    for n in (0, 7, 11, 15):
        alone = llm.generate([batch[n]], params[n])[0].outputs[0]
        beside = together[n].outputs[0]
        assert beside.token_ids == alone.token_ids
        assert beside.logprobs == alone.logprobs
        if llm.expert_names:
            assert torch.equal(beside.routed_experts, alone.routed_experts)  # type: ignore[arg-type]
            assert torch.equal(beside.routed_weights, alone.routed_weights)  # type: ignore[arg-type]


@needs_native
def test_a_decoding_answer_does_not_change_when_a_prompt_joins(tiny_checkpoint: TinyCheckpoint) -> None:
    """The step that reads a prompt goes through the parts of each layer, the steps around it do not."""
    llm = make_llm(tiny_checkpoint("mixtral"), torch.bfloat16, None)
    params = SamplingParams(**vars(GREEDY) | {"max_tokens": 20})
    expected = llm.generate([[1, 2, 3]], params)[0].outputs[0]
    stream, seen = llm.stream([1, 2, 3], params), []
    for number, delta in enumerate(stream):
        seen += [t for top in delta.logprobs or () for t in [top.chosen]]
        if number in (3, 4, 9):
            llm.engine.add_request(f"other {number}", list(range(1, 30 + number)), GREEDY)
    assert [t.token_id for t in seen] == expected.token_ids
    assert seen == [t.chosen for t in expected.logprobs or []]


@needs_native
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_only_one_expert_natively(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """As wide a routing as the router's is asked for nowhere: one expert of a model with two a token."""
    llm, slow = (
        make_llm(tiny_checkpoint(family), torch.float32, "int8", native=native) for native in (True, False)
    )
    batch, answers = prompts(6, 2), []
    params = SamplingParams(**vars(GREEDY) | {"routed_experts": True})
    for number in range(3):
        llm.only(number)
        slow.only(number)
        found, expected = llm.generate(batch, params), slow.generate(batch, params)
        assert all(set(o.outputs[0].speakers or ()) == {number} for o in found)
        first = [(o.outputs[0].logprobs or [])[0].chosen for o in found]
        for ours, theirs in zip(first, expected, strict=True):
            top = (theirs.outputs[0].logprobs or [])[0].chosen
            assert ours.logprob == pytest.approx(top.logprob, abs=0.2)
        answers.append(tuple(map(tuple, ids(found))))
    assert len(set(answers)) == 3
    llm.only(None)
    free = llm.generate(batch, params)
    assert len({e for o in free for e in o.outputs[0].speakers or ()}) > 1


def test_without_a_compiler_an_llm_works(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And says what that costs, in one line each; not where the kernels were not wanted."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_kernels() is None
    for quantize in (None, "int8"):
        llm = make_llm(tiny_checkpoint("mixtral"), torch.float32, quantize)
        assert not is_native(llm)
        assert "no C compiler found" in caplog.messages[-1]
        assert ("about three times as long" in caplog.messages[-1]) == (quantize is not None)
        slow = make_llm(tiny_checkpoint("mixtral"), torch.float32, quantize, native=False)
        assert ids(llm.generate(prompts(3), GREEDY)) == ids(slow.generate(prompts(3), GREEDY))
    assert len(caplog.messages) == 2


@needs_native
def test_where_native_modules_are_used(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_checkpoint("llama")
    assert is_native(make_llm(path, torch.bfloat16, None))
    assert is_native(make_llm(path, torch.float32, "int4"))
    assert is_native(make_llm(path, torch.float32, None))
    assert not is_native(make_llm(path, torch.float16, "int8"))
    assert not is_native(make_llm(path, torch.bfloat16, "int8", native=False))

    assert "do not run in float16" in caplog.messages[-1]
    monkeypatch.setenv("OCTAD_ISA", "portable")
    llm = make_llm(path, torch.float32, "int8")
    assert is_native(llm)
    assert llm.model.model.kernels.isa == "portable"
    monkeypatch.setenv("OCTAD_ISA", "avx9")
    with pytest.raises(IsaError, match="found 'avx9'"):
        make_llm(path, torch.float32, "int8")


@needs_native
def test_packing_frees_what_it_replaces(tiny_checkpoint: TinyCheckpoint) -> None:
    """No weight is kept twice: what parameters are left are norms, routers and the embeddings."""
    llm = make_llm(tiny_checkpoint("mixtral"), torch.bfloat16, "int8")
    left = {name.split(".")[-2] for name, _ in llm.model.named_parameters()}
    assert left == {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "gate"}
    mixtures = [layer.mlp for layer in llm.model.model.layers if isinstance(layer.mlp, MoE)]
    for moe in mixtures:
        held = moe.experts.gate.tensors  # type: ignore[union-attr]
        assert all(isinstance(t, torch.Tensor) and t.dtype == torch.uint8 for t in held)
    assert Packed(held[0], 48, 32, 8, 64).unpack().shape == (48, 32)
