"""What writing weights in another type does to them: measured on samples before, checked value by value on writing.

    notes = conversions(base, members, names, torch.bfloat16)     # sentences; nothing where every value stays what it is
    converted(tensor, torch.float16, "w1 of expert 3")         # raises where values are too large or small for the type

Nothing is said of types that hold all values of the other one. What an adapter adds is rounded with the sum, so that it
is measured by how much of the *change* gets lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.names import EMBEDDING, dense_mlp_name
from octad.checkpoint.narrow import lost_below
from octad.checkpoint.source import TensorSource
from octad.dist import dtype_name
from octad.errors import RecipeError
from octad.figures import percent

WIDER = {  # what holds every value of a type
    torch.float32: (torch.float64,),
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
}
SAMPLE = 1 << 16  # values of each sampled tensor
WORTH_SAYING = 0.3  # rounding, in parts of an adapter's change: a tenth of its square


def holds_all(kept: torch.dtype, given: torch.dtype) -> bool:
    """True where every value of type `given` is one of type `kept` too."""
    return kept == given or kept in WIDER.get(given, ())


def converted(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """The tensor in this type. Raises RecipeError where a finite value would become infinite, or small ones are lost."""
    found = tensor.to(dtype)
    if (tensor.dtype == torch.float64 or dtype == torch.float16) and not holds_all(dtype, tensor.dtype):
        over = found.isinf() & tensor.isfinite()
        if bool(over.any()):
            raise too_large(what, float(tensor[over].abs().max()), dtype)
        if line := lost_below(tensor, found):
            raise RecipeError(f"{what}: {line}; write dtype: bfloat16 or float32 in the recipe")
    return found


def too_large(what: str, value: float, dtype: torch.dtype) -> RecipeError:
    """The error for a value that a type cannot hold."""
    name = dtype_name(dtype)
    return RecipeError(
        f"{what}: a weight of {value:g} does not fit {name} (at most {torch.finfo(dtype).max:g});"
        " write dtype: bfloat16 or float32 in the recipe"
    )


def conversions(
    base: TensorSource, members: Sequence[TensorSource], names: Sequence[str], dtype: torch.dtype
) -> Iterator[tuple[str, str]]:
    """(expert's name, or "" for the base, a sentence) for each source that writing in `dtype` changes.

    Raises RecipeError where a sampled value does not fit."""
    layers = base.config.num_hidden_layers
    mlps = [dense_mlp_name(layer, "up") for layer in sorted({0, layers // 2, layers - 1})]
    for name, source in [("", base), *zip(names, members, strict=True)]:
        if source is base and name:
            continue
        tensors = [n for n in (EMBEDDING, *mlps) if not holds_all(dtype, source.info(n).dtype)]
        if not tensors:
            continue
        what = f"expert {name!r}" if name else "base"
        line = (
            _change_lost(base, source, tensors, dtype, what)
            if isinstance(source, AdapterSource)
            else _rounded(source, tensors, dtype, what)
        )
        if line:
            yield name, line if name else f"base: {line}"


def _rounded(source: TensorSource, names: Sequence[str], dtype: torch.dtype, what: str) -> str | None:
    """How many values change, and by how much of their size."""
    changed, count, error, size = 0, 0, 0.0, 0.0
    for name in names:
        ours = _sample(source, name).double()
        found = converted(ours, dtype, what).double()
        changed, count = changed + int((found != ours).sum()), count + ours.numel()
        error, size = error + float((found - ours).square().sum()), size + float(ours.square().sum())
    if not changed:
        return None
    kind = dtype_name(dtype)
    return (
        f"{percent(changed / count, 1)} of its weights change on the way to {kind}, by"
        f" {percent((error / size) ** 0.5, 2)} of their size"
        " (root mean square): dtype: float32 keeps them"
    )


def _change_lost(
    base: TensorSource, source: AdapterSource, names: Sequence[str], dtype: torch.dtype, what: str
) -> str | None:
    """How much of what an adapter adds is lost when the sum is rounded."""
    error, change = 0.0, 0.0
    for name in names:
        if name not in source.changed() or name == EMBEDDING:
            continue
        ours, before = source.read(name).double(), base.read(name).double()
        found = converted(ours, dtype, what).double()
        kept = found - before.to(dtype).double()
        error += float((kept - (ours - before)).square().sum())
        change += float((ours - before).square().sum())
    if not change or (lost := (error / change) ** 0.5) < WORTH_SAYING:
        return None
    kind = dtype_name(dtype)
    return (
        f"what it adds to the base is so small that rounding to {kind} changes it by {percent(lost)} of its size:"
        " dtype: float32 keeps it"
    )


def _sample(source: TensorSource, name: str) -> torch.Tensor:
    """Evenly spread runs of values of a tensor, or all of a small one."""
    info, run = source.info(name), 1 << 10
    extent = source.extent(name)
    if extent is None or info.numel <= SAMPLE:
        values = source.read(name).flatten()
        return values[:: max(1, len(values) // SAMPLE)]
    count = SAMPLE // run
    return extent.blocks([i * (info.numel - run) // (count - 1) for i in range(count)], run).flatten()
