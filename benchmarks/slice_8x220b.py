"""Combining layers of the shape of 220 billion parameters: seconds and memory of a slice, and what they say of the whole.

    python benchmarks/slice_8x220b.py --work /mnt/big --layers 1 --experts 2
    python benchmarks/slice_8x220b.py --divide 8 --out /tmp/try.json          # widths an eighth: does it run at all

Members are sparse files: they say that they hold a model of width 16,384 and feed-forward width 57,344, and take no disk
but for the first page of each feed-forward matrix, in which all differ, as members do. The output
is real, so that a machine takes as many layers and experts as its disk holds (12.5 GB for a layer of two experts; the
vocabulary is cut to 1,024). Timed, in turn, are `octad combine` with random routers, which fits nothing and ends in
fsync, and `cp` and `sync` of about as many bytes of the same files. Nothing dirty is left by the one before, and of
the inputs nothing is in the system's cache: holes are filled with zeros by the system, for both alike, and no disk is
read. Medians count; start and pre-flight are timed by themselves (`--dry-run`), and the rate is told with and without.

Fitting is another matter, and told by itself: the calibration pass over two layers, which writes nothing, in which an
expert is read one matrix at a time; its figure is seconds for so many tokens through so many layers.
Hours of the whole are its bytes at the slice's rate: one disk, no faults, members that are read as fast as holes are;
the arithmetic of the calibration comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from combine_large import COMMON, minimal_tokenizer, octad, rated
from measure import command_line, hardware, run, save, tell, tree_bytes

ROOT = Path(__file__).resolve().parent.parent
PAGE = 4096
SHAPE = {
    "hidden_size": 16384, "intermediate_size": 57344, "num_attention_heads": 128, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 1024,
}  # fmt: skip
WHOLE = SHAPE | {"num_hidden_layers": 64, "vocab_size": 100256}
CALIBRATE = """
import sys
from pathlib import Path
import torch
from octad.combine.calibrate import Run, gate_inputs
from octad.combine.preflight import preflight
from octad.combine.recipe import Recipe
from octad.text.windows import Window
source = preflight(Recipe.load(Path(sys.argv[1]))).source()
windows = [Window(tuple(range(32)), 0, n) for n in range(int(sys.argv[2]) // 32)]
for layer, number, x in gate_inputs(source, [Run(0, 0, windows), Run(1, 1, windows)], torch.float32):
    print("layer", layer, "run", number, tuple(x.shape), file=sys.stderr)
"""


def write_sparse(work: Path, name: str, layers: int, experts: int, divide: int) -> Path:
    """A base and its members, of zeros that take no disk but for a page of each feed-forward matrix of a member, and the
    recipe; returns the recipe."""
    import torch

    from octad.checkpoint.names import is_ffn, tensor_plan
    from octad.checkpoint.shard import encode_header
    from octad.checkpoint.source import TensorInfo
    from octad.model.config import ModelConfig

    widths = ("hidden_size", "intermediate_size", "num_attention_heads")
    shape = {name: size // divide if name in widths else size for name, size in SHAPE.items()}
    raw = COMMON | shape | {"num_hidden_layers": layers}
    plan = {n: TensorInfo(s, torch.bfloat16) for n, s in tensor_plan(ModelConfig.from_dict(raw)).items()}
    header, starts = encode_header(plan)
    place = work / name
    for number, member in enumerate(["base", *(f"member{n}" for n in range(experts))]):
        (place / member).mkdir(parents=True)
        with (place / member / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(info.nbytes for info in plan.values()))
            for name in filter(is_ffn, plan):
                page = torch.full((PAGE // 2,), 0.01 * (number + 1), dtype=torch.bfloat16)
                file.seek(starts[name])
                file.write(page.view(torch.uint8).numpy())
        (place / member / "config.json").write_text(json.dumps(raw))
        (place / member / "tokenizer.json").write_text(minimal_tokenizer())
    entries = "".join(f"  - {{name: m{n}, model: member{n}}}\n" for n in range(experts))
    recipe = place / "recipe.yaml"
    recipe.write_text(f"base: base\ntop_k: 2\nexperts:\n{entries}router: {{method: random}}\n")
    return recipe


def members(recipe: Path) -> list[Path]:
    """The weights of the base and of each member."""
    return sorted(recipe.parent.glob("*/model.safetensors"))


def forget(recipe: Path) -> None:
    """Nothing of the members in the system's cache, and nothing to be written."""
    os.sync()
    for path in members(recipe):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def combine_turn(recipe: Path, work: Path) -> dict[str, float]:
    forget(recipe)
    found = run([octad(), "combine", recipe, "-o", work / "mixture"])
    found["bytes"] = tree_bytes(work / "mixture")
    shutil.rmtree(work / "mixture")
    return rated(found)


def copy_turn(recipe: Path, work: Path, count: float) -> dict[str, float]:
    """About as many bytes out of the base and the first members, dense."""
    files, copies = members(recipe), work / "copies"
    copies.mkdir()
    times = min(len(files), max(1, round(count / files[0].stat().st_size)))
    commands = " && ".join(f"cp --sparse=never {file} {copies}/{n}" for n, file in enumerate(files[:times]))
    forget(recipe)
    found = run(["sh", "-c", f"{commands} && sync {copies}/*"])
    found["bytes"] = tree_bytes(copies)
    shutil.rmtree(copies)
    return rated(found)


def whole_bytes(experts: int = 8) -> dict[str, float]:
    """Of eight such models around one attention."""
    from octad.model import cost
    from octad.model.config import ModelConfig

    config = ModelConfig.from_dict(
        {"model_type": "mixtral", "num_local_experts": experts, **COMMON_MIXTURE, **WHOLE}
    )
    return {"parameters": cost.parameters(config), "bytes": 2 * cost.parameters(config)}


COMMON_MIXTURE = {"num_experts_per_tok": 2, "tie_word_embeddings": False, "max_position_embeddings": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--divide", type=int, default=1, help="widths by this: a trial, no result")
    parser.add_argument("--tokens", type=int, default=64, help="of the calibration pass, by run")
    parser.add_argument("--work", type=Path, help="a directory on the disk to measure; it is emptied again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "slice_8x220b.json")
    given = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "slice_8x220b", "command": command_line()}
    with tempfile.TemporaryDirectory(dir=given.work, prefix="octad-bench-") as folder:
        work = Path(folder)
        recipe = write_sparse(work, "slice", given.layers, given.experts, given.divide)
        turns: dict[str, list[dict[str, float]]] = {"octad": [], "copy": []}
        for turn in range(1, given.turns + 1):
            tell(f"combining, turn {turn} of {given.turns}")
            turns["octad"].append(combine_turn(recipe, work))
            tell(f"copying ({turns['octad'][-1]['gigabytes_per_second']} GB/s was octad)")
            turns["copy"].append(copy_turn(recipe, work, turns["octad"][0]["bytes"]))
        rates = {who: median(turn["gigabytes_per_second"] for turn in found) for who, found in turns.items()}
        results |= {"turns": turns, "gigabytes_per_second": rates}
        results["octad_over_copy"] = round(rates["octad"] / rates["copy"], 3)
        results["peak_bytes"] = max(turn["peak_bytes"] for turn in turns["octad"])
        forget(recipe)
        dry = run([octad(), "combine", recipe, "--dry-run"])["seconds"]
        writing = median(turn["bytes"] / (turn["seconds"] - dry) for turn in turns["octad"]) / 1e9
        results |= {"dry_run_seconds": dry, "octad_writing_over_copy": round(writing / rates["copy"], 3)}
        tell(f"calibrating ({rates['copy']} GB/s was cp: octad over copy {results['octad_over_copy']})")
        recipe = write_sparse(work, "two-layers", 2, 2, given.divide)
        results["calibration"] = run([sys.executable, "-c", CALIBRATE, recipe, str(given.tokens)])
        results["calibration"] |= {"tokens": 2 * given.tokens, "layers": 2}
    whole = whole_bytes()
    results["whole"] = whole | {
        "hours_on_this_disk": round(
            whole["bytes"] / results["gigabytes_per_second"]["octad"] / 1e9 / 3600, 1
        ),
        "disk_for_members_and_mixture": 2 * whole["bytes"],
    }
    results["hardware"] = hardware()
    save(given.out, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
