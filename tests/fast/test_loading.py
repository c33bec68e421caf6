"""Loading expert by expert: the bits of a model that was loaded whole, without ever holding it."""

import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer
from tiny_models import FAMILIES, TinyCheckpoint

from octad.checkpoint.load import load_model, open_source
from octad.checkpoint.source import TensorSource
from octad.errors import RequestError
from octad.fast.held import load_quantized
from octad.fast.loading import open_fast
from octad.fast.native_layer import NativeLayer
from octad.fast.optimize import native_kernels, optimize
from octad.fast.saved import save_quantized

TOKENS = torch.arange(3, 15).view(1, -1)
SIZES = {"hidden_size": 64, "intermediate_size": 128}
needs_kernels = pytest.mark.skipif(native_kernels() is None, reason="no native kernels on this machine")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS)
    return found


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_same_bits_as_loaded_whole(
    tiny_checkpoint: TinyCheckpoint, family: str, quantize: str | None
) -> None:
    source = open_source(tiny_checkpoint(family))
    whole = load_model(source, torch.float32)
    optimize(whole, quantize=quantize)
    streamed, _ = open_fast(source, torch.float32, quantize=quantize)
    assert all(isinstance(layer, NativeLayer) for layer in streamed.model.layers)
    assert torch.equal(logits(streamed), logits(whole))


@needs_kernels
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_rounded_checkpoint_keeps_its_integers(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    original = tiny_checkpoint("mixtral", **SIZES, dtype=torch.bfloat16)
    copy = Path(shutil.copytree(original, tmp_path / "whole"))
    byte_tokenizer().save(copy)
    source = open_source(save_quantized(open_source(copy), tmp_path / name, name), quantised=True)
    whole = load_quantized(source, torch.float32)  # type: ignore[arg-type]
    optimize(whole)
    assert torch.equal(logits(open_fast(source, torch.float32)[0]), logits(whole))
    with pytest.raises(RequestError, match=f"is {name} already"):
        open_fast(source, quantize="int4" if name == "int8" else "int8")


class Watched:
    """A source that knows how many bytes of what it gave out still live."""

    def __init__(self, source: TensorSource) -> None:
        self.source, self.live, self.most = source, 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self.source.read(name).clone()
        size = tensor.numel() * tensor.element_size()
        self.live += size
        self.most = max(self.most, self.live if "experts" in name else 0)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.live -= size


@needs_kernels
def test_experts_are_read_one_by_one(tiny_checkpoint: TinyCheckpoint) -> None:
    """While experts are read, what lives of all that was read is less than one layer's experts: two projections and the
    few small tensors that stay (norms and embeddings)."""
    source = open_source(
        tiny_checkpoint("mixtral", num_local_experts=8, intermediate_size=512, dtype=torch.bfloat16)
    )
    watched = Watched(source)
    open_fast(watched, torch.float32)  # type: ignore[arg-type]
    config = source.config
    projection = config.hidden_size * config.intermediate_size * 2
    assert 0 < watched.most < 8 * 3 * projection
    assert watched.most <= 4 * projection


def test_no_compiler_of_pytorchs_is_loaded(tiny_checkpoint: TinyCheckpoint) -> None:
    """Importing it takes seconds."""
    code = (
        "import sys, torch; from octad.checkpoint.load import load_model, open_source;"
        f"load_model(open_source({str(tiny_checkpoint('mixtral'))!r}), torch.float32);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bfloat16_embeddings_stay_so_and_give_the_same_rows(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    source = open_source(tiny_checkpoint("mixtral", dtype=torch.bfloat16))
    model, _ = open_fast(source, torch.float32)
    ids = torch.arange(source.config.vocab_size)[None]
    rows = model.model.embed_tokens(ids)
    assert rows.dtype == torch.float32
    assert torch.equal(rows[0], source.read("model.embed_tokens.weight").float())
    if native_kernels() is not None:
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
