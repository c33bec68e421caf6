"""Combining large members: bytes per second beside a plain copy on the same disk, and memory.

    python benchmarks/combine_large.py --work /mnt/big

Synthetic Llama-shaped members in bfloat16, at about 2 GB and 20 GB of output, routers random: nothing is computed, so
what remains is reading, writing and checking. The base holds random weights; the eight members are hard links to its
one file. So inputs come from the page cache, for octad as for `cp`, and the disk's writing is what both are bound by.
Each turn times `octad combine` (which ends in fsync) and `cp` + `sync` of as many bytes from the same file; medians of
all turns count. `--dry-run` tells how much of octad's time is the pre-flight. Memory is the peak of resident bytes,
beside a Python that has imported octad and torch and done nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from measure import command_line, hardware, run, save, tell, tree_bytes

ROOT = Path(__file__).resolve().parent.parent
KEEP_FREE = 15e9
EXPERTS = 8
SHAPES = {  # name -> the sizes that differ; 20 GB has Llama 3.2 3B's layers, 16 of its 28
    "2 GB": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    },
    "20 GB": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 0,
}


def write_members(work: Path, shape: dict[str, int]) -> Path:
    """work/base with random weights, eight members that are hard links to it, and the recipe; returns the recipe."""
    import torch

    from octad.checkpoint.names import tensor_plan
    from octad.checkpoint.source import TensorInfo
    from octad.checkpoint.writer import CheckpointWriter
    from octad.model.config import ModelConfig

    raw = COMMON | shape
    pool = (torch.randn(1 << 25) * 0.02).to(torch.bfloat16)
    plan = {n: TensorInfo(s, torch.bfloat16) for n, s in tensor_plan(ModelConfig.from_dict(raw)).items()}
    with CheckpointWriter(work / "base", plan, max_shard_bytes=1e15) as writer:
        for number, (name, info) in enumerate(plan.items()):
            count = info.nbytes // 2
            values = pool.roll(number * 1009).repeat(count // len(pool) + 1)[:count]
            writer.write(name, values.view(info.shape))
        writer.add_text("config.json", json.dumps(raw, indent=2))
        writer.add_text("tokenizer.json", minimal_tokenizer())
        writer.commit()
    for number in range(EXPERTS):
        member = work / f"member{number}"
        member.mkdir()
        os.link(work / "base" / "model.safetensors", member / "model.safetensors")
        shutil.copy(work / "base" / "config.json", member)
    experts = "".join(f"  - {{name: m{n}, model: member{n}}}\n" for n in range(EXPERTS))
    recipe = work / "recipe.yaml"
    recipe.write_text(f"base: base\ntop_k: 2\nexperts:\n{experts}router: {{method: random}}\n")
    return recipe


def minimal_tokenizer() -> str:
    """A tokenizer.json of two words: no text is read here."""
    import tokenizers

    return str(
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "word": 1}, unk_token="<end>")).to_str()
    )


def octad_turn(recipe: Path, work: Path) -> dict[str, float]:
    """`octad combine`; its output is removed."""
    os.sync()
    found = run([octad(), "combine", recipe, "-o", work / "mixture"])
    found["bytes"] = tree_bytes(work / "mixture")
    shutil.rmtree(work / "mixture")
    return rated(found)


def copy_turn(count: float, work: Path) -> dict[str, float]:
    """`cp` of about `count` bytes, in whole copies of the base's file, then `sync` of them; the copies are removed."""
    file, copies = work / "base" / "model.safetensors", work / "copies"
    copies.mkdir()
    times = max(1, round(count / file.stat().st_size))
    targets = [shlex.quote(str(copies / str(n))) for n in range(times)]
    script = " && ".join(f"cp {shlex.quote(str(file))} {target}" for target in targets)
    os.sync()
    found = run(["sh", "-c", f"{script} && sync {' '.join(targets)}"])
    found["bytes"] = tree_bytes(copies)
    shutil.rmtree(copies)
    return rated(found)


def rated(found: dict[str, float]) -> dict[str, float]:
    return found | {"gigabytes_per_second": round(found["bytes"] / found["seconds"] / 1e9, 3)}


def octad() -> Path:
    return Path(sys.executable).parent / "octad"


def measure(name: str, work: Path, turns: int) -> dict[str, Any]:
    """One size: its turns, medians and memory."""
    recipe = write_members(work, SHAPES[name])
    octads: list[dict[str, float]] = []
    copies: list[dict[str, float]] = []
    for turn in range(turns):
        tell(f"{name}: octad, turn {turn + 1} of {turns}")
        octads.append(octad_turn(recipe, work))
        tell(f"{name}: cp ({octads[-1]['gigabytes_per_second']} GB/s was octad)")
        copies.append(copy_turn(octads[-1]["bytes"], work))
    tell(f"{name}: pre-flight alone ({copies[-1]['gigabytes_per_second']} GB/s was cp)")
    dry = run([octad(), "combine", recipe, "--dry-run"])
    idle = run([sys.executable, "-c", "import torch, octad.combine.build"])
    rates = [median(t["gigabytes_per_second"] for t in which) for which in (octads, copies)]
    peak = max(t["peak_bytes"] for t in octads)
    return {
        "bytes": octads[0]["bytes"],
        "octad_gigabytes_per_second": rates[0],
        "copy_gigabytes_per_second": rates[1],
        "octad_over_copy": round(rates[0] / rates[1], 3),
        "preflight_seconds": dry["seconds"],
        "import_seconds": idle["seconds"],
        "peak_bytes": peak,
        "peak_bytes_over_import": peak - idle["peak_bytes"],
        "octad": octads,
        "copy": copies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="a directory on the disk to measure; what is written is removed"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "combine_large.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "combine_large", "command": command_line(), "sizes": {}}
    for name in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="octad-bench-") as work:
            needed = float(name.split()[0]) * 1.4e9
            if shutil.disk_usage(work).free < needed + KEEP_FREE:
                tell(f"{name}: left out, the disk has no {(needed + KEEP_FREE) / 1e9:.0f} GB free")
                continue
            results["sizes"][name] = measure(name, Path(work), options.turns)
        results["hardware"] = hardware()
        save(options.out, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
