"""From a checkpoint to a model that runs fast, without ever holding the model as it is on disk.

    model, attention = open_fast(source, torch.float32, quantize="int8")
    Engine(model, tokenizer, EngineConfig(), attention)

On the native kernels each weight is read, packed and forgotten, expert by expert, so memory peaks at the packed weights
and one weight as it was. Elsewhere (a GPU, no compiler, another dtype) the model is loaded whole and its modules are
swapped where that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from octad.checkpoint.load import assign, empty_model, load_model
from octad.checkpoint.names import EMBEDDING, HEAD, is_linear, layer_of, parameter_sources
from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.dist import compute_dtype
from octad.fast.native_modules import Weight, native_attention
from octad.fast.optimize import ExpertWeights, Swapper, is_bfloat16, native_kernels, optimize, same_or_held
from octad.fast.quantize import Precision
from octad.fast.saved import load_quantized, packed_weight, place_linear
from octad.kernels.native import NativeKernels
from octad.kernels.packed import Packed
from octad.kernels.paged import PagedAttention
from octad.model.transformer import Transformer


def open_fast(
    source: TensorSource,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    quantize: str | None = None,
    native: bool = True,
) -> tuple[Transformer, PagedAttention]:
    """The source's model in eval mode on the fastest modules that this machine has, and the attention to run it with.

    `dtype` is that of the activations (by default what the hardware is fast at), `quantize` "int8", "int4" or None. A
    quantised checkpoint runs with the weights that it holds. Raises RequestError as `optimize`, CheckpointError for
    what cannot be read."""
    dtype = dtype or compute_dtype(device)
    fits = torch.device(device).type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    kernels = native_kernels() if native and fits else None
    if kernels is None:
        quantised = isinstance(source, QuantizedSource)
        model = (load_quantized if quantised else load_model)(source, dtype, device)  # type: ignore[arg-type]
        return model, optimize(model, quantize=quantize, native=native)
    precision = _precision(source, dtype, quantize)
    with torch.no_grad():
        return _Reader(source, dtype).build(kernels, precision), native_attention(kernels)


def _precision(source: TensorSource, dtype: torch.dtype, quantize: str | None) -> Precision:
    """The bits that were asked for, those that the file has, or the fewest that lose nothing."""
    held = None
    if isinstance(source, QuantizedSource):
        held = Precision(source.schemes.ffn.bits, source.schemes.attention.bits, 8)
    asked = None if quantize is None else Precision.of(quantize)
    if found := same_or_held(asked, held):
        return found
    if dtype == torch.bfloat16:
        return Precision(16, 16, 16)
    exact = 16 if all(_holds_bfloat16(source, name) for name in _products(source)) else 32
    return Precision(exact, exact, exact, wide=exact == 16)


def _products(source: TensorSource) -> Iterator[str]:
    """The weights that products read: layer by layer, and the head's."""
    for names in parameter_sources(source.config).values():
        yield from filter(is_linear, names)
    yield EMBEDDING if source.config.tie_word_embeddings else HEAD


def _holds_bfloat16(source: TensorSource, name: str) -> bool:
    return source.info(name).dtype == torch.bfloat16 or is_bfloat16(source.read(name))


class _Reader:
    """Fills one model from one source."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self.model = empty_model(source.config)
        self.parameters = parameter_sources(source.config)

    def build(self, kernels: NativeKernels, precision: Precision) -> Transformer:
        """The whole model on native modules."""
        swapper = Swapper(self.model, kernels, precision)
        for parameter in self.parameters:
            if layer_of(parameter) is None and parameter != HEAD:
                self._fill(parameter)
        for number in range(len(self.model.model.layers)):
            at = f"model.layers.{number}."
            experts = f"{at}mlp.experts."
            for parameter in self.parameters:
                if parameter.startswith(at) and not parameter.startswith(experts):
                    self._fill(parameter)
            swapper.layer(number, self._experts(experts))
        swapper.ends(self._read(EMBEDDING if self.source.config.tie_word_embeddings else HEAD))
        return self.model

    def _fill(self, parameter: str) -> None:
        """Put one parameter into the model: what will be packed in the type it has on disk, all else in the model's."""
        name = self.parameters[parameter][0]
        value = self._read(name)
        if isinstance(value, Packed):
            place_linear(self.model, parameter, value)
        else:
            assign(self.model, parameter, value if is_linear(name) else value.to(self.dtype))

    def _experts(self, prefix: str) -> ExpertWeights | None:
        """The experts' weights of one layer, each read when it is asked for; None for a dense layer."""
        if f"{prefix}down_proj" not in self.parameters:
            return None
        gates_ups: Sequence[str] = self.parameters[f"{prefix}gate_up_proj"]
        pairs = zip(gates_ups[0::2], gates_ups[1::2], strict=True)
        downs = self.parameters[f"{prefix}down_proj"]
        return ((self._read(gate), self._read(up)) for gate, up in pairs), map(self._read, downs)

    def _read(self, name: str) -> Weight:
        if isinstance(self.source, QuantizedSource) and self.source.scheme(name):
            return packed_weight(self.source, name)
        return self.source.read(name)
