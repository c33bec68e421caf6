"""The weights of a checkpoint, read and packed while PyTorch is still being imported, which takes longer than that.

    begun = begin("mixture/", "int8")          # before anything imports PyTorch; returns at once
    from octad.engine.llm import LLM
    LLM("mixture/", quantize="int8", begun=begun)

What is begun is a plan made from config.json and the weights' headers, and threads that read, round and pack outside of
Python's lock, into memory laid out as a file of records (record_plan.py). Nothing is decided here: whatever cannot be
begun in this way is None and is loaded as ever, and loading uses what was begun only where it is just what it would have
made itself (`fits`). Of a checkpoint that `octad quantize` wrote nothing is to be packed; its records are asked for.
Needs no PyTorch.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octad.checkpoint.names import EMBEDDING, HEAD
from octad.checkpoint.record_layout import RecordLayout
from octad.checkpoint.schemes import Schemes
from octad.errors import OctadError
from octad.fast.precision import Precision
from octad.fast.record_plan import product_shapes, record_layout, scheme_of
from octad.guard import read_object
from octad.kernels.filling import Filling, Impossible, Rows
from octad.model.config import ModelConfig
from octad.portable import may_have_gpu, read_ahead

INDEX, SINGLE, RECORDS = "model.safetensors.index.json", "model.safetensors", "packed.octad"
EXACT = Precision(16, 16, 16)
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Begun:
    """Weights on their way into memory, and what they are."""

    config: ModelConfig
    precision: Precision
    schemes: Schemes
    layout: RecordLayout
    filling: Filling

    def stop(self) -> None:
        """Whoever needs it no longer, or has taken its memory, says so."""
        self.filling.stop()

    def fits(self, precision: Precision, places: Mapping[str, Rows]) -> bool:
        """Whether this is what loading would make at this precision of weights that lie at these places."""
        ours, theirs = (replace(p, wide=False) for p in (self.precision, precision))
        return ours == theirs and dict(self.filling.rows) == dict(places) and self.filling.unchanged()


def may_begin(dtype: str, device: str) -> bool:
    """Whether a model that is asked for so ("auto", "float16"; "auto", "cuda") may run on weights that are packed."""
    return device in ("auto", "cpu") and dtype != "float16"


def begin(model: str | os.PathLike[str], quantize: str | None = None) -> Begun | None:
    """The weights of the model in this directory, begun to be read; None where that is not possible, which says nothing
    about the model."""
    path = Path(model).expanduser()
    if not (path / "config.json").is_file() or may_have_gpu():
        return None
    try:
        raw = read_object(path / "config.json")
        if raw.get("quantization_config"):
            _ask_for(path / RECORDS)
            return None
        precision = EXACT if quantize is None else Precision.of(quantize)
        begun = _planned(path, ModelConfig.from_dict(raw), precision)
    except (
        Impossible,
        OctadError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ):
        return None  # loading says what is wrong
    begun.filling.begin(max(1, _processors() - 1))
    return begun


def source_name(name: str, config: ModelConfig) -> str:
    """The tensor that a weight of a product is read from: a tied head is the embeddings."""
    return EMBEDDING if name == HEAD and config.tie_word_embeddings else name


def _planned(path: Path, config: ModelConfig, precision: Precision) -> Begun:
    """Everything but the threads. Raises Impossible, KeyError and what a damaged header raises."""
    schemes = precision.schemes(config.num_hidden_layers)
    layout, shapes = record_layout(config, schemes), product_shapes(config)
    found = dict(_tensors(path))
    filling = Filling(layout.nbytes)
    try:
        for name, (record, part) in layout.places.items():
            rows, scheme = found[source_name(name, config)], scheme_of(name, schemes)
            if (rows.outputs, rows.inputs) != shapes[name] or (precision == EXACT and not rows.bfloat16):
                raise Impossible(f"{name}: is not what the config says, or has no exact form in 16 bits")
            place = {"start": record.offset + part.start, "step": part.step}
            filling.add(name, rows, bits=scheme.bits, group=scheme.group, **place)
    except BaseException:
        filling.stop()
        raise
    return Begun(config, precision, schemes, layout, filling)


def _tensors(path: Path) -> Iterator[tuple[str, Rows]]:
    """The matrices in bfloat16 and float32 of a directory's safetensors, by name."""
    names = [SINGLE]
    if not (path / SINGLE).is_file():
        names = sorted(set(read_object(path / INDEX)["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise Impossible(f"{name}: lies elsewhere")
        yield from _header(path / name)


def _header(file: Path) -> Iterator[tuple[str, Rows]]:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > LONGEST_HEADER:
            raise Impossible(f"{file}: no header")
        header: dict[str, Any] = json.loads(opened.read(length))
        size = os.fstat(opened.fileno()).st_size
    for name, entry in header.items():
        if entry.get("dtype") in ("BF16", "F32") and len(entry["shape"]) == 2:
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            rows = Rows(file, start, entry["dtype"] == "BF16", *entry["shape"])
            if end - start != rows.outputs * rows.inputs * (2 if rows.bfloat16 else 4) or end > size:
                raise Impossible(f"{file}: {name} is not as long as its shape")
            yield name, rows


def _ask_for(file: Path) -> None:
    """Have the system read a file into its cache, by a thread: it may wait for the disk."""
    if file.is_file():
        threading.Thread(target=read_ahead, args=(file,), daemon=True).start()


def _processors() -> int:
    """Those that this process may use, or fewer where it was told so."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, int(told)) if told.isdecimal() and int(told) else there
