"""What identifies a file: its name, its size and a digest of what it holds; and a digest of plain data.

fingerprint(Path("model.safetensors"))        # {"name": ..., "bytes": ..., "sha256": ...}
digest_of(["a setting", 3])                   # 64 hexadecimal digits
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octad import portable
from octad.errors import CheckpointError

WHOLE_HASH_BYTES = 1 << 29
SAMPLE_STRIDE, SAMPLE_BYTES = 1 << 24, 1 << 18


def digest_of(data: Any, default: Callable[[Any], Any] | None = None) -> str:
    """The sha256 of plain data, whatever the order of its keys; `default` makes plain data of what is none. Raises
    TypeError where nothing does."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=default).encode()).hexdigest()


def fingerprint(path: Path, whole: int = WHOLE_HASH_BYTES) -> dict[str, Any]:
    """name, bytes and sha256 of one file, for provenance. Raises CheckpointError when it cannot be read.

    Hashing all of a large file costs more than copying it, so past `whole` bytes the key is sha256_sampled: the
    digest of the first SAMPLE_BYTES of every SAMPLE_STRIDE bytes (the header and every part of every large tensor)."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= whole:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return {"name": path.name, "bytes": size, "sha256": digest}
            sampled = hashlib.sha256()
            for start in range(0, size, SAMPLE_STRIDE):
                sampled.update(portable.read_at(file.fileno(), SAMPLE_BYTES, start))
            return {"name": path.name, "bytes": size, "sha256_sampled": sampled.hexdigest()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
