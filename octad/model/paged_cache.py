"""PagedCache: the model's view of the block pool for one step's flat batch.

    pool = BlockPool(config, num_blocks, block_size, dtype, device)
    hidden_1ND = model.model(tokens_1N, PagedCache(pool, batch, start, slots_N, attention))

The pool is the memory, made once; a PagedCache is made each step and says where the step's tokens stand: the position of
each in its sequence (or, of a single sequence, where it goes on), and its slot in the pool (block * block_size + offset).

Shapes: N tokens of the step, P block size, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import torch

from octad.errors import RequestError
from octad.kernels.arena import fresh
from octad.kernels.paged import PagedAttention, PagedBatch
from octad.machine import available_memory
from octad.model import cost
from octad.model.config import ModelConfig
from octad.model.observe import Watch
from octad.model.transformer import Transformer

# of a layer's keys, and of its values, in ordinary pages: a short answer in huge ones would take one of 2 MB in each
SHORT_BYTES = 2 << 20


class BlockPool:
    """Keys and values of every layer, each [num_blocks, P, G, K]. On the CPU memory is taken when it is first written.

    All zero at first: positions that a mask hides must still be finite numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [_zeros(shape, dtype, torch.device(device)) for _ in layers]
        self.values = [_zeros(shape, dtype, torch.device(device)) for _ in layers]
        self.windows = [config.window(layer) for layer in layers]
        self.key_slots = [keys.flatten(0, 1) for keys in self.keys]  # views, [num_blocks * P, G, K]
        self.value_slots = [values.flatten(0, 1) for values in self.values]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU from fresh pages of the system, which are zero and cost nothing until they are touched."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    try:  # a sequence's positions lie far apart: huge pages are fewer to find
        return fresh(size, SHORT_BYTES).view(dtype).view(shape)
    except (OSError, OverflowError, ValueError) as error:
        raise RequestError(
            f"key/value cache: the system does not give {size:,} bytes a layer; ask for a smaller kv_cache_gb"
        ) from error


class PagedCache:
    """The KVCache of one step: tokens of R sequences side by side, B = 1. `start`: as KVCache.positions returns it.
    `watch` is told of the routing, by layers that decode in one call."""

    def __init__(
        self,
        pool: BlockPool,
        batch: PagedBatch,
        start: int | torch.Tensor,
        slots_N: torch.Tensor,
        attention: PagedAttention,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.pool, self.batch, self.attention = pool, batch, attention
        self.start, self.slots_N = start, slots_N
        self.decoding = len(batch.queries) == len(slots_N)  # every sequence has one new token

    def positions(self, count: int) -> int | torch.Tensor:
        """See KVCache.positions."""
        return self.start

    def attend(
        self, layer: int, q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor
    ) -> torch.Tensor:
        """See KVCache.attend."""
        pool = self.pool
        pool.key_slots[layer].index_copy_(0, self.slots_N, k_BSGK[0])
        pool.value_slots[layer].index_copy_(0, self.slots_N, v_BSGK[0])
        y_NHK = self.attention(
            q_BSHK[0], pool.keys[layer], pool.values[layer], self.batch, pool.windows[layer]
        )
        return y_NHK[None]

    def advance(self, positions: int) -> None:
        """See KVCache.advance: the scheduler counts, nothing to do."""


def affordable_blocks(
    model: Transformer, block_size: int, gigabytes: float | None, wanted_tokens: int
) -> int:
    """How many blocks the cache gets: those that fit into `gigabytes` (10^9 bytes), or by default into a quarter of the
    free memory (on an accelerator, where nothing else needs it, 0.8), but no more than hold `wanted_tokens`."""
    weight = model.model.norm.weight
    a_block = block_size * cost.kv_bytes_per_token(model.config, weight.dtype.itemsize)
    free = gigabytes * 1e9 if gigabytes else _free_memory(weight.device)
    return max(1, min(int(free // a_block), -(-wanted_tokens // block_size)))


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    return 0.25 * (available_memory() or 4e9)
