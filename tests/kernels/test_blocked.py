"""Attention for training: output and gradients against the slow twin and finite differences, in every layout."""

import pytest
import torch

from octad.fast.document_attention import DocumentAttention, fused_attention
from octad.kernels import blocked
from octad.kernels.attention import causal_attention_reference
from octad.kernels.blocked import Segment, blocked_attention
from octad.model.config import ModelConfig

SEGMENTS = [Segment(0, 1, 5), Segment(5, 2, 9), Segment(23, 1, 1)]


def inputs(
    heads: int, groups: int, dtype: torch.dtype = torch.float64, tokens: int = 24
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(tokens, h, 4, dtype=dtype, requires_grad=True) for h in (heads, groups, groups)]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: list[Segment], window: int | None = None
) -> torch.Tensor:
    done = []
    for start, count, length in segments:
        for first in range(start, start + count * length, length):
            at = slice(first, first + length)
            done.append(causal_attention_reference(q[None, at], k[None, at], v[None, at], window=window)[0])
    return torch.cat(done)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kept", [512, 5, 0])
def test_it_equals_the_slow_twin_segment_by_segment(
    monkeypatch, kept: int, groups: int, window: int | None
) -> None:
    """Whether the backward has all probabilities, those of the short segments, or none."""
    monkeypatch.setattr(blocked, "BLOCK", 4)
    monkeypatch.setattr(blocked, "KEPT", kept)
    leaves = inputs(6, groups, torch.float32)
    dy = torch.randn(24, 6, 4)
    expected = reference(*leaves, SEGMENTS, window)
    for attention in (blocked_attention, fused_attention):
        y = attention(*leaves, SEGMENTS, window)
        torch.testing.assert_close(y, expected)
        for mine, theirs in zip(
            torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy, True), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kept", [512, 0])
def test_its_gradients_equal_finite_differences(monkeypatch, kept: int, window: int | None) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 4)
    monkeypatch.setattr(blocked, "KEPT", kept)
    torch.autograd.gradcheck(
        lambda q, k, v: blocked_attention(q, k, v, SEGMENTS, window), inputs(4, 2), atol=1e-6
    )


def test_bfloat16_is_as_near_to_the_truth_as_the_fused_kernel() -> None:
    segments = [Segment(0, 2, 200)]
    leaves = inputs(6, 2, torch.bfloat16, 400)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    dy = torch.randn(400, 6, 4)

    def errors(attention) -> list[float]:
        y = attention(*leaves, segments, None)
        found = (y, *torch.autograd.grad(y, leaves, dy.bfloat16()))
        return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]

    y = reference(*exact, segments)
    truth = (y.detach(), *torch.autograd.grad(y, exact, dy.bfloat16().float()))
    for mine, fused in zip(errors(blocked_attention), errors(fused_attention), strict=True):
        assert mine < max(2 * fused, 0.01)


def test_documents_become_segments() -> None:
    raw = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = ModelConfig.from_dict(raw)
    alone = DocumentAttention(config, torch.tensor([[0, 0, 0], [4, 4, 4]]))
    assert alone.segments == [(0, 2, 3)]
    packed = DocumentAttention(config, torch.tensor([[0, 0, 1], [0, 1, 1]]))
    assert packed.segments == [(0, 1, 2), (2, 1, 1), (3, 1, 1), (4, 1, 2)]
