"""What a benchmark measures, who takes part, and what they read.

    options = BenchOptions(model="mixture/", quantize=("none", "int8"), peers=("transformers",))
    entries, notes = line_up(options, open_source(options.model), torch.device("cpu"))

A cell is one thing to measure: reading a prompt of some length, or writing with some number of users behind some context.
An entry is a contestant and what was found of it: octad in each quantisation; the same with fewer experts a token and as
one dense member, which shows the price of the mixture; the peers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from octad.bench.peers import Contestant, LlamaBench, Unmeasured, Worker, find_llama_bench
from octad.bench.worker import answer_room
from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.dist import compute_dtype, dtype_name
from octad.errors import DataError, OctadError, RequestError
from octad.fast.offloaded import memory_bytes
from octad.guard import parse_yaml
from octad.machine import ALL, available_memory
from octad.model import cost
from octad.model.config import ModelConfig, dense_config
from octad.text.documents import read_documents
from octad.text.rows import Document
from octad.text.tokenizer import Tokenizer

PEERS = ("transformers", "llama.cpp")
QUANTIZE = ("none", "int8", "int4")
# bits of a weight of feed-forward nets and experts, with its part of the scales; attention has at least int8's
BITS = {"none": 16.0, "int8": 8.5, "int4": 4.5}
QUICK: Mapping[str, Any] = {
    "prompt_lengths": (128,),
    "contexts": (128,),
    "batch_sizes": (1, 4),
    "decode_tokens": 16,
    "repeat": 2,
    "price": False,
}
MOST_TOKENS, MOST_USERS, MOST_REPEATS = 100_000_000, 4096, 10_000
WORKER_BYTES = 0.5e9  # what Python, torch and a cache take besides the weights


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; lengths in tokens. Raises RequestError for what makes no sense.

    One user behind the first context is always measured: ratios and the price of the mixture are taken there."""

    model: str
    peers: tuple[str, ...] = ()
    llama_bench: str | None = None
    gguf: tuple[Path, ...] = ()
    quantize: tuple[str, ...] = ("none",)
    prompt_lengths: tuple[int, ...] = (128, 512)
    contexts: tuple[int, ...] = (128, 1024)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    decode_tokens: int = 64
    repeat: int = 5
    text: Path | None = None
    device: str = "auto"
    memory: str | None = None  # experts' bytes at most: a contestant more
    price: bool = True  # whether to show what being a mixture costs

    def __post_init__(self) -> None:
        for name, known in (("peers", PEERS), ("quantize", QUANTIZE)):
            for value in getattr(self, name):
                if value not in known:
                    option = "--" + name.removesuffix("s")
                    raise RequestError(f"{option} {value}: not known; give one of {', '.join(known)}")
        for name in ("prompt_lengths", "contexts", "batch_sizes"):
            values = getattr(self, name)
            option, most = "--" + name.replace("_", "-"), MOST_USERS if name == "batch_sizes" else MOST_TOKENS
            if not values or min(values) < 1:
                raise RequestError(f"{option}: give whole numbers above 0, such as 128,512; found {values}")
            if max(values) > most:
                raise RequestError(
                    f"{option}: found a number of {len(str(max(values)))} digits; give {most:,} at most"
                )
        if not (0 < self.decode_tokens <= MOST_TOKENS and 0 < self.repeat <= MOST_REPEATS):
            raise RequestError(
                f"--decode-tokens and --repeat must be at least 1, and at most {MOST_TOKENS:,} and {MOST_REPEATS:,}"
            )
        if self.memory is not None:
            memory_bytes(self.memory)
        if not self.quantize:
            raise RequestError(f"--quantize: give at least one of {', '.join(QUANTIZE)}")

    def cells(self) -> list[Cell]:
        """Everything to measure, in order."""
        users = sorted({1, *self.batch_sizes})
        prefill = [Cell("prefill", length, 1) for length in sorted(set(self.prompt_lengths))]
        return prefill + [Cell("decode", c, u) for c in dict.fromkeys(self.contexts) for u in users]


@dataclass(frozen=True)
class Cell:
    """One thing to measure: reading a prompt of `length` tokens, or `users` writing behind contexts of that length."""

    measure: str
    length: int
    users: int

    def work(self, steps: int) -> float:
        """About how long one run takes, in tokens of one user: for the time that is left."""
        reading = self.length * self.users / 8
        return reading if self.measure == "prefill" else reading + steps * (1 + self.users / 4)

    def __str__(self) -> str:
        if self.measure == "prefill":
            return f"reading {self.length} tokens"
        return f"writing behind {self.length} tokens, {self.users} user{'s' * (self.users > 1)}"


@dataclass
class Entry:
    """A contestant with what was found; `reason` once it is out."""

    contestant: Contestant
    config: ModelConfig
    role: str  # "model", "price", "memory" (the model with experts on the disk) or "peer"
    quantize: str | None = None
    variant: str | None = None
    dtype: str | None = None  # what it multiplies in
    reason: str | None = None
    found: dict[Cell, list[dict[str, Any]]] = field(default_factory=dict)
    warm: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    probes: slice = field(
        default_factory=lambda: ALL
    )  # of the machine's limits, those taken while it was measured

    def wants(self, cell: Cell, options: BenchOptions) -> bool:
        """Whether this cell is for it: what shows the price is measured for one user behind the first context alone."""
        only_there = Cell("decode", options.contexts[0], 1)
        return self.role != "price" or cell.measure == "prefill" or cell == only_there

    @property
    def shape(self) -> ModelConfig:
        """The shape that this contestant really runs."""
        if self.variant == "dense":
            return dense_config(self.config)
        if self.variant and self.variant.startswith("top-"):
            return replace(self.config, num_experts_per_tok=int(self.variant.removeprefix("top-")))
        return self.config


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """ "128,512" as numbers. Raises RequestError with the option's name."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        option = "--" + name.replace("_", "-")
        raise RequestError(f"{option}: give whole numbers such as 128,512; found {text!r}") from None


# ---- who takes part ----------------------------------------------------------------------------------------------


def line_up(
    options: BenchOptions, source: TensorSource, device: torch.device
) -> tuple[list[Entry], list[str]]:
    """All contestants, not yet started, and notes on those that cannot even be tried. Raises RequestError where a peer
    is a library that is not installed: that shows after minutes else."""
    threads, config = torch.get_num_threads(), source.config
    place = str(
        getattr(source, "path", None) or source.directory or source.label
    )  # a hub id is found only once
    entries, notes = _octad(options, place, source, threads, device), []
    if config.is_moe and options.price and "dense" not in price_variants(config):
        notes.append("no dense member to compare: layers with and without experts differ in width")
    if "transformers" in options.peers:
        if find_spec("transformers") is None:
            raise RequestError(
                "--peer transformers: is not installed; pip install transformers, or leave it out"
            )
        settings = {"system": "transformers", "model": place, "device": str(device)}
        worker = Worker("transformers bf16", settings, threads)
        entries.append(Entry(worker, config, "peer", dtype="bfloat16"))
    if "llama.cpp" in options.peers or options.gguf:
        try:
            entries += _llama(options, config, threads, device)
            notes.append("llama-bench reads random ids of its own, not the texts")
        except Unmeasured as error:
            notes.append(f"llama.cpp: not measured: {error}")
    return entries, notes


def _octad(
    options: BenchOptions, place: str, source: TensorSource, threads: int, device: torch.device
) -> list[Entry]:
    config, held = source.config, held_name(source)
    dtype = dtype_name(compute_dtype(device))
    longest = max(*options.prompt_lengths, max(options.contexts) + room(options)) + 1
    settings = {"system": "octad", "model": place, "device": str(device), "longest": longest}
    settings |= {"users": max(1, *options.batch_sizes)}
    entries = []
    variants = price_variants(config) if options.price and held is None else []
    for variant in ("as made", *variants):
        for quantize in dict.fromkeys([held] if held else options.quantize):
            own = {"variant": variant, "quantize": None if quantize == "none" else quantize}
            precision = {"bfloat16": "bf16", "float32": "fp32"}[dtype] if quantize == "none" else quantize
            name = f"octad {precision}{'' if variant == 'as made' else ' ' + variant}"
            role = "model" if variant == "as made" else "price"
            worker = Worker(name, settings | own, threads)
            entries.append(Entry(worker, config, role, quantize, variant, dtype))
    if options.memory is not None:
        own = {"variant": "as made", "quantize": held, "memory": options.memory}
        worker = Worker(f"octad {held or 'fp32'}, {options.memory} of experts", settings | own, threads)
        entries.append(Entry(worker, config, "memory", held, "as made", dtype))
    return entries


def held_name(source: TensorSource) -> str | None:
    """What a quantised checkpoint is quantised to."""
    return f"int{source.schemes.ffn.bits}" if isinstance(source, QuantizedSource) else None


def price_variants(config: ModelConfig) -> list[str]:
    """What shows the price of a mixture: top-1 and top-2 where the model is another, and one dense member."""
    if not config.is_moe:
        return []
    variants = [f"top-{k}" for k in (1, 2) if k != config.num_experts_per_tok and k <= config.num_experts]
    try:
        dense_config(config)
    except OctadError:
        return variants
    return [*variants, "dense"]


def _llama(options: BenchOptions, config: ModelConfig, threads: int, device: torch.device) -> list[Entry]:
    files = options.gguf or tuple(p for p in (Path(options.model),) if p.suffix == ".gguf")
    if not files:
        raise Unmeasured("it reads GGUF files; give --gguf FILE")
    program, gpu = find_llama_bench(options.llama_bench), device.type == "cuda"
    return [Entry(LlamaBench(program, file, threads, gpu), config, "peer") for file in files]


def find_device(name: str) -> torch.device:
    """ "auto": the GPU where there is one. Raises RequestError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise RequestError(
            f"--device {name}: there is no such device here; give cpu, or cuda where there is one"
        )
    return torch.device(name)


def check_lengths(options: BenchOptions, config: ModelConfig) -> None:
    """Raises RequestError for lengths that the model's context does not hold."""
    limit = config.max_position_embeddings
    for option, needed in (
        ("--prompt-lengths", max(options.prompt_lengths) + 1),
        ("--contexts", max(options.contexts) + room(options)),
    ):
        if needed > limit:
            raise RequestError(
                f"{option}: {needed} positions are needed, the model's context is {limit}; give shorter ones"
            )


def room(options: BenchOptions) -> int:
    """Positions behind the longest context that the first user may reach before the last one has written enough."""
    longest = [range(max(options.contexts))] * max(1, *options.batch_sizes)
    return answer_room(longest, options.decode_tokens)


def groups(entries: Sequence[Entry], config: ModelConfig, device: torch.device) -> list[list[Entry]]:
    """Who is loaded at the same time and takes turns: all of them; where memory does not hold them all, those of like
    precision, each with its peers; where it does not hold these either, each alone."""
    likes: dict[str, list[Entry]] = {}
    for entry in entries:
        likes.setdefault(_precision(entry, entries, config), []).append(entry)
    for parts in ([list(entries)], list(likes.values())):
        if all(fit_together(part, device) for part in parts):
            return parts
    return [[entry] for entry in entries]


def _precision(entry: Entry, entries: Sequence[Entry], config: ModelConfig) -> str:
    """The quantisation of octad's beside which an entry stands: its own; of a peer, that of the most similar size."""
    if entry.quantize is not None:
        return entry.quantize
    bits, file = 16.0, getattr(entry.contestant, "file", None)
    if file is not None and file.is_file():
        bits = 8 * file.stat().st_size / cost.parameters(config)
    return min((e.quantize for e in entries if e.quantize), key=lambda name: abs(BITS[name] - bits))


def fit_together(entries: Sequence[Entry], device: torch.device) -> bool:
    """Whether all contestants find room in memory beside each other; otherwise they come one after another."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is None:
        return True
    needed = sum(memory_needed(entry) for entry in entries if isinstance(entry.contestant, Worker))
    return needed < 0.8 * free


def memory_needed(entry: Entry) -> float:
    """Bytes, roughly: weights in their precision, the embeddings that a quantised model keeps, and the process."""
    plain = 4 if entry.dtype == "float32" else 2
    each = float(plain)
    if entry.quantize in ("int8", "int4"):
        bits = 6.0 if entry.quantize == "int4" else BITS["int8"]  # as much as it can be: Precision.of("int4")
        each = 1.1 / 8 * cost.per_parameter(entry.shape, bits, BITS["int8"])
    embeddings = plain * cost.embedding_parameters(entry.shape)
    return each * cost.parameters(entry.shape) + embeddings + WORKER_BYTES


# ---- what is read ------------------------------------------------------------------------------------------------
# Real text: which experts a token goes to depends on what it says, and so does the speed. Neighbours in a batch come from
# different domains, and each repeat starts at the next domain, so that a median is one over domains. All contestants of a
# repeat get the same ids.


@dataclass(frozen=True)
class Texts:
    """Ids of running text, by domain."""

    ids: Mapping[str, Sequence[int]]
    origin: str

    def prompts(self, users: int, length: int, turn: int) -> list[list[int]]:
        """One prompt a user. Number k (turn, turn + 1, ...) is the next unused stretch of domain k modulo their count;
        a text that is too short begins again."""
        names = list(self.ids)
        return [
            self._stretch(names[k % len(names)], k // len(names), length) for k in range(turn, turn + users)
        ]

    def _stretch(self, name: str, number: int, length: int) -> list[int]:
        ids = self.ids[name]
        return [ids[(number * length + i) % len(ids)] for i in range(length)]

    def repeats(self, users: int, length: int, turns: int) -> list[str]:
        """Domains too short for so many prompts: their text is used more than once."""
        stretches = -(-(users + turns - 1) // len(self.ids))
        return [name for name, ids in self.ids.items() if len(ids) < stretches * length]


def packaged_texts(tokenizer: Tokenizer) -> Texts:
    """octad/demo/data: general, python, c, french, german, spanish, maths, literature."""
    with as_file(files("octad") / "demo") as folder:
        listed = folder / "domains.yaml"
        domains = parse_yaml(listed.read_bytes())["domains"] if listed.is_file() else {}
        found = {name: _ids([folder / place], tokenizer) for name, place in sorted(domains.items())}
    if not found:
        raise DataError("octad/demo/data: holds no text; install octad again, or give --text FILE")
    return Texts(found, f"held-out text of {len(found)} domains that comes with octad: {', '.join(found)}")


def file_texts(file: Path, tokenizer: Tokenizer) -> Texts:
    """A .jsonl or plain text file, gzipped or not, as one domain. Raises DataError."""
    ids = _ids([file], tokenizer)
    if len(ids) < 2:
        raise DataError(f"{file}: holds no text to read; give a longer one")
    return Texts({file.name: ids}, f"the text of {file.name}")


def _ids(paths: Sequence[Path], tokenizer: Tokenizer) -> list[int]:
    texts = [_plain(document) for path in paths for document in read_documents(path)]
    return [token for ids in tokenizer.encode_batch(texts, parse_special=False) for token in ids]


def _plain(document: Document) -> str:
    """A text as it is; of a chat what was said, since not every model has a template."""
    if isinstance(document, str):
        return document
    return "\n".join(str(message.get("content", "")) for message in document)
