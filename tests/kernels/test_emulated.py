"""All of x86's instruction sets give the same bits for integer weights, and AMX's tiles what its vectors give.

The other tests here compare each path, emulated where this processor lacks it, with the slow twin within bounds. These
compare paths with each other: integer sums are exact and what follows them is the same float32 arithmetic everywhere but
in `portable`, which has no fused multiply-add.
"""

from collections.abc import Iterator

import pytest
import torch
from kernel_builds import EMULATED, emulated

from octad.kernels.compile import load, runnable
from octad.kernels.native import NativeKernels, describe
from octad.kernels.packed import linear_reference, pack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("avx2" not in runnable(), reason="emulated on AVX2"),
]
ROWS = [1, 6, 7, 13, 16, 17, 40]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def avx2() -> NativeKernels:
    return NativeKernels(load(isa="avx2"))


@pytest.fixture
def amx() -> NativeKernels:
    made = NativeKernels(emulated("amx"))
    assert made.features & 8
    return made


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("isa", EMULATED)
def test_integer_products_have_the_bits_of_avx2(isa: str, bits: int, avx2: NativeKernels) -> None:
    """Odd and even numbers of groups, a last group that is not full, groups that no tile takes, rows in any number."""
    kernels = NativeKernels(emulated(isa))
    for inputs, group in ((64, None), (200, None), (576, None), (48, 24)):
        weights = describe([pack(torch.randn(outputs, inputs), bits, group) for outputs in (40, 33)])
        for rows in ROWS:
            x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
            for found, expected in zip(kernels.linear(weights, x), avx2.linear(weights, x), strict=True):
                assert torch.equal(found, expected), (inputs, group, rows)


@pytest.mark.parametrize("tokens", [20, 90])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("isa", EMULATED)
def test_experts_of_integers_have_the_bits_of_avx2(
    isa: str, bits: int, tokens: int, avx2: NativeKernels
) -> None:
    """Few pairs and many, which tiles take in a row; an expert of whom nobody wants anything."""
    kernels = NativeKernels(emulated(isa))
    gate, up, down = (
        describe([pack(torch.randn(*shape), bits) for _ in range(4)])
        for shape in ((136, 72), (136, 72), (72, 136))
    )
    x, weights = torch.randn(tokens, 72), torch.rand(tokens, 2)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])
    found, expected = (k.experts(gate, up, down, x, weights, chosen) for k in (kernels, avx2))
    # silu is the compiler's, whose order of operations may differ in the last place
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))
    assert found.isfinite().all()


@pytest.mark.parametrize("inputs", [32, 36, 64, 100, 160])
def test_tiles_of_bfloat16_are_the_vectors_that_take_few_rows(inputs: int, amx: NativeKernels) -> None:
    """To the bit, with and without a rest behind the whole tiles; and near the slow twin: 32 products are summed up in
    float32, each sum off by 2^-24 of the magnitudes at most, a term."""
    packed = pack(torch.randn(40, inputs), 16)
    weights, x = describe([packed]), torch.randn(40, inputs)
    alone = torch.cat([amx.linear(weights, x[n : n + 1])[0] for n in range(40)])
    for rows in ROWS:
        assert torch.equal(amx.linear(weights, x[:rows])[0], alone[:rows])
    size = x.bfloat16().double().abs() @ packed.unpack(torch.float64).abs().T
    assert ((alone - linear_reference(x.double(), packed)).abs() <= inputs * 2**-24 * size).all()


def test_rows_that_lie_unequally_far_apart_have_the_same_bits(amx: NativeKernels) -> None:
    """Few pairs of a batch: tokens of an expert are taken from where they lie."""
    gate, up, down = (describe([pack(torch.randn(64, 64), 8) for _ in range(2)]) for _ in range(3))
    x, weights = torch.randn(30, 64), torch.ones(30, 1)
    for chosen in (torch.zeros(30, 1), (torch.arange(30) % 3 == 0)[:, None]):
        experts = chosen.long()
        found = amx.experts(gate, up, down, x, weights, experts)
        one = [amx.experts(gate, up, down, x[n : n + 1], weights[:1], experts[n : n + 1]) for n in range(30)]
        assert torch.equal(found, torch.cat(one))
