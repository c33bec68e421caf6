"""Rotary position embedding: frequencies by scaling type, and the rotation.

    rope = Rope(config); q = rope.rotate(q_BSHK, start)

Half-split layout (the hub's): value i is rotated with value i + K/2. Scaling follows the papers: linear interpolation,
YaRN (arXiv 2309.00071, section 3.4), Llama 3.1's wavelength bands. Tables are computed in float32 on use, so that
a model built on the meta device needs no buffers.

Shapes: B sequences, S positions, H heads, K head dimension.
"""

from __future__ import annotations

import math

import torch

from octad.model.config import ModelConfig, RopeConfig


class Rope:
    """cos and sin tables of one model, grown on demand and kept per device."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("cpu"):  # also where the model is being built on the meta device
            self.frequencies, self.scale = frequencies(
                config.rope, config.head_dim, config.max_position_embeddings
            )
        self.apply = rotated  # training may put a compiled one here
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(self, end: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos_TK and sin_TK in float32 for positions 0..T-1 with T >= end."""
        if device not in self._tables or len(self._tables[device][0]) < end:
            with torch.inference_mode(False):  # what generation asked for serves training too
                self._tables[device] = self._grown(max(512, 1 << (end - 1).bit_length()), device)
        return self._tables[device]

    def _grown(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self.frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scale).to(device), (angles.sin() * self.scale).to(device)

    def rotate(self, x_BSHK: torch.Tensor, start: int | torch.Tensor = 0) -> torch.Tensor:
        """x rotated to positions start..start+S-1, or to the positions in a tensor [S], which have to lie within the
        tables already asked for; computed in float32, returned in x's dtype."""
        if isinstance(start, int):
            cos, sin = self.tables(start + x_BSHK.shape[1], x_BSHK.device)
            cos, sin = cos[start : start + x_BSHK.shape[1], None], sin[start : start + x_BSHK.shape[1], None]
        else:
            cos, sin = self.tables(1, x_BSHK.device)
            cos, sin = cos.index_select(0, start)[:, None], sin.index_select(0, start)[:, None]
        return self.apply(x_BSHK, cos, sin)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., K] turned by the angles whose cosines and sines are given, in float32; in x's dtype."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def frequencies(rope: RopeConfig, dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """Angular frequency per pair [dim/2] (radians per position) and the factor on cos and sin."""
    plain = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    match rope.type:
        case "linear":
            return plain / rope.get("factor"), 1.0
        case "llama3":
            return _llama3(plain, rope), 1.0
        case "yarn":
            return _yarn(plain, rope, dim, max_positions)
        case _:
            return plain, 1.0


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1 model card)."""
    old = rope.get("original_max_position_embeddings", 8192)
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    turns: torch.Tensor = old * plain / (2 * math.pi)
    blend: torch.Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    slowed: torch.Tensor = (1 - blend) * plain / float(rope.get("factor"))
    return slowed + blend * plain


def _yarn(plain: torch.Tensor, rope: RopeConfig, dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    factor = float(rope.get("factor"))
    old = rope.get("original_max_position_embeddings") or max_positions

    def dimension(turns: float) -> float:
        return dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp), yarn_scale(rope)


def yarn_scale(rope: RopeConfig) -> float:
    """What YaRN multiplies queries and keys with: its own word, or 0.1 log(factor) + 1 (the paper's section 3.4)."""
    factor = float(rope.get("factor"))

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope.get("mscale")) / magnitude(rope.get("mscale_all_dim"))
    return magnitude(1.0)
