"""From scratch: a dense model against 8 experts, top-1 and top-2, at equal active cost, three seeds each.

    python benchmarks/pretrain.py train  --corpora CORPORA --work WORK      # nine runs in turn; resumable
    python benchmarks/pretrain.py time   --corpora CORPORA --work WORK      # the step time of each
    python benchmarks/pretrain.py report --work WORK --out benchmarks/results/pretrain.json --plot docs/pretrain.svg

All runs of a seed see the same batches; the learning rate is constant after the warm-up, so that a point of a curve is
what a run of that length reaches. The question: after how many steps has a mixture the loss that the dense twin ends
with? Seconds are steps times the median CPU time of a step on one thread, taken apart from the training: neither is then
moved much by other work on the machine. Judged in bits per byte on the same held-out windows of eight domains.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
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
from measure import hardware, save

CONFIG = Path(__file__).with_name("pretrain.yaml")
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "top-1": {"mode": "mixture", "top_k": 1},
    "top-2": {"mode": "mixture", "top_k": 2},
}
SEEDS = (0, 1, 2)
ROUTING = {"balance": 2e-2, "z": 1e-3, "bias": 1e-3}
WARM_UP, REPEATS = 1, 7
VOCABULARY, SAMPLE = 4096, 2_000_000  # characters of each domain that the tokenizer is made from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "time", "report"])
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="in place of the config's; a finished run goes on to more")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pretrain.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/pretrain.svg"))
    given = parser.parse_args()
    if given.what == "train":
        train(given.corpora, given.work, given.steps, given.seeds)
    elif given.what == "time":
        measure(given.corpora, given.work)
    else:
        report(given.work, given.out, given.plot)


# ---- training ----------------------------------------------------------------------------------------------


def train(corpora: Path, work: Path, steps: int | None, seeds: list[int]) -> None:
    """Every run that is not finished, through the command line as a user would."""
    make_tokenizer(corpora, work / "tokenizer")
    wanted = steps or int(yaml.safe_load(CONFIG.read_text())["steps"])
    for seed in seeds:
        for kind in KINDS:
            run = work / f"{kind}-{seed}"
            points = curve(run / "log.jsonl")
            if (run / "config.json").is_file() and points and points[-1][0] >= wanted:
                continue
            file = write_config(corpora, work, kind, seed, {"steps": wanted})
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


# ---- step times --------------------------------------------------------------------------------------------


def measure(corpora: Path, work: Path) -> None:
    """The median CPU seconds of a step of each kind, taken in turn so that a change of the machine meets them all."""
    import torch

    from octad.dist import keep_freed_memory
    from octad.model import cost
    from octad.train.pretrain import pretrain_learner
    from octad.train.run_config import load_config
    from octad.train.trainer import Trainer

    torch.set_num_threads(1)
    keep_freed_memory(any_size=True)
    make_tokenizer(corpora, work / "tokenizer")
    trainers, facts = {}, {}
    for kind in KINDS:
        loaded = load_config(write_config(corpora, work, kind, 0))
        trainers[kind] = Trainer(pretrain_learner(loaded), work / "never")
        shape = trainers[kind].model.config
        facts[kind] = {"parameters": cost.parameters(shape), "active": cost.parameters(shape, active=True)}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(WARM_UP + REPEATS):
        for kind, trainer in trainers.items():
            started = time.process_time()
            trainer.train_step()
            if repeat >= WARM_UP:
                seconds[kind].append(time.process_time() - started)
    for kind, found in seconds.items():
        facts[kind] |= {
            "step_seconds": round(statistics.median(found), 4),
            "all": [round(s, 4) for s in found],
        }
    save(work / "times.json", {"machine": hardware(), "threads": 1, "kinds": facts})


# ---- report ------------------------------------------------------------------------------------------------


def report(work: Path, out: Path, plot: Path) -> None:
    """Steps and seconds to the dense twin's final loss, seed by seed; table, JSON and plot."""
    times = json.loads((work / "times.json").read_text()) if (work / "times.json").is_file() else None
    curves = {
        (kind, seed): curve(work / f"{kind}-{seed}" / "log.jsonl")
        for seed in SEEDS
        for kind in KINDS
        if (work / f"{kind}-{seed}" / "config.json").is_file()
    }
    rows = [row(kind, seed, points, curves, times) for (kind, seed), points in curves.items()]
    spec = yaml.safe_load(CONFIG.read_text())
    result = {
        "command": "python benchmarks/pretrain.py train; time; report",
        "config": spec,
        "routing": ROUTING,
        "times": times,
        "rows": rows,
        "summary": {kind: summary(kind, rows) for kind in KINDS},
        "curves": {f"{kind}-{seed}": points for (kind, seed), points in curves.items()},
    }
    save(out, result)
    for line in rows:
        print(json.dumps(line))
    print(json.dumps(result["summary"], indent=1))
    draw(curves, spec["batch"]["windows"] * spec["data"]["window"], plot)


def curve(log: Path) -> list[tuple[int, float]]:
    """(step, held-out bits per byte, mean over domains)."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return sorted({r["step"]: r["held_out_mean"] for r in records if "held_out_mean" in r}.items())


def row(
    kind: str,
    seed: int,
    points: list[tuple[int, float]],
    curves: Mapping[tuple[str, int], list[tuple[int, float]]],
    times: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One run beside the dense twin of its seed."""
    steps, final = curves["dense", seed][-1]
    found: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "steps": points[-1][0],
        "final": round(points[-1][1], 4),
    }
    reached = crossing(points, final)
    found |= {"steps_to_dense_final": reached, "steps_ratio": reached and round(reached / steps, 3)}
    if times is not None and reached is not None:
        each = {k: v["step_seconds"] for k, v in times["kinds"].items()}
        found["seconds"] = round(reached * each[kind], 1)
        found["seconds_ratio"] = round(reached * each[kind] / (steps * each["dense"]), 3)
    return found


def crossing(points: list[tuple[int, float]], level: float) -> float | None:
    """The step at which a curve first reaches a level, between its points by the straight line."""
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= level:
            return round(before + (after - before) * (high - level) / (high - low), 1)
    return None


def summary(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that reached it."""
    mine = [r for r in rows if r["kind"] == kind]
    told: dict[str, Any] = {"runs": len(mine), "reached": sum(r["steps_ratio"] is not None for r in mine)}
    for key in ("final", "steps_ratio", "seconds_ratio"):
        values = [r[key] for r in mine if r.get(key) is not None]
        told[key] = round(statistics.mean(values), 4) if values else None
    return told


def draw(curves: Mapping[tuple[str, int], list[tuple[int, float]]], tokens: int, plot: Path) -> None:
    """Held-out bits per byte over the steps, every seed a line."""
    from octad.report.plot import Line, document, lines

    series = []
    for (kind, seed), points in curves.items():
        steps, values = zip(*points, strict=True)
        colour = list(KINDS).index(kind)
        series.append(Line(kind if seed == SEEDS[0] else "", steps, values, colour))
        if kind == "dense":
            level = [points[-1][1]] * 2
            series.append(Line("", [steps[0], steps[-1]], level, colour, thin=True, dashed=True))
    drawn = lines(series, "held-out bits per byte", x_title=f"step ({tokens} tokens)", log_y=True, height=420)
    title = "held-out bits per byte, mean of 8 domains"
    plot.write_text(document([(title, drawn)], columns=1, width=720), encoding="utf-8")


if __name__ == "__main__":
    main()
