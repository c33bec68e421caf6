"""What ten minutes of `repair` do to a combined mixture, judged beside its own members.

    python benchmarks/repair.py --corpora corpora --steps 150
    python benchmarks/repair.py --corpora corpora --steps 150 --specialists specialists --mixture mixture

A corpus is a directory with <domain>/train.jsonl.gz and valid.jsonl.gz for the seven domains and `dictionary`. Training
reads `train`; of `valid`, even documents calibrate the routers where no --mixture is given, odd ones judge. Judged,
before and after, in bits per byte on the same windows: the mixture at its own top-k, and each domain's own specialist
as the mixture held it before, whose mean is the oracle's. Seconds are the training command's, start to end.
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
from measure import command_line, hardware, run, save, tell

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
    parser.add_argument("--windows", type=int, default=8, help="a step")
    parser.add_argument("--window", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--router-lr", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--judge-tokens", type=int, default=4096)
    parser.add_argument("--judge-window", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="where the repaired mixture stays")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def write_config(options: argparse.Namespace, mixture: Path, work: Path) -> Path:
    """tune.yaml over the corpora's train parts."""
    sources = [{"name": d, "files": str(options.corpora.resolve() / d / "train.jsonl.gz")} for d in TEXTS]
    config = {
        "task": "tune",
        "model": str(mixture.resolve()),
        "mode": "repair",
        "steps": options.steps,
        "batch": {"windows": options.windows, "micro": options.windows},
        "optimizer": {"lr": options.lr, "router_lr": options.router_lr},
        "schedule": {"name": "linear", "warmup": max(1, options.steps // 20), "final": 0.05},
        "low_rank": {"rank": options.rank, "alpha": 2 * options.rank},
        "data": {"window": options.window, "cache": str(work / "cache"), "sources": sources},
        "save": {"every": max(1, options.steps)},
    }
    path = work / "repair.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def judge(mixture: Path, work: Path, options: argparse.Namespace, *, members: bool) -> dict[str, Any]:
    """Bits per byte by domain: the mixture, and where wanted each domain's own specialist in it; windows' nats too."""
    from octad.checkpoint.load import load_model, load_tokenizer, open_source
    from octad.checkpoint.text import read_windows
    from octad.dist import compute_dtype
    from octad.evaluate.contestants import Member, contestant
    from octad.evaluate.loss import window_nats

    source = open_source(mixture)
    model, tokenizer = load_model(source, compute_dtype()), load_tokenizer(source)
    names = [e["name"] for e in json.loads((mixture / "octad.json").read_text(encoding="utf-8"))["experts"]]
    found: dict[str, Any] = {}
    for domain in TEXTS:
        file = work / "judge" / f"{domain}.jsonl"
        windows = read_windows([file], tokenizer, tokens=options.judge_tokens, window=options.judge_window)
        own = Member(names.index(domain if domain in names else "general"))
        for who, contender in {"mixture": None, **({"specialist": own} if members else {})}.items():
            with contestant(model, contender) as judged:
                nats = window_nats(judged, windows)
            bits = [n / math.log(2) for n in nats]
            found.setdefault(who, {})[domain] = sum(bits) / sum(w.predicted_bytes for w in windows)
        tell(f"judged {domain}")
    return found


def figures(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Means over the seven domains as shares of the oracle's, and the worst domain."""
    oracle = sum(before["specialist"][d] for d in DOMAINS) / len(DOMAINS)

    def over(judged: dict[str, float]) -> float:
        return sum(judged[d] for d in DOMAINS) / len(DOMAINS) / oracle - 1

    by_domain = {d: after["mixture"][d] / before["specialist"][d] - 1 for d in TEXTS}
    worst = max(DOMAINS, key=by_domain.__getitem__)
    return {
        "oracle_bits_per_byte": oracle,
        "before_over_oracle": over(before["mixture"]),
        "after_over_oracle": over(after["mixture"]),
        "after_over_own_specialist": by_domain,
        "worst_domain": [worst, by_domain[worst]],
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
        "before": before,
        "after": after,
        "figures": figures(before, after),
        "hardware": hardware(),
    }
    save(options.out, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
