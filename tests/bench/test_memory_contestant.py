"""octad bench --memory and --quick: who takes part, what is shown of experts on the disk, how much work is left."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer
from tiny_models import TinyCheckpoint

from octad.bench.cases import QUICK, BenchOptions, Cell, line_up
from octad.bench.measures import figures
from octad.bench.results_table import expert_store
from octad.checkpoint.load import open_source
from octad.errors import RequestError
from octad.fast.expert_store import StoreStats
from octad.fast.saved import save_quantized
from octad.machine import Limits


def test_a_quantised_checkpoint_is_measured_as_it_is_and_with_experts_on_the_disk(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    path = Path(shutil.copytree(tiny_checkpoint("mixtral", **sizes), tmp_path / "mixture"))
    byte_tokenizer().save(path)
    made = save_quantized(open_source(path), tmp_path / "int4", "int4")
    options = BenchOptions(str(made), memory="1MB", **QUICK)
    entries, _ = line_up(options, open_source(made, quantised=True), torch.device("cpu"))
    assert [(e.contestant.name, e.role, e.quantize) for e in entries] == [
        ("octad int4", "model", "int4"),
        ("octad int4, 1MB of experts", "memory", "int4"),
    ]
    assert [str(cell) for cell in options.cells()] == [
        "reading 128 tokens",
        "writing behind 128 tokens, 1 user",
        "writing behind 128 tokens, 4 users",
    ]
    stats = StoreStats(
        slots=3, experts=6, slot_bytes=1000, requests=40, misses=10, read=20, stalled=0.5, tokens=10
    )
    cell, entry = options.cells()[1], entries[1]
    entry.found[cell] = [
        {"seconds": 1.0, "tokens": 10, "ttft": [0.1], "lengths": [130.0], "expert_store": stats.report()}
    ]
    found = figures(entry, cell, Limits(torch.device("cpu")))
    assert found["mbu_reason"] == "experts are read from the disk, too"
    results = {"contestants": [{"name": entry.contestant.name, "failed": None, "cells": [found]}]}
    table = expert_store(results)
    assert table is not None
    assert [c.text for c in table.rows[0]][3:] == ["3 kB of 6 kB", "75.0 %", "50.0 %", "2 kB", "50.0 ms"]


def test_a_size_that_is_none_is_refused_before_anything_runs() -> None:
    with pytest.raises(RequestError, match="--memory: found 'plenty'"):
        BenchOptions("somewhere", memory="plenty")


def test_work_counts_what_is_read_and_what_is_written() -> None:
    assert Cell("prefill", 512, 1).work(64) == 64
    assert Cell("decode", 128, 4).work(16) == 64 + 32
