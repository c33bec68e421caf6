"""Tiny random mixtures that hold conversations: a token is a byte, there is a chat template, experts have names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from members import save_tokenizer
from tiny_models import TinyCheckpoint

from octad.engine.llm import LLM

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES = ["general", "french", "maths"]
CONTEXT = 384


def make_mixture(source: Path, directory: Path, template: str | None = TEMPLATE) -> Path:
    """A copy of a tiny model with what a conversation needs."""
    shutil.copytree(source, directory)
    save_tokenizer(directory)
    experts = [{"name": name, "kind": "full", "exact": True} for name in NAMES]
    (directory / "octad.json").write_text(json.dumps({"experts": experts}))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return directory


@pytest.fixture(scope="session")
def mixture(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_checkpoint("mixtral", vocab_size=257, max_position_embeddings=CONTEXT)
    return make_mixture(source, tmp_path_factory.mktemp("chat") / "mixture")


@pytest.fixture(scope="session")
def untaught(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model without a chat template."""
    source = tiny_checkpoint("llama", vocab_size=257)
    directory = make_mixture(source, tmp_path_factory.mktemp("chat") / "untaught", template=None)
    (directory / "octad.json").unlink()
    return directory


@pytest.fixture
def llm(mixture: Path) -> LLM:
    torch.set_num_threads(1)
    return LLM(mixture, dtype="float32", device="cpu")
