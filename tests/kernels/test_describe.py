"""Weights described for C: what can be called together."""

import pytest
import torch

from octad.kernels.native import WeightArray, describe
from octad.kernels.packed import pack


def test_weights_that_cannot_be_called_together() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        describe([torch.randn(8, 4).T])
    w = torch.randn(8, 64)
    for pair in (
        [w, w.bfloat16()],
        [w, w[:, :32].clone()],
        [pack(w, 8), pack(w, 4)],
        [pack(w, 8), pack(w, 8, 32)],
    ):
        with pytest.raises(ValueError, match="share their inputs and format"):
            describe(pair)
    assert isinstance(describe([w, w[:3]]), WeightArray)
