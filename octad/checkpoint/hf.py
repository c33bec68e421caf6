"""A model directory as the hub lays it out: config.json and safetensors, one file or shards with an index.

    source = SafetensorsSource("models/base")
    source.names(); source.info(name); source.read(name); source.provenance()

Everything is verified on opening, before any weight is read: headers, the index, that no shard lies
elsewhere, and that names and shapes are those that config.json asks for. Reading is one tensor at a time, so
that peak memory does not grow with the model. Fused experts (`experts.gate_up_proj` [E, 2F, D],
`experts.down_proj` [E, D, F], as transformers 5 can save them) appear under the family's one-by-one names,
and only the bytes of the expert asked for are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from octad.checkpoint.extent import Extent, same_bytes
from octad.checkpoint.names import EMBEDDING, HEAD, expert_name, router_name, tensor_plan
from octad.checkpoint.shard import DTYPE_NAMES, read_header
from octad.checkpoint.source import TensorInfo
from octad.errors import CheckpointError, ConfigError
from octad.fingerprint import fingerprint
from octad.guard import exists, read_object
from octad.model.config import ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FUSED = re.compile(r"^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)$")
_ROUTER = re.compile(r"^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

LONGEST_NAME = 255  # of a file, in bytes; a character has one or more
WHOLE_WEIGHTS_BYTES = 1 << 27  # training changes weights everywhere: samples tell


class SafetensorsSource:
    """A TensorSource over a directory. Raises CheckpointError or ConfigError on opening; see the file's docstring."""

    def __init__(self, directory: str | os.PathLike[str], label: str | None = None) -> None:
        self.directory = Path(directory)
        self.label = label or str(directory)
        self.config = read_config(self.directory, self.label)
        weights, raw = open_weights(self.directory)
        self._extents = one_by_one(raw, self.config)
        self._files = [*weights, self.directory / "config.json"]
        self._provenance: dict[str, Any] | None = None
        verify(self._extents, self.config, self.label)

    def names(self) -> list[str]:
        """All tensor names in disk order, fused experts one by one; a tied head where the file holds one."""
        return list(self._extents)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""
        return self.held(name).info

    def extent(self, name: str) -> Extent | None:
        """Where the tensor's bytes lie, for copying them from file to file."""
        return self.held(name)

    def held(self, name: str) -> Extent:
        """The place of a tensor that is on disk as `read` gives it. Raises CheckpointError."""
        try:
            return self._extents[name]
        except KeyError:
            raise CheckpointError(f"{self.label}: has no tensor {name}") from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own, in the dtype that it has on disk."""
        return self.held(name).read()

    def provenance(self) -> Mapping[str, Any]:
        """kind, label and files: name, bytes and digest of the weights and config.json (hashed once, in threads)."""
        if self._provenance is None:
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                files = list(pool.map(partial(fingerprint, whole=WHOLE_WEIGHTS_BYTES), self._files))
            self._provenance = {"kind": "safetensors", "label": self.label, "files": files}
        return self._provenance


def refuse_unmade(project: Path, label: str) -> None:
    """Raises CheckpointError for a directory of `octad init` whose mixture `octad make` has not made yet."""
    if (project / "branch.yaml").is_file() and (project / "recipe.yaml").is_file():
        raise CheckpointError(f"{label}: its mixture is not made yet; octad make {project} makes it")


def read_config(directory: Path, label: str | None = None, *, quantised: bool = False) -> ModelConfig:
    """The config.json of a model directory; one that says its weights are quantised is refused unless `quantised`. The
    message of any error begins with the label."""
    label = label or str(directory)
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(f"{label}: is an adapter, not a model; use it as a member on top of a base")
        if (directory / "mixture" / "config.json").is_file():
            raise CheckpointError(f"{label}: is a project; its model is {Path(label) / 'mixture'}")
        refuse_unmade(directory, label)
        place = "it" if Path(label).expanduser() == directory else directory
        raise CheckpointError(f"{label}: no config.json in {place}: not a model directory")
    raw = read_object(directory / "config.json")
    if raw.get("quantization_config") and not quantised:
        how = raw["quantization_config"]
        method = how.get("quant_method", "unknown method") if isinstance(how, dict) else ascii(how)[:60]
        raise CheckpointError(
            f"{label}: weights are quantised ({method}); give the unquantised model, or a GGUF file"
        )
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{label}: config.json has a value of the wrong kind: {error}") from error


def open_weights(directory: Path) -> tuple[list[Path], dict[str, Extent]]:
    """The weight files (index included) and every tensor in them, by its name on disk."""
    if (directory / SINGLE).exists():
        path = _inside(directory, SINGLE)
        return [path], read_header(path)
    if (directory / INDEX).exists():
        return _open_shards(directory)
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory}: has only pickle weights ({pickles[0]}), which can run code when loaded and are refused;"
            " convert them to safetensors (transformers: from_pretrained, then save_pretrained)"
        )
    raise CheckpointError(f"{directory}: holds neither {SINGLE} nor {INDEX}")


def _open_shards(directory: Path) -> tuple[list[Path], dict[str, Extent]]:
    index = directory / INDEX
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no usable 'weight_map'")
    shards: dict[str, Path] = {}
    for name in sorted(set(weight_map.values())):
        path = shards[name] = _inside(directory, name)
        if not exists(path) or not path.is_file():
            raise CheckpointError(f"{index}: names {name}, which is missing; download it again")
    extents, elsewhere = dict[str, Extent](), dict[str, str]()
    for shard, path in shards.items():
        found = read_header(path)
        elsewhere |= {name: shard for name in found if weight_map.get(name, shard) != shard}
        extents |= {name: e for name, e in found.items() if weight_map.get(name) == shard}
    if lost := [name for name in weight_map if name not in extents]:
        raise CheckpointError(f"{index}: says {lost[0]} is in {weight_map[lost[0]]}, which does not hold it")
    for name, shard in elsewhere.items():
        raise CheckpointError(
            f"{index}: says {name} is in {weight_map[name]}, but {shard} holds one, too; download it again"
        )
    return [*shards.values(), index], extents


def _inside(directory: Path, name: str) -> Path:
    """directory/name, refused where it leads out of the directory (but for links of the hub's cache to its blobs)."""
    pure, path = PurePosixPath(name), directory / name
    if max((len(os.fsencode(part)) for part in pure.parts), default=0) > LONGEST_NAME:
        raise CheckpointError(
            f"{directory}: no file can have the name {name[:80]!r}...; the index is damaged"
        )
    root, target = directory.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"
    linked = root.parent.name == "snapshots" and target.is_relative_to(blobs)
    if pure.is_absolute() or ".." in pure.parts or not (linked or target.is_relative_to(root)):
        raise CheckpointError(f"{directory}: weight file {name!r} lies outside the directory; refused")
    return path


def one_by_one(raw: Mapping[str, Extent], config: ModelConfig) -> dict[str, Extent]:
    """The family's hub names, whatever layout the file has; disk order is kept."""
    family, found = config.model_type, dict[str, Extent]()
    for name, extent in raw.items():
        if config.is_moe and (match := _FUSED.match(name)) and len(extent.info.shape) == 3:
            found.update(_split(extent, family, int(match[1]), fused=match[2] == "gate_up_proj"))
        elif config.is_moe and (match := _ROUTER.match(name)):
            found[router_name(family, int(match[1]))] = extent
        else:
            found[name] = extent
    if config.tie_word_embeddings and HEAD in found:
        found.setdefault(EMBEDDING, found[HEAD])
    return found


def _split(extent: Extent, family: str, layer: int, *, fused: bool) -> Iterable[tuple[str, Extent]]:
    E, rows, columns = extent.info.shape
    for expert in range(E):
        first = expert * rows * columns
        if fused:
            half = (rows // 2, columns)
            yield expert_name(family, layer, expert, "gate"), extent.part(first, half)
            yield expert_name(family, layer, expert, "up"), extent.part(first + half[0] * columns, half)
        else:
            yield expert_name(family, layer, expert, "down"), extent.part(first, (rows, columns))


def verify(
    extents: Mapping[str, Extent], config: ModelConfig, label: str, elsewhere: Collection[str] = ()
) -> None:
    """That every tensor of the config's plan is there in its shape, but for those held `elsewhere`: CheckpointError."""
    plan = {name: shape for name, shape in tensor_plan(config).items() if name not in elsewhere}
    if missing := [name for name in plan if name not in extents]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{label}: tensor {missing[0]} {list(plan[missing[0]])}{more} is missing:"
            " the download is incomplete or config.json belongs to another model"
        )
    for name, shape in plan.items():
        info = extents[name].info
        if info.shape != shape:
            raise CheckpointError(
                f"{label}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        if info.dtype not in _FLOATS:
            raise CheckpointError(
                f"{label}: tensor {name} is {DTYPE_NAMES[info.dtype]}; weights must be F32, F16, BF16 or F64"
            )
    if config.tie_word_embeddings and HEAD in extents:
        _verify_tied(extents[HEAD], extents[EMBEDDING], label)


def _verify_tied(head: Extent, embedding: Extent, label: str) -> None:
    """A head on disk beside `tie_word_embeddings: true` must be the embedding; transformers unties when it is not."""
    if head != embedding and not (head.info == embedding.info and same_bytes(head, [embedding])[0]):
        raise CheckpointError(
            f"{label}: config.json ties the head to the embeddings, but {HEAD} on disk differs from {EMBEDDING};"
            " set tie_word_embeddings to false in config.json"
        )
