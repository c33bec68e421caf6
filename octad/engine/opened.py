"""A model whose weights are not read yet: its files opened, and all that is asked of it checked.

    opened = Opened.of("mixture/", quantize="int8", max_model_len=4096)    # in an instant, or RequestError
    opened.tokenizer, opened.expert_names, opened.expert_number("french")
    llm = LLM.of(opened)                                                   # reads the weights

What config.json, the tokenizer and the headers of weight files say is enough to refuse what cannot be, so that nobody
waits for a model, or sees a server's page, whose command line is at fault.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octad.checkpoint.load import load_tokenizer, open_source
from octad.dist import compute_dtype
from octad.engine.engine import EngineConfig, context_of
from octad.engine.prompts import check_request, end_ids
from octad.engine.structured import GrammarCompiler
from octad.errors import CheckpointError, RequestError
from octad.fast.loading import dtype_note, refuse_impossible
from octad.guard import read_object

if TYPE_CHECKING:
    from octad.checkpoint.source import TensorSource
    from octad.engine.params import SamplingParams
    from octad.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Opened:
    """What LLM's arguments of these names have become. `dtype_note`: where "auto" chose another dtype than the
    checkpoint's, in one line."""

    source: TensorSource
    tokenizer: Tokenizer
    dtype: torch.dtype
    device: torch.device
    quantize: str | None
    native: bool
    memory: int | None
    settings: EngineConfig
    expert_names: list[str]
    dtype_note: str | None
    grammars: GrammarCompiler

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        native: bool = True,
        memory: int | str | None = None,
        engine: EngineConfig | None = None,
        **engine_options: Any,
    ) -> Opened:
        """The arguments are those of LLM. Raises RequestError for what is asked for and cannot be, CheckpointError for
        files that cannot be read."""
        settings = replace(engine or EngineConfig(), **engine_options)
        if dtype not in ("auto", *DTYPES):
            raise RequestError(f"dtype: found {dtype!r}, allowed: auto, {', '.join(DTYPES)}")
        room, place = None if memory is None else _budget(memory), _device(device)
        source, kind = (
            open_source(os.fspath(model), quantised=True),
            compute_dtype(place) if dtype == "auto" else DTYPES[dtype],
        )
        tokenizer, names = load_tokenizer(source), expert_names(source.directory, source.config.num_experts)
        context_of(settings, source.config.max_position_embeddings)
        refuse_impossible(source, kind, place, quantize=quantize, native=native, memory=room)
        note = dtype_note(source, kind) if dtype == "auto" else None
        forms = GrammarCompiler(tokenizer, end_ids(tokenizer, source.config))
        return cls(source, tokenizer, kind, place, quantize, native, room, settings, names, note, forms)

    def expert_number(self, expert: str | int) -> int:
        """The number of an expert, by name or number. Raises RequestError for one that is not there."""
        return expert_number(self.expert_names, expert)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises the RequestError with which the model would refuse this prompt, or the form of its answer."""
        config = self.source.config
        context = context_of(self.settings, config.max_position_embeddings)
        check_request(prompt, params, self.tokenizer, config, context)
        if params.structured is not None:
            self.grammars.compile(params.structured)


def _budget(memory: int | str) -> int:
    from octad.fast.offloaded import memory_bytes

    return memory_bytes(memory)


def _device(name: str) -> torch.device:
    """Raises RequestError for a device that is not there, and for one that octad has no path for (mps, xpu, meta)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        own = "; on Apple's processors its kernels for the CPU know NEON" * (kind == "mps")
        raise RequestError(
            f"device: found {name!r}, allowed: auto, cpu, cuda: octad has no path of its own for others{own}"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        raise RequestError(
            f"device: found {name!r}, which this machine or this torch does not have"
        ) from error
    return device


def expert_number(names: list[str], expert: str | int) -> int:
    """The number of an expert, by name or number. Raises RequestError for one that is not there."""
    if not names:
        raise RequestError(f"expert {expert!r}: this model is dense, it has no experts")
    if isinstance(expert, int) and 0 <= expert < len(names):
        return expert
    if expert in names:
        return names.index(expert)
    raise RequestError(f"expert {expert!r}: there is none; there are {', '.join(names)}")


def expert_names(directory: Path | None, experts: int) -> list[str]:
    """The names in octad.json where octad made the mixture, else "expert 0", ...; [] for a dense model."""
    path = directory / "octad.json" if directory else None
    if not experts or path is None or not path.is_file():
        return [f"expert {number}" for number in range(experts)]
    try:
        names = [str(entry["name"]) for entry in read_object(path)["experts"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); combine again, or remove it") from None
    if len(names) != experts:
        raise CheckpointError(f"{path}: names {len(names)} experts, the weights have {experts}; remove it")
    return names
