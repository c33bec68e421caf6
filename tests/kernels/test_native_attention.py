"""The native kernels' attention over pages against its slow twin, on every build (see test_native.py for the bounds)."""

# ruff: noqa: F401, F811 (fixtures are imported)

import pytest
import torch
from kernel_builds import kernels, one_thread
from test_native import DTYPES, assert_near

from octad.kernels.native import NativeKernels
from octad.kernels.paged import PagedBatch, paged_attention_reference


def pages(
    contexts: list[int], heads: tuple[int, int], size: int, dtype: torch.dtype, head_dim: int = 24
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch]:
    H, G = heads
    counts = [-(-context // size) for context in contexts]
    places = torch.randperm(sum(counts) + 2).tolist()
    tables = [[places.pop() for _ in range(count)] for count in counts]
    keys, values = torch.randn(2, sum(counts) + 2, size, G, head_dim).to(dtype)
    q = (2 * torch.randn(len(contexts), H, head_dim)).to(dtype)
    return q, keys, values, PagedBatch.of([1] * len(contexts), contexts, tables)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(6, 2), (5, 1), (3, 3), (16, 2)])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_paged_attention(
    kernels: NativeKernels, window: int | None, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    contexts = [1, 4, 13, 30, 17]
    for size, head_dim in ((1, 24), (4, 64), (16, 128)):
        q, keys, values, batch = pages(contexts, heads, size, dtype, head_dim)
        exact = paged_attention_reference(q.float(), keys.float(), values.float(), batch, window)
        rest = (batch.context_lens, batch.block_tables, window, head_dim**-0.5)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = kernels.paged_attention(q, keys, values, *rest)
            assert_near(found, exact, values.float().abs().max(), 5e-6)
        for r, context in enumerate(contexts):
            alone = PagedBatch.of([1], [context], [batch.block_tables[r].tolist()])
            one = kernels.paged_attention(
                q[r : r + 1], keys, values, alone.context_lens, alone.block_tables, *rest[2:]
            )
            assert torch.equal(one[0], found[r])


def test_attention_on_two_threads(kernels: NativeKernels) -> None:
    """So much that the kernel does share it out: more than 65536 products."""
    for dtype in DTYPES:
        q, keys, values, batch = pages([200, 1, 90], (8, 2), 16, dtype, 64)
        rest = (batch.context_lens, batch.block_tables, None, 0.125)
        one = kernels.paged_attention(q, keys, values, *rest)
        torch.set_num_threads(2)
        for _ in range(20):
            assert torch.equal(kernels.paged_attention(q, keys, values, *rest), one)
        torch.set_num_threads(1)


def test_attention_of_far_apart_scores(kernels: NativeKernels) -> None:
    """One key that outweighs all, by more than float32's exponential holds."""
    q, keys, values, batch = pages([40], (1, 1), 8, torch.float32)
    keys *= 0
    keys[batch.block_tables[0, 2], 3] = 1000 * q[0, 0] / q.square().sum()
    y = kernels.paged_attention(q, keys, values, batch.context_lens, batch.block_tables, None, 1.0)
    torch.testing.assert_close(y[0, 0], values[batch.block_tables[0, 2], 3, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 8, 40])
def test_neighbours_of_one_prompt_are_as_alone(
    kernels: NativeKernels, window: int | None, dtype: torch.dtype
) -> None:
    """Several tokens of a prompt share what is read of its keys: their bits are those that each has by itself. Two
    prompts, one that begins in the middle, and a token of a third sequence between them."""
    heads, K = (9, 3), 64
    _, keys, values, batch = pages([31, 9, 45], heads, 4, dtype, K)
    counts, lengths = (31, 1, 6), []
    for count, context in zip(counts, (31, 9, 45), strict=True):
        lengths += range(context - count + 1, context + 1)
    tables = batch.block_tables.repeat_interleave(torch.tensor(counts), 0)
    q = (2 * torch.randn(len(lengths), heads[0], K)).to(dtype)
    rest = (torch.tensor(lengths, dtype=torch.int32), tables, window, K**-0.5)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = kernels.paged_attention(q, keys, values, *rest)
        for n in range(len(lengths)):
            alone = [x[n : n + 1] for x in rest[:2]]
            one = kernels.paged_attention(q[n : n + 1], keys, values, *alone, *rest[2:])
            assert torch.equal(one[0], found[n])
    whole = PagedBatch.of(list(counts), [31, 9, 45], batch.block_tables.tolist())
    exact = paged_attention_reference(q.float(), keys.float(), values.float(), whole, window)
    assert_near(found, exact, values.float().abs().max(), 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
def test_chunks_of_long_contexts(kernels: NativeKernels, window: int | None, dtype: torch.dtype) -> None:
    """Contexts around the 256 positions that are handled at once: near the slow twin, and of the same bits whatever the
    threads, alone or as the end of a prompt, whose tokens reach the last chunk one after the other."""
    for heads, K in (((6, 2), 64), ((3, 1), 24)):
        q, keys, values, batch = pages([255, 256, 257, 258, 800], heads, 16, dtype, K)
        rest = (batch.context_lens, batch.block_tables, window, K**-0.5)
        exact = paged_attention_reference(q.float(), keys.float(), values.float(), batch, window)
        found = kernels.paged_attention(q, keys, values, *rest)
        assert_near(found, exact, values.float().abs().max(), 5e-6)
        torch.set_num_threads(2)
        assert torch.equal(kernels.paged_attention(q, keys, values, *rest), found)
        torch.set_num_threads(1)
        lengths = torch.tensor([512, 513, 514, 515], dtype=torch.int32)
        tables = batch.block_tables[4:].expand(4, -1).contiguous()
        run = kernels.paged_attention(q[:4], keys, values, lengths, tables, *rest[2:])
        for n in range(4):
            one = kernels.paged_attention(
                q[n : n + 1], keys, values, lengths[n : n + 1], tables[n : n + 1], *rest[2:]
            )
            assert torch.equal(one[0], run[n])
