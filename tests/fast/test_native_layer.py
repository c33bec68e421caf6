"""Native modules in whole models: the layer in one call is the composition of its parts to the bit, and the parts are
the model room's modules with rounded weights and activations."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from kernel_builds import emulations, kernels_of
from recording import recording
from tiny import load
from tiny_models import FAMILIES, TinyCheckpoint
from torch import nn

from octad.engine.model_runner import ModelRunner
from octad.fast.native_layer import NativeLayer
from octad.fast.native_modules import native_attention
from octad.fast.optimize import exact_precision, native_kernels, swap
from octad.fast.quantize import PackedLinear, Precision, quantize_modules
from octad.kernels.compile import BuildError
from octad.kernels.compile import load as build_kernels
from octad.kernels.native import NativeKernels
from octad.kernels.packed import linear_reference
from octad.kernels.paged import PagedBatch, paged_attention_reference
from octad.model.moe import FixedRouter, MoE, Router
from octad.model.paged_cache import BlockPool, PagedCache
from octad.model.transformer import Transformer

COMPOSED = ("qwen2_moe", "olmoe")  # a shared expert; norms over all heads, clipping
CASES: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama with biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "sliding mistral": ("mistral", {"sliding_window": 6}),
    "sliding mixtral": ("mixtral", {"sliding_window": 3, "num_experts_per_tok": 1}),
    "unnormalised qwen3_moe": ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
    "clipped olmoe": ("olmoe", {"clip_qkv": 0.5}),
    "six layers of mixtral": (
        "mixtral",
        {"num_hidden_layers": 6},
    ),  # at int4 the first differs from the others
}
PRECISIONS = {
    "int8": Precision.of("int8"),
    "int4": Precision.of("int4"),
    "int4, attention too": Precision(4, 4, 8),  # as earlier versions saved it
    "16 bits": Precision(16, 16, 16),
}
EXACT = {"16 bits, wide": Precision(16, 16, 16, wide=True), "32 bits": Precision(32, 32, 32)}
BLOCK = 4


@pytest.fixture(scope="module", params=["best", *emulations()[-2:]])
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    """The best ones here; among the slow tests those for whole layers in bfloat16, emulated."""
    if request.param != "best":
        return kernels_of(request.param)
    try:
        return native_kernels() or NativeKernels(build_kernels())
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make(tiny_checkpoint: TinyCheckpoint, case: str) -> Transformer:
    family, changes = CASES[case]
    model = load(tiny_checkpoint(family, **changes))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)  # transformers makes them zero
    return model.requires_grad_(False)


def native(model: Transformer, kernels: NativeKernels, precision: str) -> Transformer:
    swap(model, kernels, (PRECISIONS | EXACT)[precision])
    return model


def decode_step(
    model: Transformer, kernels: NativeKernels, contexts: list[int], *, fused: bool
) -> tuple[torch.Tensor, list[Any], BlockPool]:
    """Hidden states of one new token of each sequence, the routing, and the pool afterwards; everything else random."""
    dtype = model.model.norm.weight.dtype
    draw = torch.Generator().manual_seed(sum(contexts))
    each = -(-max(12, *contexts) // BLOCK)
    tables = [[each * r + i for i in range(-(-n // BLOCK))] for r, n in enumerate(contexts)]
    pool = BlockPool(model.config, each * len(contexts) + 8, BLOCK, dtype)
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    positions = torch.tensor([n - 1 for n in contexts])
    slots = torch.tensor(
        [table[-1] * BLOCK + (n - 1) % BLOCK for table, n in zip(tables, contexts, strict=True)]
    )
    batch = PagedBatch.of([1] * len(contexts), contexts, tables)
    start = contexts[0] - 1 if len(contexts) == 1 else positions
    model.model.rope.tables(max(contexts), torch.device("cpu"))
    cache = PagedCache(pool, batch, start, slots, native_attention(kernels))
    cache.decoding = fused
    tokens = torch.randint(0, 96, (1, len(contexts)), generator=draw)
    with recording(model) as routing, torch.inference_mode():
        hidden = model.model(tokens, cache)[0]
    return hidden, routing, pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS | EXACT)
@pytest.mark.parametrize("case", CASES)
def test_one_call_is_its_parts_to_the_bit(
    case: str, precision: str, dtype: torch.dtype, kernels: NativeKernels, tiny_checkpoint: TinyCheckpoint
) -> None:
    model = native(make(tiny_checkpoint, case).to(dtype), kernels, precision)
    known = CASES[case][0] not in COMPOSED and "everywhere" not in case
    assert all(cast(NativeLayer, layer).fused == known for layer in model.model.layers)
    for contexts in ([1], [9], [4, 11], [3, 12, 1, 7], [5] * 8):
        one, routing, pool = decode_step(model, kernels, contexts, fused=True)
        parts, routing_of_parts, pool_of_parts = decode_step(model, kernels, contexts, fused=False)
        assert torch.equal(one, parts)
        for ours, theirs in zip(
            pool.keys + pool.values, pool_of_parts.keys + pool_of_parts.values, strict=True
        ):
            assert torch.equal(ours, theirs)
        assert len(routing) == model.config.num_hidden_layers
        for found, wanted in zip(routing, routing_of_parts, strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                assert torch.equal(found[0], wanted[0])
                assert torch.equal(found[1], wanted[1])
        torch.set_num_threads(2)
        assert torch.equal(decode_step(model, kernels, contexts, fused=True)[0], one)
        torch.set_num_threads(1)


@pytest.mark.parametrize("case", ["sliding mistral", "mixtral"])
def test_long_contexts_in_one_call_are_their_parts(
    case: str, kernels: NativeKernels, tiny_checkpoint: TinyCheckpoint
) -> None:
    """More positions than are handled at once: threads share them out, and put together what each found."""
    model = native(make(tiny_checkpoint, case), kernels, "int8")
    for contexts in ([700], [257, 3, 640], [520, 1, 2, 30, 256]):
        parts, _, _ = decode_step(model, kernels, contexts, fused=False)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(decode_step(model, kernels, contexts, fused=True)[0], parts)


@pytest.mark.parametrize(
    ("experts", "shares"), [([2], None), ([1, 0], [0.1, 0.9]), ([0, 1, 2], None), ([1, 1], None)]
)
@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_fixed_routers_of_any_width(
    case: str,
    experts: list[int],
    shares: list[float] | None,
    kernels: NativeKernels,
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    """One expert where the model has two a token, and more than it has: what `only` and blends ask for."""
    model = native(make(tiny_checkpoint, case), kernels, "int8")
    mixtures = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    for mlp in mixtures:
        mlp.gate = FixedRouter(experts, shares)
    one, routing, _ = decode_step(model, kernels, [4, 9, 1], fused=True)
    assert all(cast(NativeLayer, layer).fused for layer in model.model.layers)
    assert torch.equal(one, decode_step(model, kernels, [4, 9, 1], fused=False)[0])
    assert [r[1].tolist() for r in routing if r is not None] == [[experts] * 3] * len(mixtures)


def test_a_router_that_needs_the_hidden_state_goes_through_the_parts(
    kernels: NativeKernels, tiny_checkpoint: TinyCheckpoint
) -> None:
    """Any module of a router's signature may be put in its place; here the model room's own."""
    model = native(make(tiny_checkpoint, "mixtral"), kernels, "int8")
    expected, routing, _ = decode_step(model, kernels, [4, 9, 1], fused=True)
    for layer in model.model.layers:
        moe = cast(MoE, layer.mlp)
        router = Router(model.config)
        router.weight = cast(nn.Parameter, moe.gate.weight)
        moe.gate = router
        assert not cast(NativeLayer, layer).fused
    found, again, _ = decode_step(model, kernels, [4, 9, 1], fused=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for a, b in zip(routing, again, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a[1], b[1])


def test_top_k_can_change_later(kernels: NativeKernels, tiny_checkpoint: TinyCheckpoint) -> None:
    model = native(make(tiny_checkpoint, "mixtral"), kernels, "int8")
    for layer in model.model.layers:
        cast(Any, layer).mlp.gate.top_k = 1
    one, routing, _ = decode_step(model, kernels, [4, 9], fused=True)
    assert torch.equal(one, decode_step(model, kernels, [4, 9], fused=False)[0])
    assert all(r is not None and r[1].shape == (2, 1) for r in routing)


# ---- the parts against the model room ------------------------------------------------------------------------


def round_modules(model: Transformer, precision: Precision) -> None:
    """In PyTorch, to the integers that swapping native modules in gives."""
    quantize_modules(model, precision)


def slow_twin(model: Transformer, precision: Precision) -> Transformer:
    """The model room's own modules, every product replaced by linear_reference: rounded weights, rounded activations."""
    round_modules(model, precision)

    class Reference(nn.Module):
        def __init__(self, packed: PackedLinear) -> None:
            super().__init__()
            self.packed = packed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = linear_reference(x.reshape(-1, x.shape[-1]), self.packed.weight).view(*x.shape[:-1], -1)
            return y if self.packed.bias is None else y + self.packed.bias

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedLinear):
                setattr(module, name, Reference(child))
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp.experts.expert = reference_expert(layer.mlp.experts)  # type: ignore[assignment]
    return model


def reference_expert(experts: Any) -> Any:
    def run(e: int, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(linear_reference(x, experts.gate[e])) * linear_reference(x, experts.up[e])
        return linear_reference(h, experts.down[e])

    return run


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_native_model_is_its_slow_twin(
    case: str, precision: str, kernels: NativeKernels, tiny_checkpoint: TinyCheckpoint
) -> None:
    """float32 activations. What is left is the order of sums, and now and then a value on the border between two of its
    255 steps, or a token between two experts: hence a bound on the middle token, of 1e-5 of the logits' size, and
    a loose one on all."""
    tokens = torch.randint(0, 96, (3, 17))
    with torch.inference_mode():
        expected = slow_twin(make(tiny_checkpoint, case), PRECISIONS[precision])(tokens)
        found = native(make(tiny_checkpoint, case), kernels, precision)(tokens)
    errors = token_errors(found, expected)
    assert errors.median() < 1e-5
    assert errors.mean() < 0.02


@pytest.mark.parametrize("precision", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_exact_weights_give_pytorchs_logits(
    case: str, precision: str, kernels: NativeKernels, tiny_checkpoint: TinyCheckpoint
) -> None:
    """In float32; weights that are bfloat16 numbers are kept as such, others are not."""
    model = make(tiny_checkpoint, case)
    if precision == "16 bits, wide":
        model = model.bfloat16().float()
    assert exact_precision(model) == EXACT[precision]
    tokens = torch.randint(0, 96, (3, 17))
    with torch.inference_mode():
        expected = model(tokens)
        found = native(model, kernels, precision)(tokens)
    assert token_errors(found, expected).max() < 1e-5


def token_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Root mean square of each token's error beside that of all logits."""
    return (found - expected).square().mean(-1).sqrt() / expected.square().mean().sqrt()


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.03), ("int4", 0.03), ("16 bits", 0.015)])
@pytest.mark.parametrize("case", ["llama", "qwen3", "mixtral"])
def test_activations_in_8_bits_cost_little(
    case: str, precision: str, bound: float, kernels: NativeKernels, tiny_checkpoint: TinyCheckpoint
) -> None:
    """Beside the model whose weights are the unpacked ones, all else float32: each product's inputs are off by up to
    1/254 of their group's largest (2^-9 at 16 bits), which random signs make some tenths of a per cent of a product, and
    a few layers of a tiny model up to 3 % of the middle token's logits. One product with a mistake is off by 100 %."""
    tokens = torch.randint(0, 96, (3, 17))
    plain = make(tiny_checkpoint, case)
    round_modules(plain, PRECISIONS[precision])
    with torch.inference_mode():
        expected = plain(tokens)
        found = native(make(tiny_checkpoint, case), kernels, precision)(tokens)
    assert 1e-5 < token_errors(found, expected).median() < bound


def test_prompts_and_steps_through_the_runner_agree(
    kernels: NativeKernels, tiny_checkpoint: TinyCheckpoint
) -> None:
    """A prompt in one go, and token by token: pages written by the parts are read by the layer in one call."""
    model = native(make(tiny_checkpoint, "mixtral"), kernels, "int8")
    tokens = torch.randint(0, 96, (1, 13))
    with torch.inference_mode():
        whole = model(tokens)[0]
    runner = ModelRunner(model, 16, BLOCK, native_attention(kernels))
    table, rows = list(range(4)), []
    for n, token in enumerate(tokens[0]):
        batch = PagedBatch.of([1], [n + 1], [table])
        cache = PagedCache(runner.pool, batch, n, torch.tensor([n]), runner.attention)
        with torch.inference_mode():
            rows.append(model(token.view(1, 1), cache)[0, 0])
    assert token_errors(torch.stack(rows), whole).median() < 1e-3


def test_one_new_token_is_attended_alike_wherever_it_stands(kernels: NativeKernels) -> None:
    """In front of the step's prompts or behind one (the last token of a prompt that was read up to there)."""
    keys, values = torch.randn(2, 12, BLOCK, 2, 16)
    tables = [[0, 1, 2], [3, 4, 5], [6]]
    attend = native_attention(kernels)
    for window in (None, 3):
        q = torch.randn(8, 4, 16)
        between = attend(q, keys, values, PagedBatch.of([5, 1, 2], [9, 11, 2], tables), window)
        front = attend(q[5:6], keys, values, PagedBatch.of([1], [11], tables[1:2]), window)
        assert torch.equal(between[5:6], front)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("head_dim", [64, 128, 32])
def test_prompts_are_attended_as_their_tokens_alone(
    head_dim: int, window: int | None, kernels: NativeKernels
) -> None:
    """A prompt, a chunk behind 20 positions and a decoding sequence in one step, beside the slow twin; and to the bit
    what each token gives alone. Of a head dimension that has no vector code (32) prompts go through PyTorch."""
    keys, values = torch.randn(2, 12, BLOCK, 2, head_dim).bfloat16()
    queries, contexts = [1, 13, 6], [9, 13, 26]
    tables = [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11, 1, 2]]
    q = torch.randn(sum(queries), 6, head_dim).bfloat16()
    batch = PagedBatch.of(queries, contexts, tables)
    attend = native_attention(kernels)
    found = attend(q, keys, values, batch, window)
    expected = paged_attention_reference(q.float(), keys.float(), values.float(), batch, window)
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=2**-7)
    assert torch.equal(attend(q, keys, values, batch, window), found)  # the next layer, with the step's memo
    if head_dim == 32:
        return
    owners = [r for r, count in enumerate(queries) for _ in range(count)]
    seen = [
        context - count + i + 1
        for count, context in zip(queries, contexts, strict=True)
        for i in range(count)
    ]
    alone = PagedBatch.of([1] * len(q), seen, [tables[r] for r in owners])
    assert torch.equal(attend(q, keys, values, alone, window), found)
