"""A tiny base and folders of text of one's own, as somebody has them who comes to `octad init`."""

import json
from pathlib import Path

from members import full_member, make_base, text_file
from small import texts

WORDS = {"law": ("abba", "cd"), "sea": ("xyz", "efgh"), "sky": ("mnop", "qq")}


def folders(directory: Path, documents: int = 20) -> Path:
    """texts/law, texts/sea (folders of .txt) and texts/sky.csv, and base/, a model."""
    make_base(directory / "base", "llama")
    for number, (name, words) in enumerate(WORDS.items()):
        written = texts(documents, number, words)
        if name == "sky":
            rows = "\n".join(json.dumps(text) for text in written)
            (directory / "texts" / "sky.csv").write_text(f"body\n{rows}\n")
            continue
        (directory / "texts" / name).mkdir(parents=True)
        for n, text in enumerate(written):
            (directory / "texts" / name / f"{n}.txt").write_text(text)
    return directory


def world(directory: Path) -> Path:
    """What the examples of the Python API are run in: base, members, texts, recipe.yaml, branch.yaml, tune.yaml."""
    base = make_base(directory / "base", "llama")
    for seed, name in enumerate(("one", "two"), 1):
        full_member(base, directory / name, seed, only=".mlp.")
        text_file(directory, seed, 24).rename(directory / f"{name}.jsonl")
    text_file(directory, 3).rename(directory / "general.jsonl")
    experts = [
        {"name": name, "model": model, "data": f"{name}.jsonl"}
        for name, model in (("general", "base"), ("one", "one"), ("two", "two"))
    ]
    recipe = {"base": "base", "experts": experts, "router": {"tokens": 200, "window": 64}}
    run = {
        "steps": 2,
        "dtype": "float32",
        "batch": {"windows": 2, "micro": 2},
        "data": {"window": 32, "cache": "cache"},
    }
    both = [{"name": name, "data": f"{name}.jsonl"} for name in ("one", "two")]
    tune = run | {"task": "tune", "model": "mixture", "data": run["data"] | {"sources": both}}  # type: ignore[operator]
    for name, content in (
        ("recipe", recipe),
        ("branch", run | {"base": "base", "experts": both}),
        ("tune", tune),
    ):
        (directory / f"{name}.yaml").write_text(json.dumps(content))
    return directory
