"""A small world for killing commands in: a base, an adapter, text, and the files that each command reads.

python tests/kill/world.py DIRECTORY
"""

import json
import shutil
import sys
from pathlib import Path

import yaml

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[1])]

from members import adapter, full_member, make_base, text_file  # noqa: E402


def make(directory: Path) -> None:
    """Everything that the commands of kill.py start from."""
    directory.mkdir(parents=True)
    base = make_base(directory / "base", num_hidden_layers=1, hidden_size=32, intermediate_size=64)
    adapter(base, directory / "lora", 1)
    full_member(base, directory / "full", 2, only=".mlp.")
    texts = [text_file(directory, seed, 12).name for seed in range(3)]
    write(
        directory / "recipe.yaml",
        base="base",
        top_k=2,
        experts=[
            {"name": "general", "model": "base", "data": texts[0]},
            {"name": "lora", "model": "lora", "data": texts[1]},
            {"name": "full", "model": "full", "data": texts[2]},
        ],
        router={"method": "ridge", "tokens": 256, "window": 32},
    )
    write(directory / "domains.yaml", domains={"one": texts[1], "two": texts[2]})
    common = {
        "steps": 3,
        "dtype": "float32",
        "batch": {"windows": 2, "micro": 2},
        "schedule": {"warmup": 1},
        "save": {"every": 1},
    }
    sources = [{"name": name, "data": text} for name, text in zip(("one", "two"), texts, strict=False)]
    data = {"window": 16, "cache": str(directory / "tokens")}
    write(
        directory / "train.yaml",
        task="tune",
        model="mix",
        mode="router",
        data=data | {"sources": sources},
        **common,
    )
    specialists = [{"name": "one", "data": texts[1]}]
    write(
        directory / "branch.yaml",
        base="base",
        mode="ffn-adapter",
        experts=specialists,
        data=data,
        low_rank={"rank": 2, "alpha": 4},
        **common,
    )


def write(path: Path, **content: object) -> None:
    """One YAML file."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))), encoding="utf-8")


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    make(Path(sys.argv[1]))
