"""What contestants said of texts, kept by content: a second evaluation computes only what is new.

    cache = Cache(Path("~/.cache/octad/evaluate"))
    record = cache.get(key)                 # None where it is not there, or damaged
    cache.put(key, record)                  # whole or not at all

A key is a digest of everything that the numbers depend on: the contestant's weights, the windows' ids, the precision, the
machine, and VERSION, which changes when octad computes them differently. A member inside a mixture is keyed by the
tensors that it uses, so that a mixture with another router finds its members again.

Shapes: T predicted tokens, L layers, G domains, E experts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from octad import portable
from octad.checkpoint.load import content_names
from octad.checkpoint.names import parameter_sources
from octad.checkpoint.source import TensorSource
from octad.errors import OutputError
from octad.evaluate.contestants import Contestant, Member, Original, Soup, TopK
from octad.fingerprint import digest_of
from octad.kernels.compile import cache_directory
from octad.staging import replace_file

VERSION = 2
SAMPLE_BYTES, SAMPLE_STRIDE = 64 << 10, 4 << 20  # of tensors, where hashing all would take too long
WHOLE_BYTES = 8 << 30


@dataclass(frozen=True)
class Record:
    """nats_T of one contestant, what was measured meanwhile (tokens_per_second, working_bytes), and for a mixture how
    often each expert was chosen: load_LGE."""

    nats: torch.Tensor
    measured: dict[str, float]
    load: torch.Tensor | None = None


def default_directory() -> Path:
    """~/.cache/octad/evaluate, or where OCTAD_CACHE or XDG_CACHE_HOME say."""
    return cache_directory() / "evaluate"


class Cache:
    """Records in a directory, one file each; None: nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def get(self, key: str) -> Record | None:
        """The record, None where there is none that is whole."""
        if self.directory is None:
            return None
        try:
            with safe_open(self._path(key), "pt") as file:
                metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["digest"] != _digest(tensors) or metadata["key"] != key:
                return None
            measured = {name: float(v) for name, v in json.loads(metadata["measured"]).items()}
            return Record(tensors["nats"], measured, tensors.get("load"))
        except Exception:  # whatever is wrong with the file: it is made again
            return None

    def put(self, key: str, record: Record) -> None:
        """Keep it, atomically."""
        if self.directory is None:
            return
        tensors = {"nats": record.nats.contiguous()} | ({} if record.load is None else {"load": record.load})
        metadata = {"key": key, "digest": _digest(tensors), "measured": json.dumps(record.measured)}
        self._write(self._path(key), save(tensors, metadata))

    def get_plain(self, key: str) -> dict[str, Any] | None:
        """Plain data that was kept, None where there is none that is whole."""
        if self.directory is None:
            return None
        try:
            kept = json.loads(self._path(key, "json").read_text(encoding="utf-8"))
            return dict(kept["value"]) if kept["digest"] == key_of(kept["value"]) else None
        except Exception:
            return None

    def put_plain(self, key: str, value: dict[str, Any] | None) -> None:
        """Keep plain data, atomically."""
        if value is not None:
            kept = {"digest": key_of(json.loads(json.dumps(value))), "value": value}
            self._write(self._path(key, "json"), json.dumps(kept).encode())

    def _write(self, path: Path, content: bytes) -> None:
        """What cannot be written (a full disk, a directory of somebody else) is not kept: that costs time alone."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content, own_place=True)
        except (OSError, OutputError):
            return

    def _path(self, key: str, kind: str = "safetensors") -> Path:
        return (self.directory or Path()) / f"{key}.{kind}"


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def key_of(*parts: Any) -> str:
    """One digest of all parts, which must be plain data."""
    return digest_of([VERSION, *parts])


@dataclass
class Content:
    """Digests of a source's weights: what all share, each expert's, the routers'. Made when first asked for."""

    source: TensorSource
    _found: tuple[str, list[str], str] | None = field(default=None, repr=False)

    def of(self, who: Contestant) -> list[Any]:
        """What identifies a contestant inside this source, as plain data."""
        if isinstance(who, Original):
            return Content(who.source).everything()
        if isinstance(who, TopK):
            return ["top", who.k, *self.everything()]
        if not isinstance(who, (Member, Soup)):
            return self.everything()
        shared, experts, _ = self.digests()
        chosen = [who.expert] if isinstance(who, Member) else list(who.experts)
        dense = replace(self.source.config, num_experts=1, num_experts_per_tok=1)
        return [type(who).__name__, repr(dense), shared, *(experts[e] for e in chosen)]

    def everything(self) -> list[Any]:
        """All weights and the config."""
        shared, experts, routers = self.digests()
        return [repr(self.source.config), shared, experts, routers]

    def digests(self) -> tuple[str, list[str], str]:
        """Of what is shared, of each expert, of the routers."""
        if self._found is None:
            self._found = self._digests()
        return self._found

    def _digests(self) -> tuple[str, list[str], str]:
        tensors = _tensor_digests(self.source)
        E = self.source.config.num_experts
        if (
            tensors is None
        ):  # a source whose tensors do not lie on disk as they are read: its files say what it is
            base = getattr(self.source, "base", None)  # an adapter's files say nothing of what they change
            whole = key_of(
                self.source.provenance().get("files"), Content(base).everything() if base else None
            )
            return whole, [whole + str(e) for e in range(E)], whole
        shared, routers, experts = list[str](), list[str](), [list[str]() for _ in range(E)]
        for parameter, names in parameter_sources(self.source.config).items():
            for place, name in enumerate(names):
                if ".mlp.experts." in parameter:
                    experts[place * E // len(names)].append(tensors[name])
                else:
                    (routers if parameter.endswith(".mlp.gate.weight") else shared).append(tensors[name])
        return key_of(shared), [key_of(own) for own in experts], key_of(routers)


def _tensor_digests(source: TensorSource) -> dict[str, str] | None:
    """Of every tensor's bytes on disk; None where some have none."""
    extents = {name: source.extent(name) for name in content_names(source)}
    if any(extent is None for extent in extents.values()):
        return None
    whole = sum(source.info(name).nbytes for name in extents) <= WHOLE_BYTES

    def digest(name: str) -> str:
        """Of one tensor."""
        extent: Any = extents[name]
        found = hashlib.sha256(repr(extent.info).encode())
        with open(extent.path, "rb") as file:
            fd, size, start = file.fileno(), extent.info.nbytes, extent.offset
            step = SAMPLE_STRIDE
            for at in range(0, size, step):
                found.update(
                    portable.read_at(fd, min(step if whole else SAMPLE_BYTES, size - at), start + at)
                )
        return found.hexdigest()

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(extents, pool.map(digest, extents), strict=True))
