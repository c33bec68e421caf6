"""Routing against arithmetic by hand, and against the router logits of transformers."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tiny import byte_tokenizer, load
from tiny_models import MOE, TinyCheckpoint

from octad.evaluate.routing import collect_routing, typical_tokens
from octad.model.config import ModelConfig
from octad.model.moe import FixedRouter
from octad.model.transformer import Transformer
from octad.text.tokenizer import Tokenizer
from octad.text.windows import Window

# p[token][expert] of the first layer; the second has the experts the other way round
PROBABILITIES = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.8, 0.15, 0.05], [0.25, 0.7, 0.05]]
NAMES = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def words() -> Tokenizer:
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(("a", "b", "c", "d"))}, "a")
    )
    return Tokenizer(core, {}, [])


def by_hand(top_k: int) -> Transformer:
    """A model whose residual stream is the token's own one-hot vector in every layer: attention and experts add nothing,
    so a router reads 2 e_t (the norm of a one-hot vector of 4 doubles it) and answers the softmax of 2 W[:, t]."""
    raw = {
        "model_type": "mixtral",
        "vocab_size": 4,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": top_k,
        "rms_norm_eps": 1e-12,
    }
    model = Transformer(ModelConfig.from_dict(raw)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(4))
        logits_ET = torch.tensor(PROBABILITIES).log().T / 2
        for layer, weight in zip(model.model.layers, (logits_ET, logits_ET.flip(0)), strict=True):
            layer.mlp.gate.weight.copy_(weight)
            layer.mlp.experts.down_proj.copy_(torch.randn(3, 4, 4))  # of zeros: the output stays zero
    return model


def window(*ids: int) -> Window:
    return Window(ids, len(ids) - 1, 0)


def entropy(*tokens: int) -> float:
    return sum(-sum(p * math.log(p) for p in PROBABILITIES[t]) for t in tokens) / len(tokens)


def test_two_layers_by_hand() -> None:
    # padding is token 0, so a wrong mask would show in every figure
    texts = {"red": [window(1, 1), window(2, 3, 2, 3, 3)], "other": [window(0, 2)]}
    routing = collect_routing(by_hand(2), words(), texts, NAMES, example_tokens=4)
    assert routing is not None
    assert (routing["experts"], routing["layers"]) == (NAMES, [0, 1])
    # tokens 1 1 2 2 3 3 3: 1 takes green, blue; 2 red, green; 3 green, red
    red, green, blue = 5 / 14, 7 / 14, 2 / 14
    near = pytest.approx
    assert routing["share"]["red"] == [near([red, green, blue], abs=1e-6), near([blue, green, red], abs=1e-6)]
    assert routing["share"]["other"] == [near([0.5, 0.5, 0.0]), near([0.0, 0.5, 0.5])]
    assert routing["entropy"]["red"] == near([entropy(1, 1, 2, 2, 3, 3, 3)] * 2, abs=1e-5)
    assert routing["entropy"]["other"] == near([entropy(0, 2)] * 2, abs=1e-5)
    first = {0: 0.5 / 0.8, 1: 0.6 / 0.9, 2: 0.8 / 0.95, 3: 0.7 / 0.95}  # renormalised over the best two
    assert routing["confidence"]["red"] == near(
        [(2 * first[1] + 2 * first[2] + 3 * first[3]) / 7] * 2, abs=1e-5
    )
    assert routing["own_first"] == {
        "red": near([2 / 7, 0.0], abs=1e-6)
    }  # token 2; no expert is called "other"
    assert routing["dead"] == []
    (example, other) = routing["examples"]
    assert [t["text"] for t in example["tokens"]] == ["b", " b"]
    assert [t["speaker"] for t in example["tokens"]] == [1, 1]
    assert [t["weight"] for t in example["tokens"]] == near([first[1]] * 2, abs=1e-5)
    # token 0 gives red 0.625, green 0.375 + 0.375, blue 0.625; token 2 red and blue 0.842 each, and the first speaks
    assert (other["domain"], [t["speaker"] for t in other["tokens"]]) == ("other", [1, 0])
    assert [t["weight"] for t in other["tokens"]] == near([0.75 / 2, first[2] / 2], abs=1e-5)


def test_own_experts_can_be_named() -> None:
    texts = {"red": [window(2, 2)], "other": [window(1, 1)]}
    routing = collect_routing(by_hand(2), words(), texts, NAMES, own={"other": "green", "third": "blue"})
    assert routing is not None
    assert routing["own_first"] == {"other": [1.0, 1.0]}


def test_top_1_leaves_experts_dead() -> None:
    routing = collect_routing(by_hand(1), words(), {"one": [window(0, 2, 2)]}, NAMES)
    assert routing is not None
    assert routing["share"]["one"] == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert routing["confidence"]["one"] == [1.0, 1.0]
    assert routing["own_first"] == {}
    dead = {(d["layer"], d["expert"]) for d in routing["dead"]}
    assert dead == {(0, "green"), (0, "blue"), (1, "red"), (1, "green")}


def test_a_fixed_router_has_its_own_weights() -> None:
    model = by_hand(2)
    for layer in model.model.layers:
        layer.mlp.gate = FixedRouter([2, 0], [0.75, 0.25])
    routing = collect_routing(model, words(), {"blue": [window(0, 1, 2)]}, NAMES)
    assert routing is not None
    assert routing["confidence"]["blue"] == [0.75, 0.75]
    assert routing["own_first"]["blue"] == [1.0, 1.0]
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert routing["entropy"]["blue"] == pytest.approx([expected] * 2, abs=1e-5)


def test_typical_tokens_by_hand() -> None:
    spoken = Counter({(0, 0): 8, (0, 1): 2, (1, 0): 4, (1, 1): 16, (2, 0): 4, (3, 0): 3, (3, 1): 3})
    # 40 tokens, of which red speaks 19 and green 21
    found = typical_tokens(spoken, words(), ["red", "green"], 5, 4)
    red, green = 19 / 40, 21 / 40
    assert found == {
        "red": [
            {"text": "c", "count": 4, "lift": round(1.0 / red, 4)},  # (4 + 4 red) / 8 is more
            {"text": "a", "count": 8, "lift": round(0.8 / red, 4)},  # than (8 + 4 red) / 14
        ],
        "green": [{"text": "b", "count": 16, "lift": round(0.8 / green, 4)}],
    }
    assert typical_tokens(spoken, words(), ["red", "green"], 1, 5)["red"][0]["text"] == "a"
    assert typical_tokens({}, words(), ["red"], 5, 1) == {"red": []}
    often = Counter({(0, 0): 99, (0, 1): 1, (1, 0): 5, (2, 1): 895})
    assert [t["text"] for t in typical_tokens(often, words(), ["red", "green"], 5, 4)["red"]] == ["a", "b"]


def their_routing(directory: Path, windows: list[Window]) -> dict[str, list[Any]]:
    """Share, entropy, confidence and first choices by layer, from transformers' router logits, each window alone."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layers: list[list[torch.Tensor]] = []
    for w in windows:
        with torch.no_grad():
            out = theirs(torch.tensor([w.ids]), output_router_logits=True).router_logits
        layers.append([r for r in out if r is not None and r.dim() == 2])
    found: dict[str, list[Any]] = {"share": [], "entropy": [], "confidence": [], "first": []}
    for logits in (torch.cat(parts).double() for parts in zip(*layers, strict=True)):
        p = logits.softmax(-1)
        weights, experts = p.topk(2)
        if getattr(theirs.config, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        found["share"].append((torch.bincount(experts.flatten(), minlength=3) / experts.numel()).tolist())
        found["entropy"].append(float(torch.distributions.Categorical(probs=p).entropy().mean()))
        found["confidence"].append(float(weights[:, 0].mean()))
        found["first"].append(float((experts[:, 0] == 1).double().mean()))
    return found


@pytest.mark.parametrize("family", MOE)
def test_routing_is_that_of_transformers(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint(family)
    draw = torch.Generator().manual_seed(3)
    lengths = (17, 40, 5, 33)
    windows = [window(*torch.randint(0, 95, (n,), generator=draw).tolist()) for n in lengths]
    names = ["expert 0", "mine", "expert 2"]
    done: list[int] = []
    routing = collect_routing(
        load(directory), byte_tokenizer(), {"mine": windows}, names, tokens_per_batch=80, progress=done.append
    )
    assert routing is not None
    assert sum(done) == sum(lengths)
    expected = their_routing(directory, windows)
    assert routing["layers"] == list(range(2 - len(expected["share"]), 2))
    for key, own in (("entropy", "entropy"), ("confidence", "confidence"), ("own_first", "first")):
        assert routing[key]["mine"] == pytest.approx(expected[own], abs=2e-5), key
    for ours, theirs in zip(routing["share"]["mine"], expected["share"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert "".join(t["text"] for t in routing["examples"][0]["tokens"]) == byte_tokenizer().decode(
        windows[0].ids
    )


def test_a_dense_model_has_no_routing(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("llama"))
    assert collect_routing(model, byte_tokenizer(), {"one": [window(1, 2)]}, []) is None


def test_names_must_fit(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("mixtral"))
    with pytest.raises(ValueError, match="2 names for 3 experts"):
        collect_routing(model, byte_tokenizer(), {}, ["a", "b"])


def test_no_observer_stays(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("mixtral"))
    collect_routing(model, byte_tokenizer(), {"one": [window(1, 2)]}, ["a", "b", "c"])
    assert not any(module._forward_hooks for module in model.modules())
