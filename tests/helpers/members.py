"""Tiny bases and members for the tests of combine, made by transformers, peft and tokenizers."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from octad.combine.recipe import Recipe

VOCABULARY = 257  # 256 bytes and one control token
FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = ("llama", "mistral", "qwen2", "qwen3")


def exact(*modules: ModuleType) -> Any:
    """A fixture for all tests of a module: these modules of octad compute in float32, on one thread."""

    @pytest.fixture(scope="module", autouse=True)
    def fixture() -> Iterator[None]:
        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as patch:
            for module in modules:
                patch.setattr(module, "compute_dtype", lambda: torch.float32)
            yield

    return fixture


def save_tokenizer(directory: Path, added: tuple[str, ...] = (), swap: bool = False) -> None:
    """A byte-level tokenizer without merges: one token a byte. `swap` gives two ids each other's byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if swap:
        alphabet[0], alphabet[1] = alphabet[1], alphabet[0]
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    core.add_tokens(list(added))
    core.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_base(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """A random dense model with a tokenizer."""
    make_model(family, **({"vocab_size": VOCABULARY} | changes)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def full_member(base: Path, directory: Path, seed: int, *, only: str = "", scale: float = 0.05) -> Path:
    """The base with noise on all weights, or on those whose name contains `only`."""
    shutil.copytree(base, directory)
    torch.manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if only in name:
            tensors[name] = tensor + (torch.randn(tensor.shape) * scale).to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def adapter(base: Path, directory: Path, seed: int, targets: list[str] = FFN) -> Path:
    """A LoRA adapter whose factors are noise, as peft saves it."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.copy_(torch.randn_like(value) * 0.1)
    adapted.save_pretrained(directory)
    return directory


def extended(base: Path, directory: Path, seed: int, added: tuple[str, ...] = ("<x>", "<y>")) -> Path:
    """The base with more tokens: noise rows at the end of embedding and head."""
    full_member(base, directory, seed)
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            rows = torch.randn(len(added), tensors[name].shape[1]).to(tensors[name].dtype)
            tensors[name] = torch.cat((tensors[name], rows))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, vocab_size=VOCABULARY + len(added))
    save_tokenizer(directory, added)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


def text_file(directory: Path, seed: int, documents: int = 6) -> Path:
    """A .jsonl of documents out of a small vocabulary of its own."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(12)]
    lines = [
        json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(8, 30)))}) for _ in range(documents)
    ]
    path = directory / f"text-{seed}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def eight_members(directory: Path, base: Path) -> list[dict[str, Any]]:
    """Entries of a recipe: the base, full members and adapters in turn, each with text."""
    entries = []
    for e in range(8):
        if e == 0:
            model = "base"
        elif e % 3 == 1:
            model = str(full_member(base, directory / f"member-{e}", e, only=".mlp."))
        else:
            model = str(adapter(base, directory / f"member-{e}", e, FFN if e % 3 else FFN + ATTENTION))
        data = str(text_file(directory, e))
        prompts = {"positive_prompts": [f"prompt {e}", "x" * (e + 1)]}
        if e == 2:
            prompts["negative_prompts"] = ["nothing of the kind"]
        entries.append({"name": f"m{e}", "model": model, "data": [data]} | prompts)
    return entries


def make_recipe(base: Path | str, experts: list[dict[str, Any]], **changes: Any) -> Recipe:
    raw = {"base": str(base), "experts": experts, "router": {"tokens": 400, "window": 64}} | changes
    return Recipe.from_dict(raw, Path())
