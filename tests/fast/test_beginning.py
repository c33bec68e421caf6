"""Weights that are read before PyTorch is there: the bits of a model that was loaded whole, and nobody else's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, TinyCheckpoint

from octad.checkpoint.load import load_model, open_source
from octad.fast.beginning import Begun, begin
from octad.fast.loading import open_fast
from octad.fast.optimize import native_kernels, optimize

TOKENS = torch.arange(3, 15).view(1, -1)
pytestmark = pytest.mark.skipif(native_kernels() is None, reason="no native kernels on this machine")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS)
    return found


def loaded_whole(path: Path, quantize: str | None) -> torch.Tensor:
    model = load_model(open_source(path), torch.float32)
    optimize(model, quantize=quantize)
    return logits(model)


def inside(begun: Begun, model: torch.nn.Module) -> bool:
    """Whether the first layer's attention lies in the memory that was begun."""
    memory = torch.frombuffer(begun.filling.memory, dtype=torch.uint8)
    weight = model.model.layers[0].self_attn.o.tensors[0]  # type: ignore[union-attr,index]
    return memory.data_ptr() <= weight.data_ptr() < memory.data_ptr() + len(memory)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_same_bits_as_loaded_whole(
    tiny_checkpoint: TinyCheckpoint, family: str, quantize: str | None
) -> None:
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    begun = begin(path, quantize)
    assert begun is not None
    model, _ = open_fast(open_source(path), torch.float32, quantize=quantize, begun=begun)
    begun.stop()
    assert inside(begun, model)
    assert torch.equal(logits(model), loaded_whole(path, quantize))


def test_float32_weights_are_begun_where_they_are_rounded(tiny_checkpoint: TinyCheckpoint) -> None:
    path = tiny_checkpoint("mixtral")
    assert begin(path) is None  # whether they are bfloat16 numbers shows when they are read
    begun = begin(path, "int8")
    assert begun is not None
    model, _ = open_fast(open_source(path), torch.float32, quantize="int8", begun=begun)
    begun.stop()
    assert inside(begun, model)
    assert torch.equal(logits(model), loaded_whole(path, "int8"))


@pytest.mark.parametrize(("begun_as", "asked"), [("int8", "int4"), ("int8", None), (None, "int8")])
def test_what_was_begun_otherwise_is_not_used(
    tiny_checkpoint: TinyCheckpoint, begun_as: str | None, asked: str | None
) -> None:
    path = tiny_checkpoint("mixtral", dtype=torch.bfloat16)
    begun = begin(path, begun_as)
    assert begun is not None
    model, _ = open_fast(open_source(path), torch.float32, quantize=asked, begun=begun)
    begun.stop()
    assert not inside(begun, model)
    assert torch.equal(logits(model), loaded_whole(path, asked))


def test_a_checkpoint_that_was_replaced_meanwhile_is_read_again(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    original = tiny_checkpoint("mixtral", dtype=torch.bfloat16)
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    file, tensors = tmp_path / "model.safetensors", load_file(original / "model.safetensors")
    save_file(tensors, file)
    begun = begin(tmp_path)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "new")
    (tmp_path / "new").replace(file)
    assert begun is not None
    model, _ = open_fast(open_source(tmp_path), torch.float32, begun=begun)
    begun.stop()
    assert not inside(begun, model)
    assert torch.equal(logits(model), loaded_whole(tmp_path, None))


def test_values_that_are_not_finite_are_packed_as_ever(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    original = tiny_checkpoint("llama", dtype=torch.bfloat16)
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    begun = begin(tmp_path, "int8")
    assert begun is not None
    model, _ = open_fast(open_source(tmp_path), torch.float32, quantize="int8", begun=begun)
    begun.stop()
    assert begun.filling.missed == ["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(logits(model).isnan(), loaded_whole(tmp_path, "int8").isnan())


@pytest.mark.parametrize("damage", ["config", "header", "shape", "length", "index", "missing"])
def test_damaged_directories_are_left_to_loading(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, damage: str
) -> None:
    original = tiny_checkpoint("llama", dtype=torch.bfloat16)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_bytes((original / "config.json").read_bytes())
    weights.write_bytes((original / "model.safetensors").read_bytes())
    if damage == "config":
        config.write_text("[" * 100000)
    elif damage == "header":
        weights.write_bytes((9).to_bytes(8, "little") + b"[" * 9)
    elif damage == "shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 64}))
    elif damage == "length":
        weights.write_bytes(weights.read_bytes()[:-4000])
    elif damage == "index":
        weights.unlink()
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    else:
        weights.unlink()
    assert begin(tmp_path) is None
    assert begin(tmp_path, "int5") is None


def test_it_needs_no_pytorch_and_leaves_it_its_openmp(tiny_checkpoint: TinyCheckpoint) -> None:
    """PyTorch's threads and the kernels' are one pool only where both have one OpenMP runtime."""
    path = str(tiny_checkpoint("mixtral", dtype=torch.bfloat16))
    code = f"""
import sys
from octad.fast.beginning import begin
begun = begin({path!r}, "int8")
begun.filling.finish()
assert "torch" not in sys.modules
import torch
runtimes = {{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}}
runtimes = {{name for name in runtimes if name.rpartition("/")[2].startswith(("libgomp", "libomp", "libiomp"))}}
sys.exit(0 if len(runtimes) <= 1 else str(runtimes))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
