"""The native kernels against their slow twins, as built for this machine, as plain C for others, and without threads.

Bounds: integer sums are exact, so that what is left is float32's rounding of sums over groups, relative to the sum of
magnitudes; results in bfloat16 are within one unit in its last place (2^-8) more.
"""

# ruff: noqa: F401, F811 (fixtures are imported)

import pytest
import torch
import torch.nn.functional as F
from kernel_builds import kernels, one_thread

from octad.kernels.native import NativeKernels, describe
from octad.kernels.packed import Packed, linear_reference, pack, pack_raw
from octad.model.config import ModelConfig, RopeConfig
from octad.model.moe import Experts, Router
from octad.model.rope import Rope
from octad.model.transformer import RMSNorm

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 21]
ULP = 2**-8
WIDE = -16  # bfloat16 weights, float32 activations


def config(**changes: object) -> ModelConfig:
    base = {"model_type": "mixtral", "vocab_size": 8, "hidden_size": 40, "intermediate_size": 72}
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    }
    return ModelConfig.from_dict(base | sizes | changes)


def assert_near(found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, bound: float = 2e-6) -> None:
    """|found - expected| <= bound * size, and one unit of the dtype's last place of the value."""
    bound_each = bound * size.double() + (
        ULP * expected.double().abs() if found.dtype == torch.bfloat16 else 0
    )
    off = (found.double() - expected.double()).abs()
    assert (off <= bound_each + 1e-30).all(), f"off by {float((off / (bound_each + 1e-30)).max()):.1f} bounds"


def magnitudes(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double().abs() @ weight.double().abs().T


def packed(weight: torch.Tensor, bits: int) -> Packed:
    return pack(weight, 16, wide=True) if bits == WIDE else pack(weight, bits)


# ---- linear --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [32, WIDE, 16, 8, 4])
def test_linear_is_its_slow_twin(kernels: NativeKernels, bits: int, dtype: torch.dtype) -> None:
    """Three weights that share x, outputs that fill no panel, inputs that fill no group, with and without biases."""
    for inputs in (8, 72, 200):
        weights = [packed(torch.randn(outputs, inputs), bits) for outputs in (5, 48, 33)]
        biases = [torch.randn(5), None, torch.randn(33)]
        described = describe(weights)
        for rows in (*ROWS, 40):
            x = (torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
            for given in (None, biases):
                found = kernels.linear(described, x, given)
                for y, w, bias in zip(found, weights, given or [None] * 3, strict=True):
                    exact = linear_reference(x.double(), w) + (0 if bias is None else bias.double())
                    size = magnitudes(x, w.unpack()) + (0 if bias is None else bias.abs())
                    assert_near(y, exact, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_weights(kernels: NativeKernels, dtype: torch.dtype) -> None:
    """Not packed at all: float32 is a matrix product; bfloat16 takes activations in bfloat16."""
    for inputs in (7, 40):
        w = torch.randn(21, inputs)
        for rows in ROWS:
            x = torch.randn(rows, inputs).to(dtype)
            (y,) = kernels.linear(describe([w]), x)
            assert_near(y, x.double() @ w.double().T, magnitudes(x, w))
            (y,) = kernels.linear(describe([w.bfloat16()]), x)
            exact = x.bfloat16().double() @ w.bfloat16().double().T
            assert_near(y, exact, magnitudes(x, w))


def test_rows_of_nothing_and_of_the_largest_values(kernels: NativeKernels) -> None:
    w = pack(torch.full((16, 64), 2.0), 8)
    x = torch.zeros(4, 64)
    x[1] = 1e-38  # below what eight bits can be scaled to
    x[2] = 1e30
    x[3] = -1e30
    (y,) = kernels.linear(describe([w]), x)
    assert torch.equal(y[:2], torch.zeros(2, 16))
    torch.testing.assert_close(y[2:], x[2:, :1].expand(2, 16) * 128, rtol=1e-2, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_integers_overflow_nothing(kernels: NativeKernels, bits: int) -> None:
    """Sums of products of the largest weights and activations, of all signs, in groups of every length."""
    top = (1 << (bits - 1)) - 1
    for group in (8, 24, 32, 64, 96):
        signs = torch.cat([torch.ones(2, group), -torch.ones(2, group), torch.randn(29, group).sign()])
        raw = torch.where(signs > 0, top, -top - (bits == 4)) + (1 << (bits - 1))
        w = pack_raw(raw.to(torch.uint8), torch.ones(33, 1), bits, group)
        x = torch.cat([signs[:5], signs[9:12]]) * 127
        (y,) = kernels.linear(describe([w]), x)
        assert torch.equal(y, x @ w.unpack().T)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [32, WIDE, 16, 8, 4])
def test_what_is_not_a_number_stays_visible(kernels: NativeKernels, bits: int, bad: float) -> None:
    """In its own row, and there alone."""
    w = packed(torch.rand(20, 128) + 0.1, bits)
    x = torch.randn(5, 128)
    x[3, 100] = bad
    (y,) = kernels.linear(describe([w]), x)
    assert not y[3].isfinite().any()
    assert y[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("bits", [None, 32, WIDE, 16, 8, 4])
def test_a_row_does_not_depend_on_its_company(kernels: NativeKernels, bits: int | None) -> None:
    """To the bit, in any number of rows, at any place, on any number of threads."""
    for weight in (torch.randn(40, 200), torch.randn(100, 72)):
        kept = packed(weight, bits) if bits else weight
        w, x = describe([kept, kept]), torch.randn(21, weight.shape[1])
        alone = [kernels.linear(w, x[n : n + 1]) for n in range(21)]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in ROWS:
                for number, y in enumerate(kernels.linear(w, x[:rows])):
                    assert all(torch.equal(y[n], alone[n][number][0]) for n in range(rows))
                for number, y in enumerate(kernels.linear(w, x[21 - rows :].contiguous())):
                    assert all(torch.equal(y[n - 21], alone[n][number][0]) for n in range(21 - rows, 21))


# ---- experts -------------------------------------------------------------------------------------------------


def make_experts(
    bits: int | None, group: int | None = None
) -> tuple[Experts, list[list[Packed | torch.Tensor]]]:
    """The model room's module with random weights, and the same weights gate, up, down for the kernel."""
    module = Experts(config())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
        parameter.requires_grad_(False)
    halves = [w.chunk(2) for w in module.gate_up_proj]
    lists = [[g.clone() for g, _ in halves], [u.clone() for _, u in halves], list(module.down_proj)]
    return module, [[w if bits is None else pack(w, bits, group) for w in part] for part in lists]


def routing(rows: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.rand(rows, experts).argsort(-1)[:, :top_k].contiguous()
    return torch.rand(rows, top_k), order


def test_experts_of_plain_weights_are_the_model_rooms(kernels: NativeKernels) -> None:
    module, lists = make_experts(None)
    gate, up, down = map(describe, lists)
    for rows in ROWS:
        for top_k in (1, 2, 5):
            x, (weights, chosen) = torch.randn(rows, 40), routing(rows, 5, top_k)
            found = kernels.experts(gate, up, down, x, weights, chosen)
            torch.testing.assert_close(found, module(x, weights, chosen), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(16, None), (8, None), (4, None), (8, 24), (4, 8)])
def test_experts_are_their_slow_twin(
    kernels: NativeKernels, bits: int, group: int | None, dtype: torch.dtype
) -> None:
    """Composed of linear_reference, also in groups that end inside a panel. Hidden values are rounded too, and one on the
    border between two steps may fall to either side: hence the bound of one 8-bit step of a hidden value in the sum (a
    layout's mistake is off by 1)."""
    _, (gates, ups, downs) = make_experts(bits, group)
    gate, up, down = map(describe, (gates, ups, downs))
    for rows in ROWS:
        x, (weights, chosen) = torch.randn(rows, 40).to(dtype), routing(rows, 5, 2)
        found = kernels.experts(gate, up, down, x, weights, chosen)
        expected, size = (
            torch.zeros(rows, 40, dtype=torch.float64),
            torch.zeros(rows, 40, dtype=torch.float64),
        )
        for n in range(rows):
            for weight, e in zip(weights[n].double(), chosen[n].tolist(), strict=True):
                row = x[n : n + 1].double()
                h = F.silu(linear_reference(row, gates[e])) * linear_reference(row, ups[e])
                expected[n] += weight * linear_reference(h.float().double(), downs[e])[0]
                size[n] += weight * h.abs().amax() * downs[e].unpack().abs().amax()
        assert_near(found, expected, size, bound=2**-7)
        assert float((found.double() - expected).abs().mean()) < 1e-3 * float(expected.abs().mean()) + (
            ULP * float(expected.abs().mean()) if dtype == torch.bfloat16 else 0
        )


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_token_does_not_depend_on_the_others_experts(kernels: NativeKernels, bits: int) -> None:
    _, lists = make_experts(bits)
    gate, up, down = map(describe, lists)
    x, (weights, chosen) = torch.randn(21, 40), routing(21, 5, 2)

    def run(rows: list[int]) -> torch.Tensor:
        return kernels.experts(gate, up, down, x[rows], weights[rows], chosen[rows])

    alone = torch.cat([run([n]) for n in range(21)])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ROWS:
            picked = torch.randperm(21)[:rows].tolist()
            assert torch.equal(run(picked), alone[picked])


def test_gate_and_up_may_take_turns(kernels: NativeKernels) -> None:
    """Panels of two weights laid alternately, as the engine does for reading them in one stream."""
    _, (gates, ups, downs) = make_experts(8)
    both = [torch.stack((g.panels, u.panels), 1) for g, u in zip(gates, ups, strict=True)]
    turns = [describe([Packed(b[:, i], 72, 40, 8, 64) for b in both]) for i in (0, 1)]
    x, (weights, chosen) = torch.randn(9, 40), routing(9, 5, 2)
    found = kernels.experts(*turns, describe(downs), x, weights, chosen)
    assert torch.equal(
        found, kernels.experts(describe(gates), describe(ups), describe(downs), x, weights, chosen)
    )


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 40])
def test_an_expert_that_is_not_there_is_refused(kernels: NativeKernels, wrong: int) -> None:
    _, lists = make_experts(8)
    gate, up, down = map(describe, lists)
    with pytest.raises(IndexError):
        kernels.experts(gate, up, down, torch.randn(1, 40), torch.ones(1, 2), torch.tensor([[0, wrong]]))


def test_no_rows(kernels: NativeKernels) -> None:
    _, lists = make_experts(8)
    gate, up, down = map(describe, lists)
    empty = torch.empty(0, 2, dtype=torch.int64)
    assert kernels.experts(gate, up, down, torch.empty(0, 40), torch.empty(0, 2), empty).shape == (0, 40)
    assert kernels.linear(gate, torch.empty(0, 40))[0].shape == (0, 72)


# ---- norms, rotation, routing --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(kernels: NativeKernels, dtype: torch.dtype) -> None:
    for size in (1, 7, 64, 2050):
        norm = RMSNorm(size, 1e-5)
        norm.weight.data = torch.randn(size).to(dtype).float()
        for rows in (1, 40):
            x = (torch.randn(rows, size) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
            with torch.no_grad():
                expected = norm(x.float())
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found = kernels.rms_norm(x, norm.weight.data.to(dtype), 1e-5)
                assert_near(found, expected, expected.abs())
                assert torch.equal(kernels.rms_norm(x[-1:], norm.weight.data.to(dtype), 1e-5), found[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_rope(kernels: NativeKernels, kind: str, dtype: torch.dtype) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0} if kind == "yarn" else None
    rope = Rope(config(head_dim=16, rope_scaling=scaling, max_position_embeddings=64))
    assert isinstance(rope, Rope)
    assert RopeConfig.from_dict({"rope_scaling": scaling}).type == kind
    cos, sin = rope.tables(600, torch.device("cpu"))
    for rows in (1, 5, 300):
        for start in (0, 17, torch.randint(0, 600, (rows,))):
            x = torch.randn(rows, 3, 16).to(dtype)
            exact = rope.rotate(x[None].float(), start)[0]
            found = kernels.rope_(x.clone(), start, cos, sin)
            assert_near(found, exact, exact.abs() + x.abs().float().amax(-1, keepdim=True), 5e-7)


def test_routing(kernels: NativeKernels) -> None:
    for top_k, normalise in ((1, True), (2, True), (2, False), (5, True)):
        router = Router(config(num_experts_per_tok=top_k))
        router.normalise = normalise
        torch.nn.init.normal_(router.weight)
        for dtype in DTYPES:
            x = torch.randn(300, 40).to(dtype)
            with torch.no_grad():
                weights, experts = router(x)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found, chosen = kernels.route(x, router.weight.data, top_k, normalise)
                assert torch.equal(chosen, experts)
                torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
            one, _ = kernels.route(x[7:8], router.weight.data, top_k, normalise)
            assert torch.equal(one, found[7:8])


def test_of_equal_experts_the_first_is_chosen(kernels: NativeKernels) -> None:
    rows = torch.randn(2, 40)
    weight = torch.stack([rows[0], rows[1], rows[0], rows[1], rows[0]])
    x = rows[:1] * 3  # experts 0, 2 and 4 alike, and far ahead of 1 and 3
    weights, experts = kernels.route(x, weight, 2, True)
    assert experts.tolist() == [[0, 2]]
    assert weights.tolist() == [[0.5, 0.5]]
    weights, experts = kernels.route(torch.zeros(1, 40), weight, 5, False)
    assert experts.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(weights, torch.full((1, 5), 0.2))


def test_routing_of_what_is_not_a_number_names_experts(kernels: NativeKernels) -> None:
    weights, experts = kernels.route(torch.full((1, 40), torch.nan), torch.randn(5, 40), 2, True)
    assert weights.isnan().all()
    assert ((experts >= 0) & (experts < 5)).all()
