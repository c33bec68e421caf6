"""A model as one GGUF file, for llama.cpp, Ollama and LM Studio.

    write_gguf(source, "octad.gguf", "q8_0")

Names, and which rows lie otherwise, are those of the tables that octad reads GGUF files with. Norms, routers and biases
stay float32; a weight whose rows are no whole number of blocks is written in float16, as llama.cpp's converter does.
Memory is one tensor of the file (an expert stack of one layer, expert by expert).

Shapes: E experts, O outputs, K inputs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octad.checkpoint.gguf.header import MAGIC
from octad.checkpoint.gguf.metadata import ROPE_FACTORS
from octad.checkpoint.gguf.reader import GLOBAL_NAMES, LAYER_NAMES
from octad.checkpoint.load import load_tokenizer
from octad.checkpoint.names import EMBEDDING, expert_name, layer_of, router_name, tensor_plan
from octad.checkpoint.narrow import lost_below
from octad.checkpoint.source import TensorSource
from octad.errors import CheckpointError, OutputError
from octad.export.gguf_metadata import Form, add_metadata, gguf_form, rope_factors
from octad.export.gguf_vocabulary import add_vocabulary, vocabulary_values
from octad.model.families import Part
from octad.staging import explained, refuse_inputs, space, staged_file
from octad.telling import Progress, quiet

# what the user asks for -> the types of most weights, and of embeddings and head
TYPES: Mapping[str, tuple[str, str]] = {
    "f32": ("F32", "F32"),
    "f16": ("F16", "F16"),
    "bf16": ("BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0"),
    "q5_1": ("Q5_1", "Q8_0"),
    "q5_0": ("Q5_0", "Q8_0"),
    "q4_1": ("Q4_1", "Q8_0"),
    "q4_0": ("Q4_0", "Q8_0"),
}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
QUANTIZATION_VERSION = 2
STACKS: Mapping[Part, str] = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
_HUB_LAYER = {hub: own for own, hub in LAYER_NAMES.items()}
_HUB_GLOBAL = {hub: own for own, hub in GLOBAL_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: the hub's tensors that it is made of (several: stacked), and how."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str  # F32, BF16, Q8_0, ...
    heads: int = 0  # > 0: rows are interleaved, head by head


def write_gguf(
    source: TensorSource,
    path: str | os.PathLike[str],
    kind: str = "bf16",
    *,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Path:
    """Write the source's model; returns the file, which appears whole or not at all.

    Raises CheckpointError for what the format cannot hold, OutputError for a type that cannot be written here or a file
    that exists."""
    from gguf import GGUFWriter

    final = Path(path)
    if kind not in TYPES:
        raise OutputError(
            f"--quantize: found {kind!r}, octad writes {', '.join(TYPES)}; for others (q4_k_m, q6_k, ...) write bf16 and"
            " run llama.cpp's llama-quantize on it"
        )
    if final.is_dir():
        raise OutputError(f"{final}: is a directory; name a file, such as {final / 'model.gguf'}")
    if final.exists() and not overwrite:
        raise OutputError(f"{final}: exists; choose another -o, or add --overwrite")
    refuse_inputs(final, [source.directory, getattr(source, "path", None)])
    if final.exists() and not _is_gguf(final):
        raise OutputError(f"{final}: is no GGUF file to overwrite; choose another -o, or remove it yourself")
    if not final.exists() and final.suffix.lower() != ".gguf":  # "dir/" has lost its slash on the way
        raise OutputError(
            f"{final}: a GGUF file's name ends in .gguf: -o {final}.gguf, or {final / 'model.gguf'} in a directory"
        )
    form = gguf_form(source)
    entries = list(plan(source, form, kind))
    values = vocabulary_values(load_tokenizer(source), source.config.vocab_size)
    with explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _need_space(final, sum(int(np.prod(_byte_shape(entry))) for entry in entries))
    with staged_file(final) as part:
        progress("writing", 0.0)  # nothing is left to refuse
        writer = GGUFWriter(part, form.architecture)
        try:
            add_metadata(writer, source.config, form, final.stem)
            writer.add_file_type(FILE_TYPES[kind])
            writer.add_quantization_version(QUANTIZATION_VERSION)
            add_vocabulary(writer, values)
            _write(writer, source, entries, progress)
        finally:
            writer.close()
    return final


def _need_space(final: Path, needed: int) -> None:
    """Raises OutputError, before anything is written, where the disk has no place for the weights."""
    if shutil.disk_usage(final.parent).free < needed:
        raise OutputError(
            f"{final}: {space(final.parent, needed)}; free some, choose another -o, or round the weights with --quantize"
        )


def _is_gguf(path: Path) -> bool:
    """Whether a file is called or begins like one: what --overwrite may replace, so that a slip takes no weights."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _write(
    writer: Any, source: TensorSource, entries: Sequence[Entry], progress: Callable[[str, float], None]
) -> None:
    for entry in entries:
        shape = _byte_shape(entry)
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), int(np.prod(shape)), _type(entry.kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, entry in enumerate(entries, 1):
        writer.write_tensor_data(values_of(source, entry))
        progress("writing", done / len(entries))
    writer.fout[0].flush()


# ---- what is written ---------------------------------------------------------------------------------------


def plan(source: TensorSource, form: Form, kind: str) -> Iterator[Entry]:
    """The file's tensors in order: embeddings, then layer by layer, then norm and head."""
    config = source.config
    most, ends = TYPES[kind]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    shapes = tensor_plan(config)
    if rope_factors(config) is not None:
        yield Entry(ROPE_FACTORS, (), (config.head_dim // 2,), "F32")
    seen: set[int] = set()
    for name, shape in shapes.items():
        layer = layer_of(name)
        if layer is None:
            yield _entry(_HUB_GLOBAL[name], (name,), shape, ends)
        elif name == router_name(config.model_type, layer) if config.is_moe else False:
            yield Entry(f"blk.{layer}.ffn_gate_inp.weight", (name,), shape, "F32")
        elif ".experts." in name:
            if layer not in seen:
                seen.add(layer)
                yield from _stacks(source, layer, most)
        else:
            stem, _, what = name.removeprefix(f"model.layers.{layer}.").rpartition(".")
            own = _HUB_LAYER[stem]
            if form.no_shared_expert and own.endswith("_shexp"):
                continue
            rows = heads.get(own, 0) if form.interleaved else 0
            yield _entry(f"blk.{layer}.{own}.{what}", (name,), shape, most, rows)
    if form.head and config.tie_word_embeddings:
        yield _entry("output.weight", (EMBEDDING,), shapes[EMBEDDING], ends)


def _stacks(source: TensorSource, layer: int, kind: str) -> Iterator[Entry]:
    config = source.config
    for part, own in STACKS.items():
        names = tuple(expert_name(config.model_type, layer, e, part) for e in range(config.num_experts))
        shape = (len(names), *source.info(names[0]).shape)
        yield _entry(f"blk.{layer}.{own}.weight", names, shape, kind)


def _entry(name: str, sources: tuple[str, ...], shape: tuple[int, ...], kind: str, heads: int = 0) -> Entry:
    """Vectors, and the gate of a shared expert, are float32; rows that no block divides are float16."""
    from gguf.constants import GGML_QUANT_SIZES

    if len(shape) == 1 or (name.endswith("_shexp.weight") and shape[0] == 1):
        return Entry(name, sources, shape[-1:], "F32", heads)
    block, _ = GGML_QUANT_SIZES[_type(kind)]
    return Entry(name, sources, tuple(shape), kind if shape[-1] % block == 0 else "F16", heads)


def _type(kind: str) -> Any:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType[kind]


def _byte_shape(entry: Entry) -> tuple[int, ...]:
    from gguf.quants import quant_shape_to_byte_shape

    shape: tuple[int, ...] = quant_shape_to_byte_shape(entry.shape, _type(entry.kind))
    return shape


def values_of(source: TensorSource, entry: Entry) -> np.ndarray[Any, Any]:
    """The bytes of one tensor of the file, uint8 in its byte shape. Raises CheckpointError where float16 fails."""
    if entry.name == ROPE_FACTORS:
        factors = rope_factors(source.config)
        assert factors is not None
        return factors.numpy().view(np.uint8)
    whole = np.empty(_byte_shape(entry), np.uint8)
    stacked = len(entry.sources) > 1
    for number, name in enumerate(entry.sources):
        values = source.read(name)
        if entry.heads:
            values = interleave(values, entry.heads)
        target = whole[number] if stacked else whole
        target[...] = _encoded(values, entry, name).reshape(target.shape)
    return whole


def _encoded(values: torch.Tensor, entry: Entry, name: str) -> np.ndarray[Any, Any]:
    from gguf.quants import quantize

    if entry.kind == "BF16" and values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.uint8).numpy()
    floats = values.float().contiguous().numpy()
    if entry.kind not in ("F32", "BF16") and not np.all(
        np.abs(floats) <= np.finfo(np.float16).max
    ):  # scales are float16
        raise CheckpointError(f"{name}: has values beyond float16's range; choose another type, such as bf16")
    if entry.kind == "F16" and (line := lost_below(values, values.to(torch.float16))):
        raise CheckpointError(f"{name}: {line}; choose another type, such as bf16")
    found: np.ndarray[Any, Any] = np.ascontiguousarray(quantize(floats, _type(entry.kind)))
    return found.view(np.uint8)


def interleave(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (h, half, i) -> (h, i, half), as llama.cpp's "llama" rotates neighbours: [H*K, ...] -> [H*K, ...]; biases too.

    The inverse of checkpoint/gguf/reader.py's deinterleave."""
    rows, rest = values.shape[0], values.shape[1:]
    return values.view(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(values.shape).contiguous()
