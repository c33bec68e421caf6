"""llama.cpp runs what is exported, and says about a text what transformers says.

Slow: `make llama` builds its programs (tests/helpers/llama_tools.py). In float32 the two agree to a millionth. Where
weights are in 16 bits or fewer llama.cpp rounds what it multiplies them with too, so there the models are calmer.
"""

import json
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from bundled import smollm2_path
from llama_tools import needs_llama_cpp, perplexity, perplexity_of, run, token_ids
from other_engines import CASES, save_case, words
from vocabularies import TEXTS, sentencepiece

from octad.checkpoint.gguf.reader import GGUFSource
from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.export.gguf_file import write_gguf

pytestmark = [pytest.mark.slow, needs_llama_cpp]
WINDOW = 64
CALM = {"initializer_range": 0.05}
FOUR = ["llama", "mixtral", "mixture of qwen2", "qwen3_moe"]
tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(words(300))
    return file


def theirs(path: Path, text: Path) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(path)(text.read_text())["input_ids"]
    return perplexity_of(model, ids, WINDOW)


def ours(path: Path, text: Path, tokenizer: Path) -> float:
    ids = load_tokenizer(open_source(tokenizer)).encode(text.read_text())
    return perplexity_of(load_model(open_source(path), torch.float32), ids, WINDOW)


@tied_or_not
@pytest.mark.parametrize("case", CASES)
def test_perplexity_is_transformers(text: Path, tmp_path: Path, case: str, tied: bool) -> None:
    path = save_case(case, tmp_path / "model", tie_word_embeddings=tied)
    made = write_gguf(open_source(path), tmp_path / "m.gguf", "f32")
    assert perplexity(made, text, WINDOW) == pytest.approx(theirs(path, text), rel=1e-5)


@tied_or_not
@pytest.mark.parametrize("case", CASES)
def test_perplexity_in_bfloat16(text: Path, tmp_path: Path, case: str, tied: bool) -> None:
    path = save_case(case, tmp_path / "model", tie_word_embeddings=tied, **CALM)
    made = write_gguf(open_source(path), tmp_path / "m.gguf", "bf16")
    assert perplexity(made, text, WINDOW) == pytest.approx(theirs(path, text), rel=1e-3)


@pytest.mark.parametrize("case", FOUR)
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_rounded_weights_are_read_as_octad_reads_them(
    text: Path, tmp_path: Path, case: str, kind: str
) -> None:
    path = save_case(case, tmp_path / "model", **CALM)
    made = write_gguf(open_source(path), tmp_path / "m.gguf", kind)
    found = perplexity(made, text, WINDOW)
    assert found == pytest.approx(ours(made, text, path), rel=1e-3 if kind == "f16" else 1e-2)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K"])
def test_llama_quantize_takes_the_file(text: Path, tmp_path: Path, kind: str) -> None:
    """K-quants come in blocks of 256, so the model is wider; what they wrote is read by octad."""
    path = save_case("mixtral", tmp_path / "model", hidden_size=256, intermediate_size=256, **CALM)
    whole = write_gguf(open_source(path), tmp_path / "m.gguf", "bf16")
    made = tmp_path / "k.gguf"
    run("llama-quantize", whole, made, kind)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(made).tensors}
    assert any(name.endswith("_K") for name in types)
    assert perplexity(made, text, WINDOW) == pytest.approx(ours(made, text, path), rel=1e-2)


@pytest.mark.parametrize("case", FOUR)
def test_their_file_goes_in_and_out_again(text: Path, tmp_path: Path, case: str) -> None:
    path = save_case(case, tmp_path / "model")
    made = write_gguf(open_source(path), tmp_path / "m.gguf", "f32")
    again = write_gguf(GGUFSource(made, exact=True), tmp_path / "again.gguf", "f32")
    assert perplexity(again, text, WINDOW) == perplexity(made, text, WINDOW)


AWKWARD = [*TEXTS, json.dumps({"a": [1, 2.5e-3], "b": "\t\\n"}), "  \n\n 12345 x-=y**2;  // ¿ñ? — „so“"]


@pytest.mark.parametrize("name", ["smollm2", "sentencepiece"])
def test_real_vocabularies_give_the_same_ids(tmp_path: Path, name: str) -> None:
    if name == "smollm2":
        made = write_gguf(open_source(smollm2_path()), tmp_path / "m.gguf", "q8_0")
    else:
        path = save_case("llama", tmp_path / "model", vocab_size=sentencepiece().vocab_size)
        sentencepiece().save(path)
        made = write_gguf(open_source(path), tmp_path / "m.gguf", "f32")
    tokenizer = load_tokenizer(open_source(made))
    for text in AWKWARD:
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        wanted = tokenizer.encode(text, add_special_tokens=True)
        assert token_ids(made, tmp_path / "text.txt") == wanted, text
