"""What a pass over the layers of a model reads of it: embeddings, the shared part of a layer, one expert; each once.

    tensors = read_all(source, shared_names(config, layer), dtype, write)      # every one goes to `write` on the way
    block = shared_block(config, layer, tensors)
    mlp = dense_mlp(config, read_all(source, expert_names(config, layer, expert), dtype, write))

A mixture in the making is written from what its calibration reads, so that each weight is read once: that is what `write`
is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from octad.checkpoint.names import EMBEDDING, PARTS, expert_name, is_ffn, tensor_plan
from octad.checkpoint.source import TensorSource
from octad.errors import CheckpointError
from octad.model.config import ModelConfig, dense_config
from octad.model.moe import MLP
from octad.model.transformer import DecoderLayer
from octad.text.windows import Batch

BLOCK_BYTES = 128 << 20  # of the rows of a matrix that are in memory at a time


class Write(Protocol):
    """Who gets what was read: a tensor, or its rows from number `first` on."""

    def __call__(self, name: str, tensor: torch.Tensor, first: int = 0, /) -> None:
        """Rows of one tensor come in order."""


def forget(name: str, tensor: torch.Tensor, first: int = 0) -> None:
    """A Write that does nothing with what was read."""


def embedded(
    source: TensorSource, texts: Sequence[Batch], dtype: torch.dtype, write: Write = forget
) -> Callable[[Batch], torch.Tensor]:
    """The function from a batch of these texts to its embeddings, h_BSD. Of a table on disk only their rows are read."""
    ids = torch.tensor(sorted({i for batch in texts for i in batch.tokens.flatten().tolist()}))
    if len(ids) and int(ids[-1]) >= source.config.vocab_size:
        raise CheckpointError(
            f"{source.label}: token {int(ids[-1])} has no row: the embeddings have {source.config.vocab_size}"
        )
    if (extent := source.extent(EMBEDDING)) is not None:
        width = source.config.hidden_size
        rows = extent.blocks((ids * width).tolist(), width).to(dtype)
    else:
        table = source.read(EMBEDDING)
        write(EMBEDDING, table)
        rows = table[ids].to(dtype)
    return lambda batch: rows[torch.searchsorted(ids, batch.tokens)]


def read_all(
    source: TensorSource, names: Mapping[str, str], dtype: torch.dtype, write: Write
) -> dict[str, torch.Tensor]:
    """Read the named tensors, hand each on to be written, and give them in `dtype` under their keys."""
    found = {}
    for key, name in names.items():
        tensor = source.read(name)
        write(name, tensor)
        found[key] = tensor.to(dtype)
    return found


def shared_names(config: ModelConfig, layer: int) -> dict[str, str]:
    """The tensors of a layer that all experts share, by their names inside it: norms and attention."""
    prefix = f"model.layers.{layer}."
    names = tensor_plan(dense_config(config))
    return {n.removeprefix(prefix): n for n in names if n.startswith(prefix) and not is_ffn(n)}


def expert_names(config: ModelConfig, layer: int, expert: int) -> dict[str, str]:
    """The tensors of one expert, by their names in a dense feed-forward network."""
    return {f"{part}_proj.weight": expert_name(config.model_type, layer, expert, part) for part in PARTS}


def shared_block(config: ModelConfig, layer: int, tensors: Mapping[str, torch.Tensor]) -> DecoderLayer:
    """The shared part of one layer, or all of a dense model's but its feed-forward network, which stays on the meta
    device."""
    with torch.device("meta"):
        block = DecoderLayer(dense_config(config) if config.is_moe else config, layer)
    block.load_state_dict(tensors, strict=False, assign=True)
    return block


def dense_mlp(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> MLP:
    """One expert as a dense feed-forward network."""
    with torch.device("meta"):
        mlp = MLP(config.hidden_size, config.moe_intermediate_size)
    mlp.load_state_dict(tensors, assign=True)
    return mlp


def blocks_of_rows(
    source: TensorSource, name: str, dtype: torch.dtype, write: Write
) -> Iterator[torch.Tensor]:
    """A matrix in `dtype`, some rows at a time (until the next are asked for), cut alike for all of one shape: where it
    lies on the disk as it is these alone are read, else it is made whole. What is read goes to `write` first."""
    height, width = source.info(name).shape
    extent, most = source.extent(name), max(1, BLOCK_BYTES // (width * dtype.itemsize))
    if extent is None or height <= most:
        yield from torch.split(read_all(source, {name: name}, dtype, write)[name], most)
        return
    held = torch.empty(most, width, dtype=dtype)  # once: fresh memory costs more than what is done with it
    for first in range(0, height, most):
        block = extent.part(first * width, (min(most, height - first), width)).read(past=True)
        write(name, block, first)
        yield held[: len(block)].copy_(block)


def expert_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """One expert of one layer in memory."""
    return 3 * config.hidden_size * config.moe_intermediate_size * dtype.itemsize
