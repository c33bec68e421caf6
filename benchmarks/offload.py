"""Experts on the disk beside the same model in memory and beside a plain mapping under the same limit.

    octad quantize mixture --to int8 -o int8
    python benchmarks/offload.py int8 --share 0.5 --rounds 3 > benchmarks/results/offload.json

Real text goes through the engine a token at a time, as if it were being written, so that what is measured is not the
loops that greedy answers run into. Each contestant has a process of its own and begins with a cold page cache; they take
turns.

    in memory           the file mapped, every page touched before
    all of it           --memory as large as the experts
    share               --memory of that share, read past the page cache; with and without reading ahead
    share, records      a plain mapping of the file whose least recently used records are dropped, from memory and from
                        the page cache, as soon as more than that share is there: what the system's own cache would do
                        under a limit, but that it drops whole records and never the wrong ones
    share, mapped       the same mapping in a control group whose memory the kernel limits to what the process holds
                        besides experts and that share of them; where no group can be made (root is needed), left out
    share, limited      --memory of that share in a group with the same limit

The first WARM tokens are not counted. Shown are tokens/s, CPU seconds a token, and where there is a store hits, bytes and
waiting a token; how long the text stays with its experts; and whether all hidden states are the same to the bit.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import octad.fast.expert_store
from octad import LLM, SamplingParams
from octad.bench.cases import packaged_texts
from octad.checkpoint.quantized import QuantizedSource
from octad.fast.records import FILE, PlacedWeights, open_records
from octad.machine import hardware
from octad.model.observe import watching

WARM = 32
CONTESTANTS = (
    "in memory",
    "all of it",
    "share",
    "share, not ahead",
    "share, records",
    "share, mapped",
    "share, limited",
)
MAPPED = ("in memory", "share, records", "share, mapped")
LIMITED = ("share, mapped", "share, limited")
SLACK = 64 << 20  # of a group's limit: what the kernel counts besides
DONTNEED, NOHUGEPAGE = 4, 15  # of madvise


def main() -> None:
    """Take turns; print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=144)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given)))
        return
    names = [name for name in CONTESTANTS if name not in LIMITED or group_root() is not None]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(given.rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            own = ["--one", name, "--round", str(number)]
            command = [sys.executable, "-X", "faulthandler", __file__, *sys.argv[1:], *own]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: ended with {done.returncode}\n{done.stderr}")
            found[name].append(json.loads(done.stdout))
            print(
                f"round {number + 1}: {name}: {found[name][-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr
            )
    print(json.dumps(report(given, found), indent=1))


def report(given: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, ratios and all rounds."""
    speeds = {name: statistics.median(f["tokens_per_s"] for f in runs) for name, runs in found.items()}
    same = all(len({runs[n]["digest"] for runs in found.values()}) == 1 for n in range(given.rounds))
    return {
        "benchmark": "offload",
        "model": Path(given.model).name,
        "share": given.share,
        "tokens": given.tokens - WARM,
        "hardware": hardware(torch.device("cpu")),
        "tokens_per_s": speeds,
        "over_records": speeds["share"] / speeds["share, records"],
        "over_mapped": speeds["share, limited"] / speeds["share, mapped"]
        if "share, mapped" in speeds
        else None,
        "all_over_in_memory": speeds["all of it"] / speeds["in memory"],
        "same_to_the_bit": same,
        "stays_with_its_experts": statistics.mean(f["stays"] for f in found["in memory"]),
        "rounds": found,
    }


def one(given: argparse.Namespace) -> dict[str, Any]:
    """One contestant, one text."""
    placed = open_records(QuantizedSource(given.model))
    assert placed is not None, f"{given.model} has no {FILE}"
    records = [record for name, record in placed.file.layout.records.items() if ".mlp.experts." in name]
    experts = sum(record.nbytes for record in records)
    budget = experts if given.one == "all of it" else int(experts * given.share)
    octad.fast.expert_store.available_memory = lambda: 0  # as on a machine that has no room for a page cache
    drop_cache(placed.file.path)
    group = (
        Group() if given.one in LIMITED else None
    )  # before a page of the file is touched: the first to touch one pays
    llm = LLM(
        given.model,
        memory=None if given.one in MAPPED else budget,
        max_num_batched_tokens=1,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )
    if (store := llm.expert_store) is not None:
        store.ahead = "not ahead" not in given.one
    other, text = packaged_texts(llm.tokenizer).prompts(given.round + 2, given.tokens, given.round)[-2:]
    if given.one in ("in memory", "all of it"):
        run(llm, text)
    if given.one == "in memory":
        placed.memory[::4096].sum()  # and those that the text does not use
    if group is not None:
        run(llm, other)  # makes what the process holds besides weights
        own = anonymous_bytes() - group.held_before - (budget if llm.expert_store is not None else 0)
        group.limit(own + placed.file.layout.nbytes - experts + budget + SLACK)
        drop_cache(placed.file.path)
    if given.one == "share, records":
        with watching(llm.model, Limit(llm, placed, budget)):
            found = run(llm, text)
    else:
        found = run(llm, text)
    return found | {"name": given.one} | ({"stays": stays(llm, text)} if given.one == "in memory" else {})


def run(llm: LLM, text: list[int]) -> dict[str, Any]:
    """The text, a token a step; timed behind the first WARM."""
    engine, seen = llm.engine, hashlib.sha256()
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=1, ignore_eos=True)
    engine.add_request("text", text, params)
    for _ in range(WARM):
        engine.step()
    if (store := llm.expert_store) is not None:
        store.reset()
    begun, used = time.perf_counter(), time.process_time()
    deltas = [delta for _ in range(len(text) - WARM) for delta in engine.step()]
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    while engine.has_unfinished():
        deltas += engine.step()
    output = engine.output("text").outputs[0]
    seen.update(repr((output.token_ids, output.logprobs)).encode())
    count = len(text) - WARM
    found = {"tokens_per_s": count / seconds, "cpu_s_a_token": used / count, "digest": seen.hexdigest()}
    found["anonymous_bytes"] = anonymous_bytes()
    return found | ({"store": store.stats.report()} if store is not None else {})


def anonymous_bytes() -> int:
    """What this process holds that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def group_root() -> Path | None:
    """Where control groups that limit memory can be made (version 1's folder, or version 2's); None: nowhere."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root = first if (first / "memory.limit_in_bytes").exists() else second
    delegated = root == first or "memory" in read_or_empty(second / "cgroup.subtree_control")
    return root if delegated and os.access(root, os.W_OK) else None


def read_or_empty(path: Path) -> str:
    """The file's text; nothing where there is none."""
    return path.read_text() if path.exists() else ""


class Group:
    """A control group around this process; it goes when the process has ended and the next one begins."""

    def __init__(self) -> None:
        root = group_root()
        assert root is not None
        for old in root.glob("octad-offload-*"):
            if not read_or_empty(old / "cgroup.procs").strip():
                old.rmdir()
        self.path = root / f"octad-offload-{os.getpid()}"
        self.path.mkdir()
        self.held_before = anonymous_bytes()  # is counted where it was, and stays
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, count: int) -> None:
        """From now on, this many bytes of memory and page cache."""
        first = self.path / "memory.limit_in_bytes"
        (first if first.exists() else self.path / "memory.max").write_text(str(count))


def stays(llm: LLM, text: list[int]) -> float:
    """Of the experts that a token goes to, the share that the token before it went to, too."""
    params = SamplingParams(max_tokens=1, routed_experts=True)
    experts_NLA = llm.generate([text], params)[0].prompt_routed_experts
    assert experts_NLA is not None
    same = (experts_NLA[1:, :, :, None] == experts_NLA[:-1, :, None, :]).any(-1)
    return float(same.float().mean())


class Limit:
    """Hears which experts a token used, and drops the records that were not used for the longest time."""

    def __init__(self, llm: LLM, placed: PlacedWeights, budget: int) -> None:
        self.placed, self.budget, self.there = placed, budget, OrderedDict[tuple[int, int], int]()
        self.file = os.open(placed.file.path, os.O_RDONLY)
        self.libc = ctypes.CDLL(None)
        self.libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        first = placed.record(0, 0)
        gate = llm.model.model.layers[0].mlp.experts.gate.tensors[0]
        self.base = gate.data_ptr() - first.offset - first.parts[0].start
        self.libc.madvise(self.base, placed.file.layout.nbytes, NOHUGEPAGE)

    def __call__(
        self, layer: int, gate: Any, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> None:
        """Called for each layer of a step."""
        for expert in np.unique(experts.numpy()).tolist():
            self.there[layer, expert] = self.placed.record(layer, expert).nbytes
            self.there.move_to_end((layer, expert))
        while sum(self.there.values()) > self.budget:
            (old, number), _ = self.there.popitem(last=False)
            record = self.placed.record(old, number)
            self.libc.madvise(self.base + record.offset, record.nbytes, DONTNEED)
            os.posix_fadvise(self.file, record.offset, record.nbytes, os.POSIX_FADV_DONTNEED)


def drop_cache(path: Path) -> None:
    """Nothing of the file in the system's page cache."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


if __name__ == "__main__":
    main()
