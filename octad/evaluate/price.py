"""What a contestant costs: so that quality is never shown alone.

    price = model_price(config, context, itemsize=2, measured)
    ensemble_price(prices), oracle_price(prices)            # what follows from the members'

Parameters, bytes and FLOPs are counted (of the contestant as a model of its own: a member is dense, whatever it is judged
inside of); tokens a second and working memory are measured while it is judged on this machine. Peak memory is its
weights and what running a batch took on top of them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.fast.precision import Precision
from octad.machine import memory_of
from octad.model import cost
from octad.model.config import ModelConfig


@dataclass(frozen=True)
class Price:
    """Counts, bytes and measured speed; None for what is not known."""

    total_parameters: int | None = None
    active_parameters: int | None = None
    flops_per_token: float | None = None
    bytes: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def model_price(
    config: ModelConfig | None, context: float, bytes_per_parameter: float, measured: dict[str, float]
) -> Price:
    """Of one model, where tokens see `context` positions on average; None: nothing is counted."""
    speed = measured.get("tokens_per_second")
    if config is None:
        return Price(tokens_per_second=speed)
    weights = int(cost.parameters(config) * bytes_per_parameter)
    working = measured.get("working_bytes")
    return Price(
        cost.parameters(config),
        cost.parameters(config, active=True),
        float(cost.flops_per_token(config, round(context))),
        weights,
        speed,
        None if working is None else int(weights + working),
    )


def ensemble_price(members: Sequence[Price]) -> Price:
    """All members are held, and all read every token, one after another."""
    seconds = [1 / p.tokens_per_second for p in members if p.tokens_per_second]
    weights = _sum(p.bytes for p in members)
    peaks = [p.peak_memory_bytes - p.bytes for p in members if p.peak_memory_bytes and p.bytes is not None]
    return Price(
        _sum(p.total_parameters for p in members),
        _sum(p.active_parameters for p in members),
        _sum(p.flops_per_token for p in members),
        weights,
        1 / sum(seconds) if len(seconds) == len(members) else None,
        weights + max(peaks) if weights is not None and peaks else None,
    )


def oracle_price(chosen: Sequence[Price]) -> Price:
    """The members that are chosen for some domain are held, each once; one reads a token (the dearest is told)."""
    together = ensemble_price(chosen)
    speeds = [p.tokens_per_second for p in chosen if p.tokens_per_second]
    return Price(
        together.total_parameters,
        _largest(p.active_parameters for p in chosen),
        _largest(p.flops_per_token for p in chosen),
        together.bytes,
        min(speeds) if len(speeds) == len(chosen) else None,
        together.peak_memory_bytes,
    )


def bytes_per_parameter(
    source: TensorSource, dtype: torch.dtype, config: ModelConfig | None, quantize: str | None = None
) -> float:
    """In memory: the dtype's, or of rounded weights the integers and scales, attention's in their share of a model of
    this shape."""
    if config is None or (quantize is None and not isinstance(source, QuantizedSource)):
        return float(dtype.itemsize)
    schemes = (
        source.schemes
        if isinstance(source, QuantizedSource)
        else Precision.of(quantize or "").schemes(config.num_hidden_layers)
    )
    return cost.per_parameter(config, schemes.net_bytes(config.num_hidden_layers), schemes.attention.bytes)


@contextmanager
def measuring(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills in, at its end, the seconds that the block took and the bytes that it held on top of what was there."""
    found: dict[str, float] = {}
    before = _mark(device)
    begun = time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - begun
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_of().get("peak")
    if before is not None and after is not None:
        found["working_bytes"] = float(max(0, after - before))


def _mark(device: torch.device) -> int | None:
    """Bytes held now; the peak is counted from here. None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        with suppress(AttributeError, TypeError):  # another C library; Windows, where it has no name
            ctypes.CDLL(None).malloc_trim(0)  # what earlier contestants left free is not this one's
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
        return memory_of().get("resident")
    return None


def _sum(values: Iterator[Any]) -> Any:
    listed = list(values)
    return None if any(v is None for v in listed) else sum(listed)


def _largest(values: Iterator[Any]) -> Any:
    listed = list(values)
    return None if any(v is None for v in listed) else max(listed)
