"""How good a mixture is on sources that its routers never saw, beside those that they did.

    python benchmarks/quality.py --corpora corpora --mixture mixture
    python benchmarks/quality.py --corpora corpora --mixture mixture --shipped mixture older-mixture --no-halves

A corpus is a directory with <domain>/train.jsonl.gz and valid.jsonl.gz for the seven domains and `dictionary`; every
document names its `source` (a package, then a file). The sources of each domain are dealt into two halves. Routers are
fitted on documents of one half (out of `train`) and judge documents of both (out of `valid`); then the other way round.
So each judged document is read twice, once with its source among the calibrated ones and once without, and both figures
are of the same text. --mixture is where the experts come from, an octad mixture of the base and the seven specialists.
--shipped names mixtures of the same experts, whose own routers are judged on sources that their text names and on others.

Judged beside each domain's own specialist, told the domain (the oracle), as the mixture holds it, in bits per byte: the
excess over it with 95 % intervals over documents, by position in the window, and the ten worst documents. --ensemble N
also runs every member over the first N documents of each domain and gives the excess of their Bayes ensemble there,
beside everybody else's on the same documents: at the beginning of a text nobody knows what the oracle is told, and what
the ensemble loses there is what has to be lost. The halves' routers are fitted as the demonstration's are, on text that
the specialists wrote themselves too (--own), and with its favour for the generalist.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from excess import ALL, DOMAINS, Text, excess, figures, held
from measure import command_line, hardware, save, tell

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "octad" / "demo"
SHORTEST = 400  # characters of a document that is used
Documents = dict[str, list[tuple[str, str]]]  # source -> (name, text) of each document


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--mixture", type=Path, required=True, help="where the experts come from")
    parser.add_argument(
        "--shipped", type=Path, nargs="*", default=[], help="mixtures: their own routers, too"
    )
    parser.add_argument("--halves", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--documents", type=int, default=30, help="judged documents a domain")
    parser.add_argument("--window", type=int, default=256, help="judged tokens of a document")
    parser.add_argument("--tokens", type=int, default=6144, help="calibration tokens per expert")
    parser.add_argument("--piece", type=int, default=None, help="calibration tokens of a document at a time")
    parser.add_argument("--ridge", type=float, default=None, help="penalty of the routers")
    parser.add_argument("--method", default="logistic")
    parser.add_argument("--generalist", type=float, default=8.0, help="as in a recipe's router")
    parser.add_argument("--own", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quantize", choices=("int8", "int4"), default=None, help="everybody is judged so")
    parser.add_argument("--ensemble", type=int, default=0, help="documents a domain that all members read")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    return parser.parse_args()


# ---- text --------------------------------------------------------------------------------------------------


def read_corpus(file: Path) -> Documents:
    """The documents of a file by source, in a fixed shuffled order."""
    found: Documents = {}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if len(row["text"]) >= SHORTEST:
                found.setdefault(row["source"].split("/")[0], []).append((row["source"], row["text"]))
    for source in found:
        random.Random(source).shuffle(found[source])
    return dict(sorted(found.items()))


def in_turn(documents: Documents, count: int) -> list[tuple[str, str]]:
    """`count` documents, the sources taking turns."""
    queues = [iter(found) for found in documents.values()]
    taken: list[tuple[str, str]] = []
    while queues and len(taken) < count:
        for queue in list(queues):
            if (document := next(queue, None)) is None:
                queues.remove(queue)
            elif len(taken) < count:
                taken.append(document)
    return taken


def halves(judged: Documents, calibrating: Documents) -> dict[str, int]:
    """Each source's half, 0 or 1: the largest first, to the half that has fewer documents; -1 for one that has nothing to
    calibrate on: it is unseen in both rounds."""
    sizes, half = [0, 0], dict[str, int]()
    for source in sorted(judged, key=lambda s: (-len(judged[s]), s)):
        if source not in calibrating:
            half[source] = -1
            continue
        half[source] = sizes.index(min(sizes))
        sizes[half[source]] += len(judged[source])
    return half


def prepare(options: argparse.Namespace, tokenizer: Any, work: Path) -> tuple[list[Text], dict[str, Any]]:
    """The judged documents; and work/<half>/<domain>.jsonl to calibrate on. Also the sources of both halves."""
    texts, sources = [], {}
    for domain in ALL:
        judged = read_corpus(options.corpora / domain / "valid.jsonl.gz")
        calibrating = read_corpus(options.corpora / domain / "train.jsonl.gz")
        half = halves(judged, calibrating)
        sources[domain] = [[s for s in half if half[s] == n] for n in (0, 1)]
        for number, names in enumerate(sources[domain]):
            write_calibration(work / str(number) / f"{domain}.jsonl", calibrating, names, options)
        for name, text in in_turn(judged, options.documents):
            if window := window_of(text, tokenizer, options.window):
                texts.append(Text(domain, name, half[name.split("/")[0]], window))
    return texts, sources


def write_calibration(path: Path, found: Documents, names: Sequence[str], options: Any) -> None:
    """As many documents of these sources as the budget can look into."""
    path.parent.mkdir(exist_ok=True)
    chosen = in_turn({name: found[name] for name in names}, options.tokens // 16)
    path.write_text("".join(json.dumps({"text": text, "source": name}) + "\n" for name, text in chosen))


def window_of(text: str, tokenizer: Any, size: int) -> Any:
    """A document's first `size` tokens; None where it has hardly any."""
    from octad.text.windows import Window

    ids = tokenizer.encode(text[: 64 * size], parse_special=False)[:size]
    lengths = tokenizer.byte_lengths
    return Window(tuple(ids), sum(lengths[i] for i in ids[1:]), 0) if len(ids) >= 16 else None


# ---- routers -----------------------------------------------------------------------------------------------


def fitted(options: argparse.Namespace, source: Any, tokenizer: Any, directory: Path) -> list[Any]:
    """weight_ED of every layer's router, by octad's own calibration of this directory's text."""
    from octad.combine.calibrate import gate_inputs
    from octad.combine.fit import fitter_of
    from octad.combine.recipe import RouterSpec
    from octad.dist import compute_dtype

    given = {"method": options.method, "tokens": options.tokens, "ridge": options.ridge}
    given |= {"window": options.piece} if options.piece else {}
    spec = RouterSpec.checked(given | {"generalist": options.generalist}, "router")
    names = experts_of(source)
    calibrations = [calibrated_on(name, directory, spec, tokenizer, options.own) for name in names]
    dtype = compute_dtype()
    fitter = fitter_of(spec, source.config, calibrations, names.index("general"), dtype)
    for step in gate_inputs(source, fitter.runs, dtype):
        fitter.see(*step)
    return fitter.fit().weights


def calibrated_on(name: str, directory: Path, spec: Any, tokenizer: Any, own: bool) -> Any:
    """One expert's text: a third of it what it wrote itself, where there is such text, the rest of these sources."""
    from octad.combine.calibration import text_windows
    from octad.combine.fit import Calibration
    from octad.combine.recipe import ExpertSpec

    written = DEMO / "data" / name / "own.jsonl"
    files = [directory / f"{'dictionary' if name == 'general' else name}.jsonl"]
    files = chats() + files if name == "general" else files
    parts = [(files, spec)]
    if own and written.is_file():
        third = spec.tokens // 3
        shares = [(files, spec.tokens - third), ([written], third)]
        parts = [(part, spec.model_copy(update={"tokens": size})) for part, size in shares]
    windows: list[Any] = []
    for part, budget in parts:
        expert = ExpertSpec.of(name, "base", tuple(map(str, part)))
        windows += text_windows(expert, list(map(str, part)), budget, tokenizer)
    return Calibration(windows, [])


def chats() -> list[Path]:
    """The generalist's conversations of the demonstration, where they are in a file of their own."""
    return sorted((DEMO / "data" / "general").glob("chats.jsonl"))


def experts_of(source: Any) -> list[str]:
    """Their names."""
    from octad.checkpoint.provenance import Provenance

    made = Provenance.of(source)
    assert made is not None, "not an octad mixture"
    return made.names


def routers_of(mixture: Path) -> list[Any]:
    """weight_ED of every layer's router, as a mixture has them."""
    from octad.checkpoint.load import open_source
    from octad.checkpoint.names import router_name

    source = open_source(mixture)
    names = [router_name(source.config.model_type, n) for n in range(source.config.num_hidden_layers)]
    return [source.read(name) for name in names]


def put_in(model: Any, weights: Sequence[Any]) -> None:
    """These routers in the place of the model's, rounded as they would be stored."""
    import torch

    for layer, weight_ED in zip(model.model.layers, weights, strict=True):
        layer.mlp.gate.weight.data.copy_(weight_ED.to(torch.bfloat16).float())


# ---- judging -----------------------------------------------------------------------------------------------


def nats_of(model: Any, who: Any, texts: Sequence[Text]) -> list[Any]:
    """For each text its tokens' nats, by a contestant inside the model (None: the mixture)."""
    from octad.evaluate.contestants import contestant
    from octad.evaluate.nats import token_nats

    with contestant(model, who) as judged:
        return token_nats(judged, [text.window for text in texts])


def of_specialists(model: Any, texts: Sequence[Text], experts: Sequence[str]) -> list[Any]:
    """For each text its tokens' nats, by the domain's own specialist."""
    from octad.evaluate.contestants import Member

    found: list[Any] = []
    for domain in ALL:
        own = Member(experts.index("general" if domain == "dictionary" else domain))
        found += nats_of(model, own, [text for text in texts if text.domain == domain])
        tell(f"judged {domain} by its specialist")
    return found


def alone(model: Any, texts: Sequence[Text], experts: Sequence[str]) -> dict[str, Any]:
    """For each text its tokens' nats, by all members weighted by their posterior, and by the generalist."""
    from octad.evaluate.contestants import Member
    from octad.evaluate.ensemble import ensemble_nats

    members = []
    for number in range(len(experts)):
        members.append(np.concatenate(nats_of(model, Member(number), texts)))
        tell(f"{experts[number]} has read everything")
    starts = np.cumsum([0, *(len(text.window.ids) - 1 for text in texts)])
    together = {
        "ensemble": ensemble_nats(np.stack(members), starts[:-1]),
        "generalist": members[experts.index("general")],
    }
    return {name: np.split(nats, starts[1:-1]) for name, nats in together.items()}


# ---- rounds ----------------------------------------------------------------------------------------------


def calibrated_sources(mixture: Path) -> set[str]:
    """The first parts of the sources that a mixture's calibration text names, as far as its files are still there."""
    found = set()
    recipe = json.loads((mixture / "octad.json").read_text(encoding="utf-8"))["recipe"]
    for file in files_of(recipe):
        for line in file.read_text(encoding="utf-8").splitlines():
            found.add(str(json.loads(line).get("source", "")).split("/")[0])
    return found


def files_of(recipe: Mapping[str, Any]) -> Iterator[Path]:
    """The calibration files of a recipe that are there."""
    for expert in recipe["experts"]:
        for name in [expert["data"]] if isinstance(expert["data"], str) else expert["data"]:
            for place in (Path(name), DEMO / name):
                if place.is_file() and place.suffix == ".jsonl":
                    yield place
                    break


# ---- the whole ---------------------------------------------------------------------------------------------


def benchmark(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything in turn."""
    from octad.checkpoint.load import load_tokenizer, open_source
    from octad.dist import keep_freed_memory
    from octad.evaluate.contestants import fast_model

    keep_freed_memory()
    source = open_source(options.mixture)
    tokenizer, experts = load_tokenizer(source), experts_of(source)
    texts, sources = prepare(options, tokenizer, work)
    model = fast_model(source, quantize=options.quantize)
    tell(f"{len(texts)} documents, {sum(len(text.window.ids) for text in texts)} tokens")
    oracle = of_specialists(model, texts, experts)
    everybody: dict[str, Any] = {}
    results: dict[str, Any] = {"benchmark": "quality", "command": command_line(), "sources": sources}
    for mixture in options.shipped:
        put_in(model, routers_of(mixture))
        everybody[f"shipped {mixture.name}"] = nats = nats_of(model, None, texts)
        results[f"shipped {mixture.name}"] = shipped(mixture, nats, texts, oracle)
        tell(f"judged {mixture.name}")
    if options.halves:
        rounds = []
        for half in (0, 1):
            weights = fitted(options, source, tokenizer, work / str(half))
            tell(f"routers fitted on half {half}")
            put_in(model, weights)
            rounds.append(nats_of(model, None, texts))
            tell(f"judged with the routers of half {half}")
        results |= both_ways(texts, rounds, oracle)
        everybody["unseen"] = crossed(texts, rounds)
    if options.ensemble:
        some = [n for n in range(len(texts)) if place_in_domain(texts, n) < options.ensemble]
        chosen, known = [texts[n] for n in some], [oracle[n] for n in some]
        found = {name: [nats[n] for n in some] for name, nats in everybody.items()}
        found |= alone(model, chosen, experts)
        results["beside the ensemble"] = {name: figures(chosen, nats, known) for name, nats in found.items()}
    return results


def place_in_domain(texts: Sequence[Text], number: int) -> int:
    """Which of its domain's documents this is, from 0."""
    return sum(text.domain == texts[number].domain for text in texts[:number])


def both_ways(texts: Sequence[Text], rounds: Sequence[Any], oracle: Sequence[Any]) -> dict[str, Any]:
    """Calibrated: each document by the routers that know its source; unseen: by the others."""
    known = [n for n, text in enumerate(texts) if text.half >= 0]
    seen = [rounds[texts[n].half][n] for n in known]
    return {
        "calibrated": figures([texts[n] for n in known], seen, [oracle[n] for n in known]),
        "unseen": figures(texts, crossed(texts, rounds), oracle),
    }


def crossed(texts: Sequence[Text], rounds: Sequence[Any]) -> list[Any]:
    """Each document by the routers that do not know its source."""
    return [rounds[1 - max(0, text.half)][n] for n, text in enumerate(texts)]


def shipped(
    mixture: Path, nats: Sequence[Any], texts: Sequence[Text], oracle: Sequence[Any]
) -> dict[str, Any]:
    """A mixture with its own routers, on sources that its calibration text names, and on others."""
    known = calibrated_sources(mixture)
    found = {"all": figures(texts, nats, oracle), "calibration_sources": sorted(known)}
    for title, wanted in (("calibrated", True), ("unseen", False)):
        rows = [n for n, text in enumerate(texts) if (text.source in known) == wanted]
        parts = [[of[n] for n in rows] for of in (texts, nats, oracle)]
        there = [domain for domain in ALL if held(parts[0], domain)]
        found[title] = {domain: excess(*parts, (domain,)) for domain in there}
        found[title]["mean"] = excess(*parts, tuple(d for d in there if d in DOMAINS))
    return found


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="octad-quality-") as work:
        results = benchmark(options, Path(work))
    save(options.out, results | {"hardware": hardware()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
