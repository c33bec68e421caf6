"""What more training makes of the specialists: two sets of adapters of one base, judged on held-out text.

    octad branch benchmarks/specialists.yaml -o specialists
    python benchmarks/specialists.py --corpora corpora --before shared/specialists --after specialists

Each adapter is judged on the odd documents of its own domain's `valid` part, in bits per byte, beside the base and the
adapter of the same name in the other set: same windows, and a 95 % interval of the difference over documents.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

from combine import BASE, DOMAINS, ROOT, halves
from measure import by_document, command_line, hardware, save, tell

OUT = ROOT / "benchmarks" / "results" / "specialists.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--before", type=Path, required=True, help="a directory of adapters, one a domain")
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--judge-tokens", type=int, default=8192, help="judged tokens per domain")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def judge(domain: str, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte of the base and both adapters on one domain, and the interval of after minus before."""
    from octad.checkpoint.load import load_tokenizer, open_member, open_source
    from octad.evaluate.bootstrap import Draws
    from octad.evaluate.contestants import fast_model
    from octad.evaluate.nats import bits_per_byte, window_nats
    from octad.text.windows import read_windows

    base = open_source(BASE)
    windows = read_windows([file], load_tokenizer(base), tokens=options.judge_tokens, window=options.window)
    sources = {"base": base} | {
        when: open_member(getattr(options, when) / domain, base) for when in ("before", "after")
    }
    nats = {who: window_nats(fast_model(source), windows) for who, source in sources.items()}
    bits = {who: bits_per_byte(found, windows) for who, found in nats.items()}
    gained = by_document(nats["after"], windows) - by_document(nats["before"], windows)
    draws = Draws([by_document([w.predicted_bytes for w in windows], windows)])
    interval = draws.differences([gained[None]])[0][0]
    share = bits["after"] / bits["before"] - 1
    return {
        "bits_per_byte": {who: round(b, 4) for who, b in bits.items()},
        "after_minus_before": [round(v, 4) for v in (interval.value, interval.low, interval.high)],
        "share": round(share, 4),
        "documents": len(gained),
    }


def main() -> None:
    options = arguments()
    results: dict[str, Any] = {"benchmark": "specialists", "command": command_line(), "domains": {}}
    with tempfile.TemporaryDirectory(prefix="octad-specialists-") as directory:
        halves(options.corpora, Path(directory))
        for domain in DOMAINS:
            results["domains"][domain] = judge(domain, Path(directory) / "judge" / f"{domain}.jsonl", options)
            tell(f"{domain}: {results['domains'][domain]}")
    shares = [found["share"] for found in results["domains"].values()]
    results["mean_share"] = round(math.fsum(shares) / len(shares), 4)
    save(options.out, results | {"hardware": hardware()})


if __name__ == "__main__":
    main()
