"""octad bench: how fast the engine reads and writes, as a share of the machine's limits, beside its peers.

    results = run(BenchOptions(model="mixture/", quantize=("none", "int8"), peers=("transformers",)))
    results["contestants"][0]["cells"][0]["tokens_per_s"]["median"]

Every contestant (octad in each quantisation, with fewer experts a token, as one dense member; transformers; llama.cpp on
each GGUF file) is loaded in a process of its own. A cell is one thing to measure: reading a prompt of some length, or
writing with some number of users behind some context. Cell by cell, all contestants warm up, then take turns (A B C, then
B C A, ...), so that a noisy neighbour meets each of them; where memory does not hold them all, those of like precision
do. The machine's limits are probed between cells.

A figure is a median with min, max and all repeats; what could not be measured is null with the reason.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from octad.bench.cases import (
    BenchOptions,
    Cell,
    Entry,
    Texts,
    check_lengths,
    file_texts,
    find_device,
    groups,
    line_up,
    packaged_texts,
)
from octad.bench.measures import report, summary
from octad.bench.peers import Unmeasured
from octad.checkpoint.load import load_tokenizer, open_source
from octad.checkpoint.source import TensorSource
from octad.errors import OctadError
from octad.kernels.compile import isa
from octad.machine import Limits, hardware
from octad.model import cost
from octad.telling import Progress, quiet


def run(options: BenchOptions, tell: Progress | None = None, command: str | None = None) -> dict[str, Any]:
    """Measure everything. `tell(what is running, share done)` is called all along; `command` goes into the results.

    Raises OctadError where the options do not fit the model, or nothing of octad's could be measured."""
    begun, load = time.time(), _load_average()
    source, device = open_source(options.model, quantised=True), find_device(options.device)
    check_lengths(options, source.config)
    tokenizer = load_tokenizer(source)
    texts = file_texts(options.text, tokenizer) if options.text else packaged_texts(tokenizer)
    entries, notes = line_up(options, source, device)
    turns = groups(entries, source.config, device)
    rounds = Rounds(options, texts, Limits(device), tell or quiet, entries)
    for group in turns:
        rounds.measure(group)
    if not any(entry.found for entry in entries if entry.role == "model"):
        reasons = [entry.reason or next(iter(entry.failed.values()), "") for entry in entries]
        raise OctadError(f"{options.model}: nothing could be measured: {reasons[0]}")
    contestants = [report(entry, options, rounds.limits) for entry in entries]
    return {
        "benchmark": "engine",
        "command": command,
        "model": describe_model(source),
        "hardware": hardware(device)
        | {"kernels": isa(), "load_average": {"before": load, "after": _load_average()}},
        "versions": versions(contestants),
        "settings": settings(options, texts)
        | {"interleaved": [[entry.contestant.name for entry in group] for group in turns]},
        "limits": rounds.limits.report(),
        "contestants": contestants,
        "summary": summary(contestants, options.contexts[0]),
        "notes": notes + _text_notes(texts, options),
        "seconds": round(time.time() - begun, 1),
    }


# ---- measuring ---------------------------------------------------------------------------------------------------


class Rounds:
    """Cell by cell, contestant by contestant, turn by turn; counts what is done."""

    def __init__(
        self, options: BenchOptions, texts: Texts, limits: Limits, tell: Progress, entries: Sequence[Entry]
    ) -> None:
        self.options, self.texts, self.limits, self._tell = options, texts, limits, tell
        self.total, self.done = sum(map(self._work, entries)), 0.0

    def measure(self, group: Sequence[Entry]) -> None:
        """Start a group, measure every cell, end the group's processes."""
        begun = len(self.limits.read)
        try:
            for entry in group:
                self._start(entry)
            self._probe(3)
            for cell in self.options.cells():
                self._cell(cell, [e for e in group if not e.reason and e.wants(cell, self.options)])
                self._probe(1)
        finally:
            for entry in group:
                entry.probes = slice(begun, len(self.limits.read))
                entry.memory |= entry.contestant.memory()
                entry.contestant.close()

    def _start(self, entry: Entry) -> None:
        self.tell(f"loading {entry.contestant.name}")
        try:
            entry.contestant.start()
            entry.dtype = entry.contestant.facts.get("dtype", entry.dtype)
        except Unmeasured as error:
            entry.reason = str(error)
            self.done += self._work(entry)

    def _probe(self, repeats: int) -> None:
        self.tell("the machine's limits")
        self.limits.probe(repeats)

    def _cell(self, cell: Cell, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._try(cell, entry, "warming up", None)
        for turn in range(self.options.repeat):
            first = turn % max(1, len(entries))
            for entry in (*entries[first:], *entries[:first]):
                self._try(cell, entry, f"{turn + 1} of {self.options.repeat}", turn)

    def _try(self, cell: Cell, entry: Entry, what: str, turn: int | None) -> None:
        self.tell(f"{cell}: {entry.contestant.name}, {what}")
        self.done += cell.work(self.options.decode_tokens)
        if cell in entry.failed:
            return
        try:
            prompts = self.texts.prompts(cell.users, cell.length, turn or 0)
            found = self._beside_limit(cell, entry, prompts, warm=turn is None)
        except Unmeasured as error:
            entry.failed[cell] = str(error)
            return
        if turn is None:
            entry.warm[cell] = found
        else:
            entry.found.setdefault(cell, []).append(found)

    def _beside_limit(self, cell: Cell, entry: Entry, prompts: list[list[int]], warm: bool) -> dict[str, Any]:
        """Once; where it is bound by reading, with the bandwidth at that moment, taken before and after."""
        if warm or cell.measure == "prefill":
            return self._once(cell, entry, prompts, warm)
        before = self.limits.read_now()
        found = self._once(cell, entry, prompts, warm)
        return found | {"read_bytes_per_s": max(before, self.limits.read_now())}

    def _once(self, cell: Cell, entry: Entry, prompts: list[list[int]], warm: bool) -> dict[str, Any]:
        contestant, steps = entry.contestant, self.options.decode_tokens
        if cell.measure == "prefill":
            return contestant.prefill(prompts[0])
        return contestant.warm_up(prompts, steps) if warm else contestant.decode(prompts, steps)

    def _work(self, entry: Entry) -> float:
        """All runs of this contestant, warm-ups included, in tokens."""
        cells = [cell for cell in self.options.cells() if entry.wants(cell, self.options)]
        return sum(cell.work(self.options.decode_tokens) for cell in cells) * (self.options.repeat + 1)

    def tell(self, what: str) -> None:
        """Say what is running, and the share done."""
        self._tell(what, self.done / max(1, self.total))


# ---- the rest of the report --------------------------------------------------------------------------------------


def describe_model(source: TensorSource) -> dict[str, Any]:
    """Family and size."""
    config = source.config
    return {
        "name": Path(source.label).name or source.label,
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "parameters": cost.parameters(config),
        "active_parameters": cost.parameters(config, active=True),
        "experts": config.num_experts or None,
        "experts_per_token": config.num_experts_per_tok or None,
    }


def settings(options: BenchOptions, texts: Texts) -> dict[str, Any]:
    """The options as JSON takes them, files without their directories; where the text is from."""
    named: dict[str, Any] = {"gguf": [file.name for file in options.gguf], "text": texts.origin}
    named |= {"llama_bench": options.llama_bench and Path(options.llama_bench).name}
    return asdict(options) | named | {"model": Path(options.model).name or options.model}


def versions(contestants: Sequence[dict[str, Any]]) -> dict[str, str]:
    """octad, Python, torch, and the peers that took part."""
    found = {"python": platform.python_version()}
    for name in ("octad", "torch"):
        try:
            found[name] = installed(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found | {c["system"]: c["facts"]["version"] for c in contestants if "version" in c["facts"]}


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):  # Windows has none
        return None


def _text_notes(texts: Texts, options: BenchOptions) -> list[str]:
    notes = [f"text: {texts.origin}; users of a batch write behind different texts"]
    lengths = [*options.contexts, *options.prompt_lengths]
    if short := texts.repeats(max(1, *options.batch_sizes), max(lengths), options.repeat):
        notes.append(f"too short for so many prompts, used more than once: {', '.join(short)}")
    return notes
