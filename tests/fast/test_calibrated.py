"""Rounding for text, layer by layer: every weight once, and outputs nearer to the original's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer
from tiny_models import TinyCheckpoint

from octad.checkpoint.load import load_model, open_source
from octad.checkpoint.names import is_attention, is_linear, tensor_plan
from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.fast.calibrated import calibrated
from octad.fast.held import load_quantized
from octad.fast.precision import Precision
from octad.fast.saved import plan_schemes, save_quantized
from octad.kernels.packed import dequantize, quantize
from octad.text.windows import Window

OWN = {
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "llama": {"mlp_bias": True},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def original(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Any:
    def make(family: str) -> TensorSource:
        sizes = {"hidden_size": 64, "intermediate_size": 128}
        made = tiny_checkpoint(family, **sizes | OWN.get(family, {}))
        path = Path(shutil.copytree(made, tmp_path / f"{family}-original"))
        byte_tokenizer().save(path)
        return open_source(path)

    return make


def text(source: TensorSource, seed: int, windows: int = 12) -> list[Window]:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(source.config.vocab_size, (30 + n,), generator=draw) for n in range(windows)]
    return [Window(tuple(row.tolist()), 0, n) for n, row in enumerate(ids)]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "llama"])
def test_every_weight_of_the_feed_forward_nets_once(original: Any, family: str) -> None:
    source = original(family)
    schemes = plan_schemes(source.config, Precision.of("int4"), "tiny")
    seen = list[float]()
    found = list(calibrated(source, schemes, text(source, 0), seen.append))
    plan = tensor_plan(source.config)
    expected = [name for name in plan if is_linear(name) and not is_attention(name)]
    assert sorted(name for name, _, _ in found) == sorted(expected)
    assert seen[-1] == 1.0
    assert len(seen) == source.config.num_hidden_layers
    for name, raw, scales in found:
        assert raw.shape == plan[name]
        assert scales.shape == (plan[name][0], plan[name][1] // 32)
        near = dequantize(raw, scales, 4) - source.read(name).float()
        plain = dequantize(*quantize(source.read(name), 4, 32), 4) - source.read(name).float()
        assert near.norm() < 2 * plain.norm()  # still that weight
    again = calibrated(source, schemes, text(source, 0))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "llama"])
def test_the_model_stays_nearer_to_the_original(original: Any, family: str, tmp_path: Path) -> None:
    source = original(family)
    exact = load_model(source, torch.float32)
    tokens = torch.tensor([w.ids[:30] for w in text(source, 1)])  # other text
    off = {}
    for name, windows in (("nearest", []), ("fitted", text(source, 0, 60))):
        path = save_quantized(source, tmp_path / name, "int4", windows=windows)
        model = load_quantized(QuantizedSource(path), torch.float32)
        off[name] = (model.model(tokens) - exact.model(tokens)).detach().square().mean()
        card = (path / "README.md").read_text()
        assert ("tokens of text (GPTQ)" in card) == (name == "fitted")
    assert off["fitted"] < off["nearest"]
