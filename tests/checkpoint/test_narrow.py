"""Weights in a narrower type: what it cannot hold is refused, as numpy says what that is."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer
from tiny_models import Octad, TinyCheckpoint

from octad.checkpoint.load import load_model, open_source
from octad.checkpoint.narrow import lost_below, narrowed
from octad.errors import CheckpointError

NAME = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    made = tiny_checkpoint("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96)
    path = Path(shutil.copytree(made, tmp_path / "model"))
    byte_tokenizer().save(path)
    return path


def scaled(model: Path, factor: float) -> Path:
    """The model with one tensor times this."""
    tensors = load_file(model / "model.safetensors")
    tensors[NAME] = tensors[NAME] * factor
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6, 1e-7, 1e-9])
def test_what_is_lost_below(size: float) -> None:
    before = torch.randn(5000, generator=torch.Generator().manual_seed(1)).mul(size).bfloat16()
    theirs = before.float().numpy().astype(np.float16).astype(np.float64)
    wide = before.double().numpy()
    error = np.linalg.norm(theirs - wide) / np.linalg.norm(wide)
    line = lost_below(before, before.half())
    assert (line is not None) == (error > 0.01)
    if line and np.mean(theirs == 0) <= 0.1:
        assert f"changes them by {100 * error:.1f} %" in line


def test_a_few_small_weights_are_none_that_count() -> None:
    values = torch.cat((torch.ones(95), torch.full((5,), 1e-9)))
    assert lost_below(values, values.half()) is None
    assert lost_below(torch.zeros(9), torch.zeros(9).half()) is None


def test_types_that_hold_everything_are_not_looked_at() -> None:
    values = torch.tensor([1e-9, 3e38])
    assert torch.equal(narrowed(values, torch.float64, "x"), values.double())
    assert narrowed(values, None, "x") is values
    with pytest.raises(CheckpointError, match=r"x: has values up to 1e\+300, float32 ends at"):
        narrowed(torch.tensor([1e300], dtype=torch.float64), torch.float32, "x")


@pytest.mark.parametrize(("factor", "words"), [(1e-8, "so small that float16"), (1e9, "float16")])
def test_refused_wherever_float16_is_asked_for(
    model: Path, tmp_path: Path, octad: Octad, factor: float, words: str
) -> None:
    scaled(model, factor)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(open_source(model), torch.float16)
    assert NAME in str(caught.value)
    for form in (["--dtype", "float16"], ["--to", "gguf", "--quantize", "f16"]):
        code, _, err = octad("export", model, *form, "-o", tmp_path / "out.gguf")
        assert code == 2
        assert NAME in err
        assert words in err
        assert not (tmp_path / "out.gguf").exists()


def test_scales_are_float16_too(model: Path, tmp_path: Path, octad: Octad) -> None:
    """A block of q8_0 has one scale in float16: weights of 1e8 would come back infinite."""
    code, _, err = octad(
        "export", scaled(model, 1e9), "--to", "gguf", "--quantize", "q8_0", "-o", tmp_path / "out.gguf"
    )
    assert (code, "beyond float16's range" in err) == (2, True)


def test_what_becomes_nothing_is_counted(model: Path, tmp_path: Path, octad: Octad) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[NAME][0, :3] = 1e-9
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    code, out, _ = octad("export", model, "--dtype", "float16", "-o", tmp_path / "out")
    assert code == 0
    half = load_file(tmp_path / "out" / "model.safetensors")
    gone = sum(int(((half[name] == 0) & (tensors[name] != 0)).sum()) for name in tensors)
    assert gone >= 3
    assert f"{gone} are too small for it, and 0 now" in " ".join(out.split())
