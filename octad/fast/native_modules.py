"""The decoder's modules on the native kernels: same signatures as in the model room, swapped in by optimize.py.

    layer.self_attn = NativeAttention(kernels, layer.self_attn, pack_weight)

Each holds its weights packed (32 to 4 bits) in fast memory and turns one forward into one or two calls, so that
a token costs its weights' reading and little else. Inference only, on the CPU; activations keep the model's dtype.

Shapes: B sequences, S positions, N = B S tokens, D model, H heads, K head dimension, E experts, A experts a token, F
feed-forward hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from octad.kernels.native import NativeKernels, describe
from octad.kernels.packed import Packed
from octad.kernels.paged import PagedAttention, PagedBatch, paged_attention
from octad.model.moe import MLP, Router
from octad.model.rope import Rope
from octad.model.transformer import Attention, RMSNorm

Weight = torch.Tensor | Packed  # [O, K]
PackWeight = Callable[[Weight], Packed]
PackPair = Callable[[Weight, Weight], tuple[Packed, Packed]]


def as_it_is(weight: Weight) -> Packed:
    """A PackWeight for what is packed already: it stays where it is."""
    assert isinstance(weight, Packed)
    return weight


class NativeLinear(nn.Module):
    """nn.Linear."""

    def __init__(
        self, kernels: NativeKernels, weight: Weight, bias: torch.Tensor | None, pack: PackWeight
    ) -> None:
        super().__init__()
        self.kernels, self.weight = kernels, describe([pack(weight)])
        self.bias = None if bias is None else [bias.detach().float().contiguous()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., O] of x [..., K]."""
        flat = x.reshape(-1, x.shape[-1])
        (y,) = self.kernels.linear(self.weight, flat, self.bias)
        return y.view(*x.shape[:-1], -1)


class NarrowEmbedding(nn.Module):
    """nn.Embedding whose weight keeps its narrower dtype in memory: a token reads one row of it, which is widened."""

    def __init__(self, weight_VD: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = nn.Parameter(weight_VD, requires_grad=False), dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """x [..., D] of ids [...], in `dtype`."""
        return F.embedding(tokens, self.weight).to(self.dtype)


class NativeNorm(RMSNorm):
    """RMSNorm."""

    def __init__(self, kernels: NativeKernels, norm: RMSNorm) -> None:
        nn.Module.__init__(self)  # the weight is the other's
        self.kernels, self.eps, self.weight = kernels, norm.eps, norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as x."""
        return self.kernels.rms_norm(x.contiguous(), self.weight, self.eps)


class NativeAttention(Attention):
    """Attention with q, k and v in one call and the rotation in place."""

    def __init__(self, kernels: NativeKernels, attention: Attention, pack: PackWeight) -> None:
        nn.Module.__init__(self)  # Attention's own would make weights
        self.kernels = kernels
        self.layer, self.window, self.head_dim = attention.layer, attention.window, attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = describe([pack(p.weight) for p in projections])
        self.biases = None
        if attention.q_proj.bias is not None:
            self.biases = [p.bias.detach().float().contiguous() for p in projections]
        o = attention.o_proj
        self.o = describe([pack(o.weight)])
        self.o_bias = None if o.bias is None else [o.bias.detach().float().contiguous()]
        self.q_norm, self.k_norm = (
            None if norm is None else NativeNorm(kernels, norm)
            for norm in (attention.q_norm, attention.k_norm)
        )
        self.norm_heads, self.clip = attention.norm_heads, attention.clip

    def project(self, x_BSD: torch.Tensor) -> Sequence[torch.Tensor]:
        """See Attention."""
        ys = self.kernels.linear(self.qkv, x_BSD.reshape(-1, x_BSD.shape[-1]), self.biases)
        return [y.view(*x_BSD.shape[:-1], -1) for y in ys]

    def rotate(self, x_BSHK: torch.Tensor, rope: Rope, start: int | torch.Tensor) -> torch.Tensor:
        """See Attention; in place."""
        S = x_BSHK.shape[1]
        cos, sin = rope.tables(start + S if isinstance(start, int) else 1, x_BSHK.device)
        for x_SHK in x_BSHK:
            self.kernels.rope_(x_SHK, start, cos, sin)
        return x_BSHK

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        (out,) = self.kernels.linear(self.o, y.reshape(-1, y.shape[-1]), self.o_bias)
        return out.view(*y.shape[:-1], -1)


class NativeMLP(nn.Module):
    """MLP: the one expert of a mixture of one."""

    def __init__(self, kernels: NativeKernels, mlp: MLP, pair: PackPair, pack: PackWeight) -> None:
        super().__init__()
        self.kernels = kernels
        gate, up = pair(mlp.gate_proj.weight, mlp.up_proj.weight)
        self.gate, self.up = describe([gate]), describe([up])
        self.down = describe([pack(mlp.down_proj.weight)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y of the same shape as x, [..., D]."""
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = torch.ones(len(flat), 1), torch.zeros(len(flat), 1, dtype=torch.int64)
        return self.kernels.experts(self.gate, self.up, self.down, flat, weights, experts).view_as(x)


class NativeExperts(nn.Module):
    """Experts: only the chosen experts' weights are read, all of them in one call."""

    def __init__(
        self,
        kernels: NativeKernels,
        gates_ups: Iterable[tuple[Weight, Weight]],
        downs: Iterable[Weight],
        pair: PackPair,
        pack: PackWeight,
    ) -> None:
        """`gates_ups`, `downs`: one expert's weights after the other, each packed before the next is asked for."""
        super().__init__()
        self.kernels = kernels
        pairs = [pair(gate, up) for gate, up in gates_ups]
        self.down = describe([pack(weight) for weight in downs])
        self.gate, self.up = describe([gate for gate, _ in pairs]), describe([up for _, up in pairs])

    def forward(self, x_ND: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor) -> torch.Tensor:
        """As Experts.forward."""
        weights, experts = weights_NA.float().contiguous(), experts_NA.contiguous()
        return self.kernels.experts(self.gate, self.up, self.down, x_ND.contiguous(), weights, experts)


class NativeRouter(nn.Module):
    """Router, in float32."""

    def __init__(self, kernels: NativeKernels, router: Router) -> None:
        super().__init__()
        self.kernels = kernels
        self.top_k, self.normalise = router.top_k, router.normalise
        self.weight = nn.Parameter(router.weight.detach().float().contiguous(), requires_grad=False)

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Router.forward."""
        return self.kernels.route(x_ND.contiguous(), self.weight, self.top_k, self.normalise)


ATTENDED = (64, 128)  # head dimensions that the kernel has vector code for


def native_attention(kernels: NativeKernels) -> PagedAttention:
    """Attention over pages on the kernels. Where these have no vector code, prompts go through PyTorch's fused attention.

    A prompt is many queries of one token: at the lengths of a chunk its keys and values stay in the processor's cache,
    and four heads share what is read of them."""

    def each_alone(
        q_NHK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
    ) -> torch.Tensor:
        N, scale = len(q_NHK), q_NHK.shape[-1] ** -0.5
        lengths, tables = _by_token(batch)
        q = q_NHK.contiguous()
        return kernels.paged_attention(q, keys, values, lengths[:N], tables[:N], window, scale)

    def attend(
        q_NHK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
    ) -> torch.Tensor:
        if q_NHK.shape[-1] in ATTENDED:
            return each_alone(q_NHK, keys, values, batch, window)
        return paged_attention(q_NHK, keys, values, batch, window, each_alone)

    return attend


def _by_token(batch: PagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that each token of the step sees, [N], and the blocks that hold them, [N, most blocks]."""
    if len(batch.queries) == sum(batch.queries):
        return batch.context_lens, batch.block_tables
    if "by token" not in batch.memo:
        counts = torch.tensor(batch.queries)
        ends = torch.repeat_interleave(batch.context_lens - batch.query_starts[1:], counts)
        lengths = torch.arange(1, len(ends) + 1, dtype=torch.int32) + ends
        batch.memo["by token"] = lengths, batch.block_tables.repeat_interleave(counts, 0)
    found: tuple[torch.Tensor, torch.Tensor] = batch.memo["by token"]
    return found
