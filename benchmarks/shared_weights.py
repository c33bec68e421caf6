"""What each way to share attention loses of members that changed theirs, and what repair wins back.

    octad branch full.yaml -o members/full; octad branch adapter.yaml -o members/adapter
    python benchmarks/shared_weights.py --corpora corpora --members full=members/full adapter=members/adapter
    python benchmarks/shared_weights.py ... --shared mean --repair none closed-form --routed --steps 15

A corpus is a directory with <domain>/valid.jsonl.gz for the domains, and `dictionary` for the generalist, which is the
base; even documents calibrate, odd ones judge, the first --window tokens of each. A set of members is a directory with
one for each domain. The oracle is each domain through its own member, told the domain, with its own attention. Of every
cell, one set x one way to share x one repair: bits per byte above the oracle's, the mean over domains, with 95 %
intervals paired over documents. Texts go through their own expert, told the domain: what is seen is the loss of sharing.
--routed also writes the mixture and judges it with its routers, --steps trains it so (mode repair, steps of 1,024 tokens
of `train`), and --mergekit does the same job beside it. What stands in --out already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from combine import BASE, halves, merge_members, mergekit_run, octad_run, texts_of
from measure import command_line, hardware, run, save, tell

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "shared_weights.json"
Nats = dict[str, list[float]]  # of each domain: of its judged documents, the sum of -ln p
Windows = dict[str, list[Any]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--members", nargs="+", required=True, help="NAME=DIRECTORY, one set each")
    parser.add_argument("--domains", nargs="+", default=["german", "c", "maths"])
    parser.add_argument("--shared", nargs="*", default=["base", "mean", "ties", "dare", "regmean"])
    parser.add_argument("--repair", nargs="+", default=["none"])
    parser.add_argument("--routed", action="store_true", help="also with routers")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="also after gradient repair")
    parser.add_argument("--lr", type=float, default=1e-3, help="of gradient repair")
    parser.add_argument("--distill", type=float, default=0.0, help="of gradient repair")
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens per expert")
    parser.add_argument("--repair-tokens", type=int, default=4096, help="of closed-form repair, per expert")
    parser.add_argument("--documents", type=int, default=8, help="judged documents a domain")
    parser.add_argument("--window", type=int, default=128, help="judged tokens of a document")
    parser.add_argument("--soup", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mergekit", type=Path, help="the program mergekit-moe; left out: not compared")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, help="where mixtures go; removed at the end")
    return parser.parse_args()


# ---- judging ---------------------------------------------------------------------------------------------


def windows_of(options: argparse.Namespace, work: Path) -> Windows:
    """The judged beginnings of documents, by domain."""
    from octad.checkpoint.load import load_tokenizer, open_source
    from octad.text.windows import Window

    tokenizer, found = load_tokenizer(open_source(BASE)), {}
    lengths = tokenizer.byte_lengths
    for domain in options.domains:
        found[domain] = []
        for line in (work / "judge" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"][: 64 * options.window]
            ids = tokenizer.encode(text, parse_special=False)[: options.window]
            if len(ids) >= 32 and len(found[domain]) < options.documents:
                number = len(found[domain])
                found[domain].append(Window(tuple(ids), sum(lengths[i] for i in ids[1:]), number))
    return found


def of_model(source: Any, windows: Mapping[str, Sequence[Any]]) -> Nats:
    """A whole model's."""
    from octad.evaluate.contestants import fast_model
    from octad.evaluate.nats import window_nats

    model = fast_model(source)
    return {domain: window_nats(model, found) for domain, found in windows.items()}


def through_experts(source: Any, windows: Mapping[str, Sequence[Any]], texts: Sequence[Any] = ()) -> Nats:
    """A mixture's that is not written, each text through the expert of its domain (the generalist is the first): with
    `texts` after closed-form repair, and RegMean where it shares so, both of these texts."""
    from octad.combine.calibrate import BATCH_TOKENS, Run, gate_inputs
    from octad.combine.choose import Ear
    from octad.combine.fit import cut
    from octad.combine.refit import Refit
    from octad.combine.regmean import Regression
    from octad.dist import compute_dtype
    from octad.text.windows import batches

    dtype, hooks = compute_dtype(), []
    regmean = source.shared.method == "regmean"
    seen = [Run(e, e, [p for w in t.windows for p in cut(w)]) for e, t in enumerate(texts)] if regmean else []
    if regmean:
        hooks.append(Regression(source, seen, dtype).settle)
    longer = [text.longer for text in texts]
    with Refit(source, longer, dtype, first=len(seen)) as repair:
        if repair.runs:
            hooks.append(repair.settle)
        judged = [Run(e, e, found) for e, found in enumerate(windows.values(), 1)]
        runs = [*seen, *repair.runs, *judged]
        ear = Ear(source, runs, dtype, first=len(runs) - len(judged))

        def settle(*layer: Any) -> None:
            for hook in hooks:
                hook(*layer)

        def refit(*expert: Any) -> None:
            if repair.runs:
                repair.refit(*expert)
            ear.hear(*expert)

        for _ in gate_inputs(source, runs, dtype, lambda name, t: None, settle, refit):
            pass
    found: Nats = {}
    for number, (domain, own) in enumerate(windows.items(), ear.first):
        order = [w.document for batch in batches(own, BATCH_TOKENS) for w in batch.windows]
        costs = ear.nats[number][:, 0].tolist()
        found[domain] = [cost for _, cost in sorted(zip(order, costs, strict=True))]
    return found


def beside(nats: Nats, oracle: Nats, windows: Windows) -> dict[str, Any]:
    """Above the oracle: the mean over domains as a share of the oracle's bits per byte, its interval, each domain's."""
    from octad.evaluate.bootstrap import Draws

    sizes = [np.array([w.predicted_bytes for w in found], dtype=np.float64) for found in windows.values()]
    more = [(np.array(nats[d]) - np.array(oracle[d]))[None] for d in windows]
    bits = [
        [sum(who[d]) / math.log(2) / size.sum() for d, size in zip(windows, sizes, strict=True)]
        for who in (nats, oracle)
    ]
    *_, mean = Draws(sizes).differences(more)[0]
    whole = sum(bits[1]) / len(bits[1])
    return {
        "share": round(mean.value / whole, 5),
        "interval": [round(end / whole, 5) if math.isfinite(end) else None for end in (mean.low, mean.high)],
        "domains": {d: round(sum(nats[d]) / sum(oracle[d]) - 1, 5) for d in windows},
        "bits_per_byte": round(sum(bits[0]) / len(bits[0]), 4),
    }


# ---- mixtures ----------------------------------------------------------------------------------------------


def recipe_of(
    path: Path, models: Mapping[str, str], work: Path, shared: str, repair: str, options: argparse.Namespace
) -> Path:
    """A recipe over the base and these members."""
    experts = [{"name": name, "model": model, "data": texts_of(name, work)} for name, model in models.items()]
    recipe: dict[str, Any] = {"base": BASE, "top_k": 2, "experts": experts, "shared": shared}
    recipe["router"] = {"method": "logistic", "tokens": options.tokens}
    if repair != "none":
        recipe["repair"] = {"method": repair, "tokens": options.repair_tokens, "window": 128}
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


def trained(mixture: Path, output: Path, steps: int, table: Table) -> dict[str, Any]:
    """`octad train` in mode repair, measured."""
    options, work = table.options, table.work
    sources = [
        {"name": d, "data": str(options.corpora.resolve() / d / "train.jsonl.gz")} for d in options.domains
    ]
    config = {
        "task": "tune",
        "model": str(mixture),
        "mode": "repair",
        "steps": steps,
        "distill": options.distill,
        "batch": {"windows": 4, "micro": 4},
        "optimizer": {"lr": options.lr, "router_lr": 3e-4},
        "schedule": {"name": "linear", "warmup": max(1, steps // 10), "final": 0.05},
        "data": {"window": 256, "cache": str(work / "cache"), "sources": sources},
        "save": {"every": steps},
    }
    path = work / "tune.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return run([sys.executable, "-m", "octad", "train", path, "-o", output]) | {"tokens": steps * 1024}


# ---- the whole ---------------------------------------------------------------------------------------------


class Table:
    """The results so far, saved after each cell."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.windows = windows_of(options, work)
        self.found: dict[str, Any] = {"benchmark": "shared_weights", "oracle": {}, "cells": {}}
        if options.out.exists():
            self.found = json.loads(options.out.read_text(encoding="utf-8"))
        settings = ("domains", "tokens", "repair_tokens", "documents", "window")
        self.found["settings"] = {key: getattr(options, key) for key in settings}
        self.found.setdefault("commands", []).append(command_line())

    def has(self, name: str) -> bool:
        """Whether a cell is known."""
        return name in self.found["cells"]

    def put(self, members: str, name: str, nats: Nats, cost: Any = None) -> None:
        """Enter a cell, and save."""
        oracle = self.found["oracle"][members]
        cell: dict[str, Any] = beside(nats, oracle, self.windows) | {"nats": rounded(nats)}
        self.found["cells"][f"{members}/{name}"] = cell | ({} if cost is None else {"cost": cost})
        tell(f"{members}/{name}: {cell['share']:+.2%} {cell['interval']} {cell['domains']}")
        self.save()

    def save(self) -> None:
        """Write what is known."""
        save(self.options.out, self.found | {"hardware": hardware()})


def rounded(nats: Nats) -> Nats:
    """To a thousandth."""
    return {domain: [round(float(n), 3) for n in found] for domain, found in nats.items()}


def members_alone(table: Table, members: str, models: Mapping[str, str]) -> None:
    """The oracle, the base and the soup."""
    from octad.checkpoint.load import open_member, open_source
    from octad.evaluate.soup import AveragedSource

    base = open_source(BASE)
    sources = {d: open_member(models[d], base) for d in table.windows}
    if members not in table.found["oracle"]:
        oracle: Nats = {}
        for domain, found in table.windows.items():
            oracle |= of_model(sources[domain], {domain: found})
        table.found["oracle"][members] = rounded(oracle)
        table.save()
    if not table.has(f"{members}/the base alone"):
        table.put(members, "the base alone", of_model(base, table.windows))
    if table.options.soup and not table.has(f"{members}/soup"):
        table.put(members, "soup", of_model(AveragedSource(tuple(sources.values())), table.windows))


def told(table: Table, members: str, models: Mapping[str, str], shared: str, repair: str) -> None:
    """One cell, each text through its own expert."""
    from octad.combine.preflight import preflight
    from octad.combine.recipe import Recipe

    begun = time.process_time()
    path = recipe_of(table.work / "r.yaml", models, table.work, shared, repair, table.options)
    plan = preflight(Recipe.load(path), measure=False)
    nats = through_experts(plan.source(), table.windows, plan.calibrations)
    cost = {"cpu_seconds": round(time.process_time() - begun, 1)}
    table.put(members, f"{shared}/{repair}", nats, cost)


def routed(table: Table, members: str, models: Mapping[str, str], shared: str, repair: str) -> None:
    """One cell as `octad combine` makes it, routers included, and after gradient repair."""
    from octad.checkpoint.load import open_source

    options, work, name = table.options, table.work, f"{shared}/{repair}/routed"
    how = " of distillation" if options.distill else ""
    names = [name, *(f"{name}/{steps} steps{how}" for steps in options.steps)]
    if all(table.has(f"{members}/{each}") for each in names):
        return
    mixture, tuned = work / "mixture", work / "tuned"
    cost = octad_run(recipe_of(work / "r.yaml", models, work, shared, repair, options), mixture)
    if not table.has(f"{members}/{name}"):
        table.put(members, name, of_model(open_source(mixture), table.windows), cost)
    for steps, after in zip(options.steps, names[1:], strict=True):
        if not table.has(f"{members}/{after}"):
            cost = trained(mixture, tuned, steps, table)
            table.put(members, after, of_model(open_source(tuned), table.windows), cost)
            shutil.rmtree(tuned)
    shutil.rmtree(mixture)


def mergekit(table: Table, members: str, models: Mapping[str, str]) -> None:
    """mergekit-moe on the same members."""
    from octad.checkpoint.load import open_source

    if table.options.mergekit is None or table.has(f"{members}/mergekit-moe"):
        return
    work = table.work
    full = merge_members(models, work)
    cost = mergekit_run(table.options.mergekit, full, work)
    table.put(members, "mergekit-moe", of_model(open_source(work / "mergekit"), table.windows), cost)
    shutil.rmtree(work / "mergekit")
    shutil.rmtree(work / "merged")


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="octad-shared-") as directory:
        work = Path(directory)
        halves(options.corpora, work)
        table = Table(options, work)
        for entry in options.members:
            members, place = entry.split("=", 1)
            models = {"general": "base"} | {d: str((Path(place) / d).resolve()) for d in options.domains}
            members_alone(table, members, models)
            for shared in options.shared:
                for repair in options.repair:
                    if not table.has(f"{members}/{shared}/{repair}"):
                        told(table, members, models, shared, repair)
                    if options.routed:
                        routed(table, members, models, shared, repair)
            mergekit(table, members, models)
    table.save()


if __name__ == "__main__":
    main()
