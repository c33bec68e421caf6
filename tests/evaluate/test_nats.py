"""Losses against those of transformers, window by window."""

import math
from pathlib import Path

import pytest
import torch
from judging import their_nats, theirs
from tiny_models import FAMILIES, TinyCheckpoint

from octad.checkpoint.load import load_model, open_source
from octad.evaluate import nats as loss
from octad.evaluate.nats import bits_per_byte, nats_per_token, window_nats
from octad.text.windows import Window


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def windows(lengths: tuple[int, ...] = (5, 40, 2, 17, 64, 40), vocabulary: int = 96) -> list[Window]:
    draw = torch.Generator().manual_seed(0)
    return [
        Window(tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()), 3 * n, d)
        for d, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_transformers(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint(family)
    found = window_nats(load_model(open_source(directory), torch.float32), windows(), tokens_per_batch=100)
    assert found == pytest.approx(their_nats(theirs(directory), windows()), rel=1e-4)


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 4096])
@pytest.mark.parametrize("head_bytes", [1, 7 * 4 * 96, 1 << 20])
def test_batches_and_slices_change_nothing(
    tokens_per_batch: int, head_bytes: int, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(open_source(tiny_checkpoint("qwen3_moe")), torch.float32)
    expected = [window_nats(model, [w])[0] for w in windows()]
    monkeypatch.setattr(loss, "HEAD_BYTES", head_bytes)
    seen: list[int] = []
    found = window_nats(model, windows(), tokens_per_batch=tokens_per_batch, progress=seen.append)
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(seen) == sum(len(w.ids) for w in windows())


def test_equal_windows_count_each(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_model(open_source(tiny_checkpoint("llama")), torch.float32)
    (window,) = windows((20,))
    same = Window(window.ids, window.predicted_bytes, 9)
    found = window_nats(model, [window, same, window])
    assert len(found) == 3
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_units_by_hand() -> None:
    """Certainty 1/4 for each of 3 tokens that stand for 12 bytes: 6 bits, half a bit a byte."""
    nats = [2 * math.log(4), math.log(4)]
    two = [Window((1, 2, 3), 8, 0), Window((1, 2), 4, 1)]
    assert bits_per_byte(nats, two) == pytest.approx(0.5)
    assert nats_per_token(nats, two) == pytest.approx(math.log(4))


def test_a_model_that_knows_nothing(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    """All weights zero: ln V nats a token, whatever the text."""
    model = load_model(open_source(tiny_checkpoint("llama")), torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert nats_per_token(window_nats(model, windows()), windows()) == pytest.approx(math.log(96), rel=1e-6)
