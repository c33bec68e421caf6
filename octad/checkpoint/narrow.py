"""What a narrower type makes of weights: of large ones infinity, of small ones nothing, or others than they were.

    weight = narrowed(tensor, torch.float16, "lm_head.weight")      # raises where the type cannot hold it
    line = lost_below(tensor, tensor.to(torch.float16))             # a sentence, or None

float16 ends at 6e-8 below as it does at 65,504 above, and loses digits from 6e-5 on. A few such weights beside larger
ones matter to nobody; a tensor that is made of them is lost.
"""

from __future__ import annotations

import torch

from octad.dist import dtype_name
from octad.errors import CheckpointError
from octad.figures import percent

MOST_GONE = 0.1  # of the values that are not zero
MOST_CHANGED = 0.01  # of a tensor's size, root mean square; rounding to bfloat16 changes it by 0.002


def narrowed(tensor: torch.Tensor, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    """The tensor in this type (None: its own). Raises CheckpointError where the type cannot hold it."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if dtype in (torch.float16, torch.bfloat16) or tensor.dtype == torch.float64:
        kind = dtype_name(dtype)
        if bool((found.isinf() & tensor.isfinite()).any()):
            most = float(tensor[tensor.isfinite()].abs().max())
            raise CheckpointError(
                f"{name}: has values up to {most:g}, {kind} ends at {torch.finfo(dtype).max:g}; choose another --dtype"
            )
        if line := lost_below(tensor, found) if dtype == torch.float16 else None:
            raise CheckpointError(f"{name}: {line}; choose another --dtype")
    return found


def lost_below(before: torch.Tensor, after: torch.Tensor) -> str | None:
    """How a tensor is lost in the type of `after`, which is the same in fewer bits; None where it is held. What is
    infinite is not looked for."""
    kind = dtype_name(after.dtype)
    gone, held = int(((after == 0) & (before != 0)).sum()), int(before.count_nonzero())
    if gone > MOST_GONE * held:
        return f"{percent(gone / held)} of its weights are so small that {kind} has 0 for them"
    wide = before if before.dtype == torch.float64 else before.float()
    changed, size = (float(torch.linalg.vector_norm(x)) for x in (after.to(wide.dtype) - wide, wide))
    if changed > MOST_CHANGED * size:
        return (
            f"its weights are so small that {kind} changes them by {percent(changed / size, 1)} of their size"
        )
    return None
