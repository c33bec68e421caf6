"""One .safetensors file: its header, strictly read and written.

    extents = read_header(path); extents["lm_head.weight"].read()
    header, starts = encode_header({"lm_head.weight": TensorInfo((32000, 4096), torch.bfloat16)})

The format is eight bytes of header length (little endian), a JSON header, then the tensors back to back.

Source: the safetensors format description; the checks are those of its reference parser (no gap, no overlap,
no trailing bytes), and duplicate keys are refused too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.extent import Extent
from octad.checkpoint.source import TensorInfo
from octad.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64


def read_header(path: Path) -> dict[str, Extent]:
    """Every tensor of a .safetensors file, in disk order, read and verified without touching the data.

    Raises CheckpointError, one line, for a file that is unreadable, truncated or lies about itself.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = int.from_bytes(first, "little")
            _check_length(path, first, length, size)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    extents = [_extent(path, 8 + length, name, entry) for name, entry in _entries(path, raw)]
    extents.sort(key=lambda item: (item[1].offset, item[1].info.nbytes))
    _check_layout(path, extents, 8 + length, size)
    return dict(extents)


def encode_header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The bytes that open a file of these tensors, and each tensor's offset from the start of the file.

    Wide dtypes go first, so that every tensor stays aligned to its own size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets = [position, position + info.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    starts = {name: start + header[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, starts


def _check_length(path: Path, first: bytes, length: int, size: int) -> None:
    if first.startswith(b"version "):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
    if len(first) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: is not a safetensors file (header length {length}, file of {size} bytes)"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated: its header alone takes {8 + length} bytes, the file has {size}; download it again"
        )


def _entries(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is not a safetensors file: header is not valid JSON ({error})"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: is not a safetensors file: header is not a JSON object")
    return [(name, entry) for name, entry in header.items() if name != "__metadata__"]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _extent(path: Path, start: int, name: str, entry: Any) -> tuple[str, Extent]:
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {kind!r}; supported: {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: tensor {name} has a malformed shape {shape!r} or data_offsets {offsets!r}"
        )
    info = TensorInfo(tuple(shape), DTYPES[kind])
    if offsets[1] - offsets[0] != info.nbytes:
        raise CheckpointError(
            f"{path}: tensor {name} says {offsets[1] - offsets[0]} bytes,"
            f" but {kind} {list(shape)} takes {info.nbytes}; the file is damaged"
        )
    return name, Extent(path, start + offsets[0], info)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_layout(path: Path, extents: list[tuple[str, Extent]], start: int, size: int) -> None:
    promised = start + sum(extent.info.nbytes for _, extent in extents)
    for name, extent in extents:
        if extent.offset != start:
            fault = "overlaps the tensor before it" if extent.offset < start else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {name} {fault} (byte {extent.offset}); the file is damaged"
            )
        start += extent.info.nbytes
    if promised > size:
        raise CheckpointError(
            f"{path}: truncated: its header promises {promised} bytes, the file has {size}; download it again"
        )
    if promised < size:
        raise CheckpointError(f"{path}: {size - promised} bytes follow the last tensor; the file is damaged")
