"""What a further expert does to a mixture: is it as good as its specialist, and do the others stay as good?

    octad expert add demo --name italian --model adapters/italian --data calibrate.jsonl -o demo-9
    python benchmarks/expert_add.py --corpora corpora --before demo --after demo-9 --name italian --text heldout.jsonl

The newcomer's held-out text, one {"text"} a line, is judged by the mixture with it, by its specialist alone (the new
mixture with every token sent there), by the base, and by the mixture before. Documents of the seven domains and of
`dictionary` (`valid` parts of the corpora) are judged by both mixtures. In bits per byte; differences are paired, with
95 % intervals over documents. Everybody is rounded alike where --quantize is given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excess import ALL, DOMAINS, POSITIONS, Text, by_position, excess
from measure import command_line, hardware, save, tell
from quality import experts_of, in_turn, nats_of, read_corpus, window_of

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--name", required=True, help="the newcomer")
    parser.add_argument("--text", type=Path, required=True, help="its held-out text")
    parser.add_argument("--documents", type=int, default=8, help="of each of the others' domains")
    parser.add_argument("--window", type=int, default=128, help="judged tokens of a document of theirs")
    parser.add_argument("--own-window", type=int, default=512, help="and of the newcomer's")
    parser.add_argument("--quantize", choices=("int8", "int4"), default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "expert_add.json")
    return parser.parse_args()


def others(options: argparse.Namespace, tokenizer: Any) -> list[Text]:
    """The first tokens of documents of the seven domains and the dictionary."""
    texts = []
    for domain in ALL:
        judged = read_corpus(options.corpora / domain / "valid.jsonl.gz")
        for name, text in in_turn(judged, options.documents):
            if window := window_of(text, tokenizer, options.window):
                texts.append(Text(domain, name, 0, window))
    return texts


def newcomers(options: argparse.Namespace, tokenizer: Any) -> list[Text]:
    """The first tokens of its held-out documents."""
    rows = [json.loads(line) for line in options.text.read_text(encoding="utf-8").splitlines()]
    windows = [window_of(row["text"], tokenizer, options.own_window) for row in rows]
    return [Text(options.name, f"{n}", 0, window) for n, window in enumerate(windows) if window]


def judged(options: argparse.Namespace, mixture: Path, texts: Sequence[Text], alone: Sequence[str]) -> Any:
    """nats of the mixture, and of these experts alone on the newcomer's text, which is the last."""
    from octad.checkpoint.load import open_source
    from octad.evaluate.contestants import Member, fast_model

    source = open_source(mixture, quantised=True)
    model = fast_model(source, quantize=options.quantize)
    own = [text for text in texts if text.domain == options.name]
    found = {"mixture": nats_of(model, None, texts)}
    tell(f"{mixture.name} has read everything")
    for name in alone:
        found[name] = nats_of(model, Member(experts_of(source).index(name)), own)
    return found


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Both mixtures in turn."""
    from octad.checkpoint.load import load_tokenizer, open_source

    tokenizer = load_tokenizer(open_source(options.after, quantised=True))
    theirs, own = others(options, tokenizer), newcomers(options, tokenizer)
    after = judged(options, options.after, [*theirs, *own], ["general", options.name])
    before = judged(options, options.before, [*theirs, *own], [])
    size, specialist = len(theirs), after[options.name]
    old, new = before["mixture"], after["mixture"]
    beside = {"with it": new[size:], "before": old[size:], "base": after["general"]}
    return {
        "benchmark": "expert_add",
        "command": command_line(),
        "above its specialist": {
            name: excess(own, nats, specialist, (options.name,)) for name, nats in beside.items()
        },
        "positions": [
            by_position(own, new[size:], specialist, *place, (options.name,)) for place in POSITIONS
        ],
        "others, above before": {
            "mean": excess(theirs, new[:size], old[:size], DOMAINS),
            **{domain: excess(theirs, new[:size], old[:size], (domain,)) for domain in ALL},
        },
    }


def main() -> None:
    options = arguments()
    results = benchmark(options)
    save(options.out, results | {"hardware": hardware()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
