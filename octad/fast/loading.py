"""From a checkpoint to a model that runs fast, without ever holding the model as it is on disk.

    model, attention = open_fast(source, torch.float32, quantize="int8")
    Engine(model, tokenizer, EngineConfig(), attention)

On the native kernels each weight is read, packed and forgotten, expert by expert, so memory peaks at the packed weights
and one weight as it was. Elsewhere (a GPU, no compiler, another dtype) the model is loaded whole and its modules are
swapped where that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import torch

from octad.checkpoint.load import assign, empty_model, load_model
from octad.checkpoint.names import EMBEDDING, HEAD, is_linear, layer_of, parameter_sources
from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.dist import compute_dtype, dtype_name
from octad.errors import RequestError
from octad.fast.beginning import Begun, source_name
from octad.fast.held import load_quantized, packed_weight, place_linear
from octad.fast.native_modules import NarrowEmbedding, Weight, native_attention
from octad.fast.optimize import ExpertWeights, Swapper, is_bfloat16, native_kernels, optimize, same_or_held
from octad.fast.precision import Precision
from octad.fast.record_plan import scheme_of
from octad.fast.records import FilledRecords, Records, open_records
from octad.figures import human
from octad.kernels.filling import Impossible, Rows
from octad.kernels.native import NativeKernels
from octad.kernels.packed import Packed, pack
from octad.kernels.packing import quick_pack
from octad.kernels.paged import PagedAttention
from octad.model import cost
from octad.model.transformer import Transformer

Take = Callable[[str], Weight]  # of a product, by its name
NO_OFFLOAD = "--memory: needs octad's native kernels and a CPU; leave it out, or see `octad bench`"


def open_fast(
    source: TensorSource,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    quantize: str | None = None,
    native: bool = True,
    memory: int | None = None,
    begun: Begun | None = None,
) -> tuple[Transformer, PagedAttention]:
    """The source's model in eval mode on the fastest modules that this machine has, and the attention to run it with.

    `dtype` is that of the activations (by default what the hardware is fast at), `quantize` "int8", "int4" or None. A
    quantised checkpoint runs with the weights that it holds. With `memory`, experts take so many bytes at most, and are
    read from its records when a token is sent to them. `begun`: what of the source is being read already; used where it
    is what would be made here. Raises RequestError as `optimize` and where `memory` cannot be kept, CheckpointError for
    what cannot be read."""
    dtype = dtype or compute_dtype(device)
    fits = refuse_impossible(source, dtype, device, quantize=quantize, native=native, memory=memory)
    kernels = native_kernels() if fits else None
    if kernels is None:
        if memory is not None:
            raise RequestError(NO_OFFLOAD)
        quantised = isinstance(source, QuantizedSource)
        model = (load_quantized if quantised else load_model)(source, dtype, device)  # type: ignore[arg-type]
        return model, optimize(model, quantize=quantize, native=native)
    precision = _precision(source, dtype, quantize)
    placed = _finished(begun, source, precision) if begun is not None else None
    with torch.no_grad():
        return _Reader(source, dtype, precision, placed).build(kernels, memory), native_attention(kernels)


def refuse_impossible(
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    quantize: str | None,
    native: bool,
    memory: int | None,
) -> bool:
    """Raises, before a weight is read or a kernel compiled, the RequestError with which `open_fast` would end; says
    whether native kernels are asked for."""
    fits = native and torch.device(device).type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if memory is not None:
        if not fits:
            raise RequestError(NO_OFFLOAD)
        from octad.fast.offloaded import refuse_offload

        refuse_offload(source, quantize, memory)
    refuse_too_large(source, dtype, torch.device(device))
    _asked_or_held(source, quantize)
    return fits


def refuse_too_large(source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
    """Raises RequestError where a GPU's memory cannot hold the weights: before anything is read."""
    if device.type != "cuda":
        return
    from octad.fast.spread import rank_memory  # late: it takes long to import

    needed, there = cost.parameters(source.config) * dtype.itemsize, rank_memory(device)
    if needed > there:
        raise RequestError(
            f"{source.label}: its weights take {human(needed, 'B')}, this GPU has {human(there, 'B')}; several GPUs"
            " answer through vLLM (octad serve MODEL --engine vllm --tensor-parallel-size N) and judge text together"
            " (torchrun --nproc-per-node N -m octad evaluate MODEL --data domains.yaml)"
        )


def dtype_note(source: TensorSource, dtype: torch.dtype) -> str | None:
    """One line where activations have another dtype than the checkpoint's weights; None where it is the same."""
    held = source.info(EMBEDDING).dtype
    if held == dtype:
        return None
    ours, theirs = (dtype_name(kind) for kind in (dtype, held))
    why = "which is what this machine multiplies fastest"
    if (held, dtype) == (torch.bfloat16, torch.float32):
        why = "since this CPU has no products of bfloat16; bfloat16 weights stay so in memory, and nothing is lost"
    return f"computes in {ours}, the checkpoint is {theirs}: {why}"


def _precision(source: TensorSource, dtype: torch.dtype, quantize: str | None) -> Precision:
    """The bits that were asked for, those that the file has, or the fewest that lose nothing."""
    if found := _asked_or_held(source, quantize):
        return found
    if dtype == torch.bfloat16:
        return Precision(16, 16, 16)
    exact = 16 if all(_holds_bfloat16(source, name) for name in _products(source)) else 32
    return Precision(exact, exact, exact, wide=exact == 16)


def _asked_or_held(source: TensorSource, quantize: str | None) -> Precision | None:
    """The bits that were asked for or that the file has. Raises RequestError where they differ."""
    held = None
    if isinstance(source, QuantizedSource):
        held = Precision(source.schemes.ffn.bits, source.schemes.attention.bits, 8)
    return same_or_held(None if quantize is None else Precision.of(quantize), held)


def _products(source: TensorSource) -> Iterator[str]:
    """The weights that products read: layer by layer, and the head's."""
    for names in parameter_sources(source.config).values():
        yield from filter(is_linear, names)
    yield EMBEDDING if source.config.tie_word_embeddings else HEAD


def _holds_bfloat16(source: TensorSource, name: str) -> bool:
    return source.info(name).dtype == torch.bfloat16 or is_bfloat16(source.read(name))


def _finished(begun: Begun, source: TensorSource, precision: Precision) -> Records | None:
    """What was begun, once it is complete; None where it is not what would be made here, or could not be read."""
    there = set(source.names())
    named = {name: source_name(name, source.config) for name in begun.layout.places}
    extents = {name: source.extent(own) for name, own in named.items() if own in there}
    places = {
        name: Rows(extent.path, extent.offset, extent.info.dtype == torch.bfloat16, *extent.info.shape)
        for name, extent in extents.items()
        if extent is not None and extent.info.dtype in (torch.bfloat16, torch.float32)
    }
    if not begun.fits(precision, places):
        return None
    try:
        begun.filling.finish()
    except Impossible:
        return None
    memory = torch.frombuffer(begun.filling.memory, dtype=torch.uint8)
    records = FilledRecords(begun.layout, source.config, begun.schemes, memory, wide=precision.wide)
    for name in begun.filling.missed:
        placed = records.weight(name)
        placed.panels.copy_(pack(source.read(named[name]), placed.bits, placed.group).panels)
    return records


class _Reader:
    """Fills one model from one source. Weights of products are read and packed a few ahead, by threads that share
    nothing: one small operation after the other, each over all cores, would mostly wait for the slowest of them."""

    def __init__(
        self, source: TensorSource, dtype: torch.dtype, precision: Precision, placed: Records | None = None
    ) -> None:
        self.source, self.dtype, self.precision, self.placed = source, dtype, precision, placed
        if isinstance(source, QuantizedSource):
            self.placed = open_records(source)
        self.schemes = precision.schemes(source.config.num_hidden_layers)
        self.model = empty_model(source.config)
        self.parameters = parameter_sources(source.config)
        self.layers: list[list[str]] = [[] for _ in self.model.model.layers]
        for parameter in self.parameters:
            if (layer := layer_of(parameter)) is not None:
                self.layers[layer].append(parameter)

    def build(self, kernels: NativeKernels, memory: int | None = None) -> Transformer:
        """The whole model on native modules."""
        offload = None
        if memory is not None:
            from octad.fast.expert_store import ExpertStore
            from octad.fast.offloaded import Offload, fitting

            offload = Offload(kernels, ExpertStore(fitting(self.placed, self.source.label), memory))
        for parameter in self.parameters:
            if layer_of(parameter) is None and parameter not in (HEAD, EMBEDDING):
                self._fill(parameter)
        self._embed()
        swapper = Swapper(self.model, kernels, self.precision)
        with self._ahead() as take:
            for number, parameters in enumerate(self.layers):
                for parameter in parameters:
                    if ".mlp.experts." not in parameter:
                        self._fill(parameter, take)
                kept = None if offload is None else offload.experts(number)
                swapper.layer(number, kept or self._experts(number, take))
        tied = self.source.config.tie_word_embeddings and self.placed is None
        swapper.ends(self._weight(EMBEDDING if tied else HEAD))
        return self.model

    @contextmanager
    def _ahead(self) -> Iterator[Take]:
        """Gives the weights of products, each once; those that are not in their places yet are made by threads."""
        missing = [name for name in self._in_order() if not self._is_placed(name)]
        if not missing:
            yield self._weight
            return
        with _Ahead(self._packed, missing) as ahead:
            yield lambda name: ahead.take(name) if (placed := self._in_place(name)) is None else placed

    def _is_placed(self, name: str) -> bool:
        return self.placed is not None and name in self.placed.layout.places

    def _in_order(self) -> Iterator[str]:
        """The names of all weights of products, as `build` takes them."""
        for parameters in self.layers:
            single = [p for p in parameters if ".mlp.experts." not in p]
            stacked = sorted(
                (p for p in parameters if ".mlp.experts." in p), reverse=True
            )  # gate and up first
            for parameter in single + stacked:
                yield from filter(is_linear, self.parameters[parameter])

    def _fill(self, parameter: str, take: Take | None = None) -> None:
        """Put one parameter into the model: packed for products, all else in the model's dtype."""
        name = self.parameters[parameter][0]
        weight = take(name) if take is not None and is_linear(name) else None
        if isinstance(weight, Packed):
            place_linear(self.model, parameter, weight)
        elif weight is not None:
            assign(self.model, parameter, weight)
        else:
            assign(self.model, parameter, self.source.read(name).to(self.dtype))

    def _embed(self) -> None:
        """The embeddings: bfloat16 ones stay so, half the bytes of float32."""
        weight = self.source.read(self.parameters[EMBEDDING][0])
        if (weight.dtype, self.dtype) == (torch.bfloat16, torch.float32):
            self.model.model.embed_tokens = NarrowEmbedding(weight, self.dtype)  # type: ignore[assignment]
        else:
            assign(self.model, EMBEDDING, weight.to(self.dtype))

    def _experts(self, layer: int, take: Take) -> ExpertWeights | None:
        """The experts' weights of one layer, each packed; None for a dense layer."""
        at = f"model.layers.{layer}.mlp.experts"
        if f"{at}.down_proj" not in self.parameters:
            return None
        gates_ups = self.parameters[f"{at}.gate_up_proj"]
        pairs = zip(gates_ups[0::2], gates_ups[1::2], strict=True)
        downs = self.parameters[f"{at}.down_proj"]
        return ((take(gate), take(up)) for gate, up in pairs), map(take, downs)

    def _packed(self, name: str) -> Weight:
        weight = self._weight(name)
        if isinstance(weight, Packed):
            return weight
        bits = scheme_of(name, self.schemes).bits
        return quick_pack(weight, bits, wide=self.precision.wide and bits == 16)

    def _in_place(self, name: str) -> Weight | None:
        """The weight where the records have it; None for one that is to be made."""
        placed = self.placed
        return placed.weight(name) if placed is not None and name in placed.layout.places else None

    def _weight(self, name: str) -> Weight:
        if (placed := self._in_place(name)) is not None:
            return placed
        if isinstance(self.source, QuantizedSource) and self.source.scheme(name):
            return packed_weight(self.source, name)
        return self.source.read(name)


class _Ahead:
    """Results of `work` for each of some names, by threads, at most a few before they are taken."""

    def __init__(self, work: Callable[[str], Weight], names: Sequence[str]) -> None:
        self.threads, self.work, self.names = torch.get_num_threads(), work, iter(names)
        self.futures: dict[str, Future[Weight]] = {}

    def __enter__(self) -> Self:
        self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        for _ in range(self.threads + 1):
            self._submit()
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)  # PyTorch gives later threads what was set last

    def take(self, name: str) -> Weight:
        """The result, for once. Raises what the work raised."""
        while name not in self.futures:
            self._submit()
        found = self.futures.pop(name).result()
        self._submit()
        return found

    def _submit(self) -> None:
        if (name := next(self.names, None)) is not None:
            self.futures[name] = self.pool.submit(self.work, name)
