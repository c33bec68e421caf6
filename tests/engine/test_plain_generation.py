"""Generation against transformers' own, and its limits."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from plain_generation import choose, generate, routing_weight
from tiny_models import TinyCheckpoint

from octad.checkpoint.load import load_model, open_source
from octad.errors import DataError
from octad.evaluate.contestants import Member, contestant, moe_layers
from octad.model.moe import FixedRouter
from octad.model.transformer import Transformer

PROMPT = [3, 14, 15, 92, 65, 35]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(directory: Path) -> Transformer:
    return load_model(open_source(directory), torch.float32)


def ids(model: Transformer, prompt: list[int] = PROMPT, **options: object) -> list[int]:
    return [t.id for t in generate(model, prompt, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen2_moe"])
def test_greedy_is_that_of_transformers(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    out = theirs.generate(
        torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ids(load(directory), max_tokens=40) == out[0, len(PROMPT) :].tolist()


def test_an_end_token_stops_and_is_not_told(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("llama"))
    free = ids(model, max_tokens=20)
    end = free[5]
    assert ids(model, max_tokens=20, eos_ids=[end, 95]) == free[: free.index(end)]
    assert ids(model, max_tokens=20, eos_ids=[free[0]]) == []


def test_prompts_that_cannot_be(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("llama"))
    with pytest.raises(DataError, match="prompt is empty"):
        ids(model, [])
    for length in (128, 500):
        with pytest.raises(DataError, match=f"{length} tokens, the model's context is 128"):
            ids(model, [1] * length)


def test_the_context_is_the_limit(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("llama"))
    assert len(ids(model, [1] * 127, max_tokens=50)) == 1
    assert len(ids(model, [1] * 100, max_tokens=50)) == 28


def test_a_seed_repeats_itself(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("mixtral"))
    one = ids(model, temperature=1.5, seed=1, max_tokens=20)
    torch.manual_seed(99)  # the draw is its own
    assert ids(model, temperature=1.5, seed=1, max_tokens=20) == one
    assert ids(model, temperature=1.5, seed=2, max_tokens=20) != one
    assert ids(model, temperature=1.5, top_p=1e-6, max_tokens=20) == ids(model, max_tokens=20)


def test_draws_follow_the_distribution() -> None:
    """transformers' warpers give the probabilities; 4,000 draws are near them, none outside the nucleus."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    warped = transformers.TopPLogitsWarper(0.8)(
        None, transformers.TemperatureLogitsWarper(0.7)(None, logits[None])
    )
    expected = warped[0].softmax(-1)
    draw = torch.Generator().manual_seed(0)
    found = torch.bincount(torch.tensor([choose(logits, 0.7, 0.8, draw) for _ in range(4000)]), minlength=12)
    assert not found[expected == 0].any()
    torch.testing.assert_close(found / 4000, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_speaker_is_the_expert_with_most_weight(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """From transformers' router logits at the position before each token."""
    directory = tiny_checkpoint(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = list(generate(load(directory), PROMPT, max_tokens=12))
    whole = [*PROMPT, *(t.id for t in tokens)]
    with torch.no_grad():
        routers = theirs(torch.tensor([whole]), output_router_logits=True).router_logits
    shares = torch.zeros(len(whole), 3)
    for logits in routers:
        if logits is None or logits.dim() != 2:
            continue
        weights, experts = logits.float().softmax(-1).topk(2)
        if getattr(theirs.config, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        shares.scatter_add_(1, experts, weights)
    expected = shares[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert [t.speaker for t in tokens] == expected


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_a_router_that_wants_one_expert(expert: int, tiny_checkpoint: TinyCheckpoint) -> None:
    """Top-1 with a row that always wins: it speaks, and the text is that of the model forced to it."""
    model = load(tiny_checkpoint("mixtral"))
    with contestant(model, Member(expert)):
        forced = ids(model, max_tokens=12)
        assert isinstance(moe_layers(model)[0][1].gate, FixedRouter)
    for _, moe in moe_layers(model):
        moe.gate.top_k = 1
        moe.gate.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
        with torch.no_grad():
            moe.gate.weight.fill_(-1.0)
            moe.gate.weight[expert] = 1.0
    tokens = list(generate(model, PROMPT, max_tokens=12))
    assert {t.speaker for t in tokens} == {expert}
    assert [t.id for t in tokens] == forced


def test_a_dense_model_has_no_speaker(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    model = load(Path(shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "m")))
    assert {t.speaker for t in generate(model, PROMPT, max_tokens=4)} == {None}


def test_shares_sum_to_the_layers(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("mixtral"))
    with torch.inference_mode(), routing_weight(model) as shares:
        model.model(torch.tensor([PROMPT]))
    assert float(shares.sum()) == pytest.approx(2.0)
    kept = shares.clone()
    with torch.inference_mode():
        model.model(torch.tensor([PROMPT]))
    assert torch.equal(shares, kept)
