"""How fast octad judges: its rate beside the engine's reading of the same tokens, and the time of a whole verdict.

    python benchmarks/evaluate.py --mixture mixture --corpora corpora --bytes 65536

The rate: the mixture, and one of its members, over the same windows in turns: `token_nats` (every token's probability,
so the head over all of them) and the engine's prompts of the same ids with one token to write (the head once a prompt).
The verdict: `octad evaluate` (all members, soup, ensemble, oracle, the mixture at top-1, top-2 and all) over --bytes of
text of each of eight domains, as a user would run it, nothing cached.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from combine import DOMAINS, ROOT
from measure import command_line, hardware, run, save, tell

OUT = ROOT / "benchmarks" / "results" / "evaluate.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mixture", type=Path, required=True)
    parser.add_argument("--corpora", type=Path, required=True, help="<domain>/valid.jsonl.gz lie here")
    parser.add_argument("--bytes", type=int, default=65536, help="of text a domain, for the verdict; 0: none")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="for the rate")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def cut_texts(corpora: Path, work: Path, size: int) -> Path:
    """domains.yaml over the first `size` bytes of each domain's documents; the last one is cut."""
    domains = {}
    for domain in (*DOMAINS, "dictionary"):
        left, lines = size, []
        with gzip.open(corpora / domain / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"].encode()[:left].decode(errors="ignore")
                left -= len(text.encode())
                lines.append(json.dumps({"text": text}) + "\n")
                if left <= 0:
                    break
        domains[domain] = str(work / f"{domain}.jsonl")
        Path(domains[domain]).write_text("".join(lines), encoding="utf-8")
    path = work / "domains.yaml"
    path.write_text(yaml.safe_dump({"domains": domains}))
    return path


def rates(options: argparse.Namespace, domains: Path) -> dict[str, Any]:
    """Tokens a second of judging and of reading, for the mixture and for one member alone."""
    from octad import LLM, SamplingParams
    from octad.checkpoint.load import open_source
    from octad.evaluate.contestants import Member, contestant, fast_model
    from octad.evaluate.nats import token_nats
    from octad.text.windows import read_windows

    llm = LLM(options.mixture, enable_prefix_caching=False)
    model = fast_model(open_source(options.mixture))
    files = list(yaml.safe_load(domains.read_text())["domains"].values())
    windows = [
        window
        for file in files
        for window in read_windows([file], llm.tokenizer, tokens=8 * options.window, window=options.window)
        if len(window.ids) == options.window
    ][: options.windows]
    prompts, one = [list(w.ids) for w in windows], SamplingParams(max_tokens=1, temperature=0)
    tokens = sum(map(len, prompts))

    def timed(work: Any) -> float:
        began = time.perf_counter()
        work()
        return tokens / (time.perf_counter() - began)

    found: dict[str, Any] = {"tokens": tokens}
    for name, expert in (("mixture", None), ("member", 0)):
        llm.only(expert)
        judged = nullcontext(model) if expert is None else contestant(model, Member(expert))
        seen: dict[str, list[float]] = {"judging": [], "reading": []}
        with judged:
            for turn in range(options.repeat + 1):  # the first warms up
                judging = timed(lambda: token_nats(model, windows))
                reading = timed(lambda: llm.generate(prompts, one))
                if turn:
                    seen["judging"].append(round(judging, 1))
                    seen["reading"].append(round(reading, 1))
        medians = {kind: statistics.median(values) for kind, values in seen.items()}
        found[name] = seen | {"judging_over_reading": round(medians["judging"] / medians["reading"], 3)}
        tell(f"{name}: {found[name]}")
    return found


def main() -> None:
    options = arguments()
    results: dict[str, Any] = {"benchmark": "evaluate", "command": command_line()}
    with tempfile.TemporaryDirectory(prefix="octad-evaluate-") as directory:
        work = Path(directory)
        domains = cut_texts(options.corpora, work, options.bytes or 65536)
        results["rates"] = rates(options, domains)
        save(options.out, results | {"hardware": hardware()})
        if options.bytes:
            tell("octad evaluate")
            command = [sys.executable, "-m", "octad.cli", "evaluate", options.mixture, "--data", domains]
            command += ["--tokens", str(options.bytes), "--window", str(options.window), "--no-card"]
            command += ["--cache", work / "cache", "--report", work / "report"]
            results["verdict"] = run(command) | {"bytes_a_domain": options.bytes}
            told = json.loads((work / "report" / "report.json").read_text(encoding="utf-8"))
            results["verdict"]["domains"] = told["domains"]
            results["verdict"]["contestants"] = [row["name"] for row in told["contestants"]]
    save(options.out, results | {"hardware": hardware()})


if __name__ == "__main__":
    main()
