"""From scratch: a dense model against 8 experts, top-1 and top-2, at equal active cost, three seeds each.

    python benchmarks/pretrain.py train  --corpora CORPORA --work WORK      # nine runs, one after another; resumable
    python benchmarks/pretrain.py time   --corpora CORPORA --work WORK      # the step time of each, on an idle machine
    python benchmarks/pretrain.py report --work WORK --out benchmarks/results/pretrain.json --plot docs/pretrain.svg

All runs of a seed see the same batches; the learning rate is constant after the warm-up, so that a point of a curve is
what a run of that length reaches. The question: after how many steps has a mixture the loss that the dense twin ends
with? Seconds are steps times the median step time, taken apart from the training, one process on one thread at a time:
the training itself may run beside other work. Judged in bits per byte on the same held-out windows of eight domains.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import yaml

CONFIG = Path(__file__).with_name("pretrain.yaml")
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "top-1": {"mode": "mixture", "top_k": 1},
    "top-2": {"mode": "mixture", "top_k": 2},
}
SEEDS = (0, 1, 2)
ROUTING = {"balance": 2e-2, "z": 1e-3, "bias": 1e-3}
VOCABULARY, SAMPLE = 4096, 2_000_000  # characters of each domain that the tokenizer is made from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "time", "report"])
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pretrain.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/pretrain.svg"))
    given = parser.parse_args()
    if given.what == "train":
        train(given.corpora, given.work)
    elif given.what == "time":
        measure(given.corpora, given.work)
    else:
        report(given.work, given.out, given.plot)


# ---- training ----------------------------------------------------------------------------------------------


def train(corpora: Path, work: Path) -> None:
    """Every run that is not finished, through the command line as a user would."""
    make_tokenizer(corpora, work / "tokenizer")
    for seed in SEEDS:
        for kind in KINDS:
            run = work / f"{kind}-{seed}"
            if (run / "config.json").is_file():
                continue
            file = write_config(corpora, work, kind, seed)
            command = [sys.executable, "-m", "octad.cli", "train", str(file), "-o", str(run)]
            with (work / "train.log").open("a") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log, env=one_thread())


def write_config(
    corpora: Path, work: Path, kind: str, seed: int, changes: Mapping[str, Any] | None = None
) -> Path:
    """The config of one run: the common one, and what makes it this run."""
    raw = yaml.safe_load(CONFIG.read_text()) | {"task": "pretrain", "mode": KINDS[kind]["mode"], "seed": seed}
    raw["tokenizer"] = str(work / "tokenizer")
    names = [path.name for path in sorted(corpora.iterdir()) if path.is_dir()]
    raw["data"]["sources"] = [{"name": n, "files": str(corpora / n / "train.jsonl.gz")} for n in names]
    raw["data"]["cache"] = str(work / "cache")
    raw["evaluate"]["domains"] = {n: str(corpora / n / "valid.jsonl.gz") for n in names}
    if kind == "dense":
        del raw["architecture"]["num_experts"], raw["optimizer"]["router_lr"]
    else:
        raw["architecture"]["top_k"] = KINDS[kind]["top_k"]
        raw["routing"] = dict(ROUTING)
    for key, value in (changes or {}).items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    path = work / f"{kind}-{seed}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def make_tokenizer(corpora: Path, directory: Path) -> None:
    """A byte-level BPE of the domains' training text, small so that the head does not dominate."""
    if (directory / "tokenizer.json").is_file():
        return
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sample(corpora), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    core.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}\n')


def sample(corpora: Path) -> Iterator[str]:
    """The beginnings of documents, SAMPLE characters of each domain."""
    for file in sorted(corpora.glob("*/train.jsonl.gz")):
        left = SAMPLE
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"][:20_000]
                left -= len(text)
                yield text
                if left < 0:
                    break


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
