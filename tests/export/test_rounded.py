"""Rounded exports in transformers, through the compressed-tensors library: what a text costs there and in octad."""

from pathlib import Path

import pytest
import torch
import transformers
from llama_tools import perplexity_of
from other_engines import save_case, words
from tiny_models import Octad

from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.checkpoint.quantized import QuantizedSource

WINDOW = 64
SIZES = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.05}
EXPERTS = {"moe_intermediate_size": 128}


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "mixtral", "mixture of qwen2", "qwen3_moe"])
def test_perplexity_is_octads(octad: Octad, tmp_path: Path, case: str, quantize: str) -> None:
    """Experts are multiplied in bfloat16 there, hence a thousandth; dense models agree to a hundred-thousandth."""
    own = {"mixture of qwen2": EXPERTS | {"shared_expert_intermediate_size": 128}, "qwen3_moe": EXPERTS}
    path, out = save_case(case, tmp_path / "model", **SIZES | own.get(case, {})), tmp_path / "out"
    code, _, err = octad("export", path, "--to", "compressed-tensors", "--quantize", quantize, "-o", out)
    assert code == 0, err
    ids = load_tokenizer(open_source(path)).encode(words(300))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = load_model(QuantizedSource(out), torch.float32)
    bound = 1e-3 if ours.config.is_moe else 1e-5
    assert perplexity_of(theirs, ids, WINDOW) == pytest.approx(perplexity_of(ours, ids, WINDOW), rel=bound)
