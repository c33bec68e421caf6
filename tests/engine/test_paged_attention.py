"""Attention over pages against its slow twin, and that against PyTorch's own attention on contiguous tensors."""

from array import array

import pytest
import torch
import torch.nn.functional as F

from octad.kernels.paged import PagedBatch, paged_attention, paged_attention_reference

# new tokens and positions of each sequence
STEPS = {
    "one decodes": ([1], [9]),
    "many decode": ([1, 1, 1, 1], [1, 4, 13, 30]),
    "a prompt": ([11], [11]),
    "a chunk": ([5], [23]),
    "mixed": ([1, 1, 6, 3], [17, 5, 6, 19]),
    "single after chunk": ([4, 1, 2], [12, 7, 2]),
}
HEADS = {"grouped": (6, 2), "one for all": (4, 1), "full": (3, 3)}


def problem(
    queries: list[int],
    contexts: list[int],
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch]:
    """Random q, keys, values; each sequence's blocks lie anywhere in the pool."""
    torch.manual_seed(0)
    H, G = heads
    counts = [-(-context // size) for context in contexts]
    places = torch.randperm(sum(counts) + 3).tolist()
    tables = [array("i", (places.pop() for _ in range(count))) for count in counts]
    keys, values = torch.randn(2, sum(counts) + 3, size, G, 8).to(dtype)
    return torch.randn(sum(queries), H, 8).to(dtype), keys, values, PagedBatch.of(queries, contexts, tables)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("step", STEPS)
def test_is_its_slow_twin(step: str, heads: str, window: int | None) -> None:
    for size in (1, 4, 16):
        q, keys, values, batch = problem(*STEPS[step], HEADS[heads], size)
        expected = paged_attention_reference(q, keys, values, batch, window)
        found = paged_attention(q, keys, values, batch, window)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        again = paged_attention(q, keys, values, batch, window)  # the next layer, with the step's memo
        assert torch.equal(again, found)


@pytest.mark.parametrize("window", [None, 5])
def test_the_twin_is_pytorchs_attention(window: int | None) -> None:
    """Keys put side by side by hand, one query at a time over just what it may see."""
    queries, contexts = STEPS["mixed"]
    q, keys, values, batch = problem(queries, contexts, (6, 2), 4)
    found = paged_attention_reference(q, keys, values, batch, window)
    row = 0
    for r, (new, context) in enumerate(zip(queries, contexts, strict=True)):
        blocks = batch.block_tables[r]
        k = torch.cat([keys[block] for block in blocks])[:context].repeat_interleave(3, 1)
        v = torch.cat([values[block] for block in blocks])[:context].repeat_interleave(3, 1)
        for end in range(context - new + 1, context + 1):
            seen = slice(max(0, end - window) if window else 0, end)
            y = F.scaled_dot_product_attention(
                q[row][:, None], k[seen].transpose(0, 1), v[seen].transpose(0, 1)
            )
            torch.testing.assert_close(found[row], y[:, 0], atol=1e-5, rtol=1e-5)
            row += 1


def test_bfloat16_is_near_float32() -> None:
    q, keys, values, batch = problem(*STEPS["mixed"], (6, 2), 4, torch.bfloat16)
    exact = paged_attention_reference(q.float(), keys.float(), values.float(), batch, None)
    torch.testing.assert_close(
        paged_attention(q, keys, values, batch, None).float(), exact, atol=0.03, rtol=0.03
    )


def test_what_lies_beside_does_not_matter() -> None:
    """Other blocks and the unused end of the last one can hold anything finite."""
    q, keys, values, batch = problem([1, 3], [6, 5], (4, 2), 4)
    before = paged_attention(q, keys, values, batch, None)
    used = {(int(batch.block_tables[r, t // 4]), t % 4) for r, T in enumerate([6, 5]) for t in range(T)}
    for block in range(len(keys)):
        for offset in range(4):
            if (block, offset) not in used:
                keys[block, offset], values[block, offset] = 1e4, -1e4
    assert torch.equal(paged_attention(q, keys, values, batch, None), before)
