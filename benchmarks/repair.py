"""What ten minutes of `repair` do to a combined mixture, judged beside its own members.

    python benchmarks/repair.py --corpora corpora --steps 150
    python benchmarks/repair.py --corpora corpora --steps 150 --specialists specialists --mixture mixture

A corpus is a directory with <domain>/train.jsonl.gz and valid.jsonl.gz for the seven domains and `dictionary`. Training
reads `train`; of `valid`, even documents calibrate the routers where no --mixture is given, odd ones judge. Judged,
before and after, in bits per byte on the same windows: the mixture at its own top-k, and each domain's own specialist
as the mixture held it before, whose mean is the oracle's; with 95 % intervals of the differences over documents. Seconds
are the training command's, start to end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from combine import DOMAINS, halves, octad_run, write_recipe
from measure import by_document, command_line, hardware, run, save, tell

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "repair.json"
TEXTS = (*DOMAINS, "dictionary")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--mixture", type=Path, help="an octad mixture; left out: one is combined first")
    parser.add_argument("--specialists", type=Path, default=ROOT / "octad" / "demo" / "specialists")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens per expert")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--windows", type=int, default=4, help="a step")
    parser.add_argument("--window", type=int, default=512, help="tokens of a training window")
    parser.add_argument(
        "--dictionary", type=float, default=0.25, help="how often `dictionary` is drawn, of a domain"
    )
    parser.add_argument(
        "--experts", action=argparse.BooleanOptionalAction, default=True, help="change them too"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--router-lr", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--judge-tokens", type=int, default=8192)
    parser.add_argument("--judge-window", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="where the repaired mixture stays")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def write_config(options: argparse.Namespace, mixture: Path, work: Path) -> Path:
    """tune.yaml over the corpora's train parts."""
    files = {d: str(options.corpora.resolve() / d / "train.jsonl.gz") for d in TEXTS}
    sources: list[dict[str, Any]] = [{"name": d, "files": file} for d, file in files.items()]
    sources[-1]["weight"] = options.dictionary
    config = {
        "task": "tune",
        "model": str(mixture.resolve()),
        "mode": "repair",
        "steps": options.steps,
        "batch": {"windows": options.windows, "micro": options.windows},
        "optimizer": {"lr": options.lr, "router_lr": options.router_lr},
        "schedule": {"name": "linear", "warmup": max(1, options.steps // 20), "final": 0.05},
        "low_rank": {"rank": options.rank, "alpha": 2 * options.rank, "experts": options.experts},
        "data": {"window": options.window, "cache": str(work / "cache"), "sources": sources},
        "save": {"every": max(1, options.steps)},
    }
    path = work / "repair.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def judge(mixture: Path, work: Path, options: argparse.Namespace, *, members: bool) -> dict[str, Any]:
    """By contestant and domain, each document's nats and bytes: the mixture, and where wanted each domain's specialist
    as the mixture holds it."""
    from octad.checkpoint.load import load_tokenizer, open_source
    from octad.evaluate.contestants import Member, contestant, fast_model
    from octad.evaluate.nats import window_nats
    from octad.text.windows import read_windows

    source = open_source(mixture)
    model, tokenizer = fast_model(source), load_tokenizer(source)
    names = [e["name"] for e in json.loads((mixture / "octad.json").read_text(encoding="utf-8"))["experts"]]
    found: dict[str, Any] = {"mixture": {}} | ({"specialist": {}} if members else {})
    for domain in TEXTS:
        file = work / "judge" / f"{domain}.jsonl"
        windows = read_windows([file], tokenizer, tokens=options.judge_tokens, window=options.judge_window)
        size = by_document([w.predicted_bytes for w in windows], windows)
        own = Member(names.index(domain if domain in names else "general"))
        for who in found:
            with contestant(model, own if who == "specialist" else None) as judged:
                found[who][domain] = by_document(window_nats(judged, windows), windows), size
        tell(f"judged {domain}")
    return found


def bits(judged: dict[str, Any]) -> dict[str, float]:
    """Bits per byte by domain."""
    return {domain: float(nats.sum() / math.log(2) / size.sum()) for domain, (nats, size) in judged.items()}


def beside(mixture: dict[str, Any], oracle: dict[str, Any], domains: tuple[str, ...]) -> dict[str, Any]:
    """The mean over domains as a share of the oracle's, and the difference in bits per byte with its interval."""
    from octad.evaluate.bootstrap import Draws

    draws = Draws([mixture[d][1] for d in domains])
    *_, mean = draws.differences([(mixture[d][0] - oracle[d][0])[None] for d in domains])[0]
    whole = sum(bits(oracle)[d] for d in domains) / len(domains)
    return {"share": mean.value / whole, "interval": [mean.low / whole, mean.high / whole]}


def figures(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Shares of the oracle's mean: over the seven domains that have a specialist, and with `dictionary`, which the base
    stands for; and each domain beside its own specialist."""
    oracle, tuned = before["specialist"], after["mixture"]
    by_domain = {d: beside(tuned, oracle, (d,)) for d in TEXTS}
    worst = max(DOMAINS, key=lambda d: by_domain[d]["share"])
    return {
        "before_over_oracle": beside(before["mixture"], oracle, tuple(DOMAINS)),
        "after_over_oracle": beside(tuned, oracle, tuple(DOMAINS)),
        "after_over_oracle_with_dictionary": beside(tuned, oracle, TEXTS),
        "after_over_before": beside(tuned, before["mixture"], tuple(DOMAINS)),
        "after_over_own_specialist": by_domain,
        "worst_domain": [worst, by_domain[worst]["share"]],
    }


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="octad-repair-") as directory:
        work = Path(directory)
        halves(options.corpora, work)
        mixture, tuned = options.mixture or work / "mixture", options.keep or work / "tuned"
        if options.mixture is None:
            tell("combining")
            models = {"general": "base"} | {d: str((options.specialists / d).resolve()) for d in DOMAINS}
            octad_run(write_recipe(work / "recipe.yaml", models, work, {"tokens": options.tokens}), mixture)
        config = write_config(options, mixture, work)
        tell("judging the mixture and its specialists")
        before = judge(mixture, work, options, members=True)
        tell("repairing")
        cost = run([sys.executable, "-m", "octad.cli", "train", config, "-o", tuned])
        after = judge(tuned, work, options, members=False)
    settings = {name: Path(v).name if isinstance(v, Path) else v for name, v in vars(options).items()}
    results = {
        "benchmark": "repair",
        "command": command_line(),
        "settings": settings,
        "training": cost | {"tokens": options.steps * options.windows * options.window},
        "before": {who: bits(judged) for who, judged in before.items()},
        "after": {who: bits(judged) for who, judged in after.items()},
        "figures": figures(before, after),
        "hardware": hardware(),
    }
    save(options.out, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
