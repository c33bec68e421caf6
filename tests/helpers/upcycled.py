"""A mixture upcycled from a dense model with known distances, and a source that remembers what was read of it."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyCheckpoint

from octad.checkpoint.hf import SafetensorsSource
from octad.checkpoint.names import PARTS, expert_name

LAYERS = 2


class Recording(SafetensorsSource):
    """Remembers what was read, and the most tensors that were alive at a time."""

    reads: list[str] = []
    alive = most = 0

    def read(self, name: str) -> torch.Tensor:
        self.reads = [*self.reads, name]
        tensor = super().read(name)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._freed)
        return tensor

    def _freed(self) -> None:
        self.alive -= 1


Upcycle = Callable[..., tuple[Recording, Recording]]


def upcycled(
    tiny_checkpoint: TinyCheckpoint, directory: Path, noise: list[float], **sidecars: Any
) -> tuple[Recording, Recording]:
    """A mixtral whose expert e is a llama's nets with relative noise e, and the llama; sidecars: octad={...}."""
    base, like = tiny_checkpoint("llama"), tiny_checkpoint("mixtral", num_local_experts=len(noise))
    dense, mixed = load_file(base / "model.safetensors"), load_file(like / "model.safetensors")
    torch.manual_seed(0)
    for name in mixed:
        mixed[name] = dense.get(name, mixed[name]).clone()
    for layer in range(LAYERS):
        for part in PARTS:
            weight = dense[f"model.layers.{layer}.mlp.{part}_proj.weight"]
            for e, share in enumerate(noise):
                error = torch.randn_like(weight)
                error *= share * weight.norm() / error.norm()
                mixed[expert_name("mixtral", layer, e, part)] = weight + error
    out = directory / "mixture"
    out.mkdir()
    shutil.copy(like / "config.json", out)
    save_file(mixed, out / "model.safetensors")
    for name, content in sidecars.items():
        (out / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return Recording(out, "mixture"), Recording(base, "base")
