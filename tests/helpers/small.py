"""What the training tests share: a character tokenizer with a chat template, and text that can be learnt."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import yaml

from octad.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def character_tokenizer(size: int = 96) -> Tokenizer:
    """`size` - 1 characters of the byte alphabet and one end token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    return Tokenizer(core, {"eos_token": "<|end|>", "chat_template": TEMPLATE}, [size - 1])


def texts(count: int, seed: int = 0, words: tuple[str, ...] = ("abba", "cd", "efgh", "xyz")) -> list[str]:
    """Documents of 5 to 60 words."""
    draw = random.Random(seed)
    return [".".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(count)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    """A file of one JSON value a line; a string stands for {"text": string}."""
    lines = [json.dumps({"text": row} if isinstance(row, str) else row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def checkpoint(made: Path, target: Path) -> Path:
    """A copy of a tiny checkpoint, with a tokenizer."""
    shutil.copytree(made, target)
    character_tokenizer().save(target)
    return target


def tune_file(directory: Path, model: Path, **changes: Any) -> Path:
    """tune.yaml over two domains of text beside it."""
    for n, name in enumerate(("one", "two")):
        if not (directory / f"{name}.jsonl").exists():
            jsonl(directory / f"{name}.jsonl", texts(60, n))
    sources = [{"name": name, "data": f"{name}.jsonl"} for name in ("one", "two")]
    config = {
        "task": "tune",
        "model": str(model),
        "steps": 8,
        "dtype": "float32",
        "batch": {"windows": 4, "micro": 2},
        "schedule": {"warmup": 2},
        "data": {"window": 32, "cache": str(directory / "cache"), "sources": sources},
    }
    path = directory / f"tune{len(list(directory.glob('tune*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path
