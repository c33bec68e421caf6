"""compare against distances worked out on whole state dicts; what is read, and when; what is refused."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import MOE, TinyCheckpoint
from upcycled import Recording, Upcycle, upcycled

from octad.checkpoint.distance import CHUNK, pair_squares, squares_to
from octad.checkpoint.hf import SafetensorsSource
from octad.checkpoint.inspect import inspect
from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.names import PARTS, expert_name, layer_of, router_name
from octad.errors import CheckpointError

E, L = 3, 2
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def upcycle(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Upcycle:
    return functools.partial(upcycled, tiny_checkpoint, tmp_path)


def state(source: SafetensorsSource) -> Tensors:
    return {name: source.read(name).double() for name in source.names()}


def ffn(tensors: Tensors, layer: int, expert: int | None, family: str = "mixtral") -> torch.Tensor:
    """Gate, up and down of one net, as one long vector."""
    dense = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in PARTS]
    names = dense if expert is None else [expert_name(family, layer, expert, p) for p in PARTS]
    return torch.cat([tensors[name].flatten() for name in names])


# ---- distances ----------------------------------------------------------------------------------------------


def test_distances_are_those_of_whole_state_dicts(upcycle: Upcycle) -> None:
    mixture, base = upcycle([0.01, 0.02, 0.03])
    found = inspect(mixture, base).comparison
    assert found is not None
    ours, theirs = state(mixture), state(base)
    for e, expert in enumerate(found.experts):
        pairs = [(ffn(ours, layer, e), ffn(theirs, layer, None)) for layer in range(L)]
        expected = [float((a - b).norm() / b.norm()) for a, b in pairs]
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
        assert expert.layers == pytest.approx(expected, rel=1e-4)
        assert expert.mean == pytest.approx(sum(expected) / L, rel=1e-4)
        assert expert.mean == pytest.approx([0.01, 0.02, 0.03][e], rel=1e-4)
        assert expert.cosine == pytest.approx(sum(cosines) / L, abs=1e-6)
        for other in range(E):
            vectors = [(ffn(ours, layer, e), ffn(ours, layer, other)) for layer in range(L)]
            between = [(a - b).norm() / ((a.norm() ** 2 + b.norm() ** 2) / 2).sqrt() for a, b in vectors]
            assert found.pairs[e][other] == pytest.approx(float(sum(between)) / L, rel=1e-4)
    assert found.shared == {"embeddings": 0, "norms": 0, "attention": 0}
    assert found.near_copies == ()
    assert found.verdict == "every expert is within 3 % of base: upcycled from it"


def test_a_mixture_of_copies(upcycle: Upcycle) -> None:
    mixture, base = upcycle([0.0, 0.0, 0.0])
    found = inspect(mixture, base).comparison
    assert found is not None
    assert all(expert.layers == (0, 0) for expert in found.experts)
    assert [expert.cosine for expert in found.experts] == pytest.approx([1, 1, 1])
    assert found.pairs == ((0, 0, 0),) * E
    assert [(c.first, c.second, c.distance, c.equal) for c in found.near_copies] == [
        (0, 1, 0, True),
        (0, 2, 0, True),
        (1, 2, 0, True),
    ]
    assert found.verdict == "every expert is equal to base: copied from it"


def test_near_copies_are_told_from_equal_ones(upcycle: Upcycle) -> None:
    mixture, base = upcycle([0.0, 1e-4, 0.02])
    found = inspect(mixture, base).comparison
    assert found is not None
    assert [(c.first, c.second, c.equal) for c in found.near_copies] == [(0, 1, False)]
    assert found.near_copies[0].distance == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("noise", "verdict"),
    [
        ([0.0, 0.0234, 0.01], "every expert is within 2.4 % of base: upcycled from it"),
        (
            [0.02, 0.0, 3.0],
            "2 of 3 experts are within 2 % of base, the others at a distance of 3.0 or more: "
            "upcycled from it only in part",
        ),
        ([1.0, 1.0, 1.0], "far from base (distance about 1.0), but of one origin (cosine 0.7"),
    ],
)
def test_verdicts(noise: list[float], verdict: str, upcycle: Upcycle) -> None:
    found = inspect(*upcycle(noise)).comparison
    assert found is not None
    assert found.verdict.startswith(verdict)


def test_a_random_mixture_is_unrelated(tiny_checkpoint: TinyCheckpoint) -> None:
    mixture = SafetensorsSource(tiny_checkpoint("mixtral"))
    found = inspect(mixture, SafetensorsSource(tiny_checkpoint("llama"), "base")).comparison
    assert found is not None
    assert found.verdict == "unrelated to base (distance about 1.4)"
    assert all(expert.mean == pytest.approx(math.sqrt(2), rel=0.05) for expert in found.experts)
    assert found.pairs[0][1] == pytest.approx(math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("family", MOE)
def test_a_mixture_against_itself_and_another(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """Expert e beside expert e; routers and shared experts count as parts of their own."""
    source, other = (
        SafetensorsSource(tiny_checkpoint(family, dtype=d)) for d in (torch.float32, torch.bfloat16)
    )
    same = inspect(source, source).comparison
    assert same is not None
    assert all(expert.mean == 0 for expert in same.experts)
    found = inspect(source, other).comparison
    assert found is not None
    sparse = [1] if family == "qwen3_moe" else [0, 1]
    assert found.layers == tuple(sparse)
    ours, theirs = state(source), state(other)
    for e, expert in enumerate(found.experts):
        pairs = [(ffn(ours, layer, e, family), ffn(theirs, layer, e, family)) for layer in sparse]
        expected = [float((a - b).norm() / b.norm()) for a, b in pairs]
        assert expert.layers == pytest.approx(expected, rel=1e-4)
    parts = {"embeddings", "norms", "attention", "router"}
    parts |= {"shared expert"} if family == "qwen2_moe" else set()
    parts |= {"dense feed-forward"} if family == "qwen3_moe" else set()
    assert found.shared.keys() == parts
    a, b = (torch.cat([t[router_name(family, i)].flatten() for i in sparse]) for t in (ours, theirs))
    assert found.shared["router"] == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-4)


def test_a_dense_model_counts_as_one_expert(tiny_checkpoint: TinyCheckpoint) -> None:
    source, rounded = (
        SafetensorsSource(tiny_checkpoint("llama", dtype=d)) for d in (torch.float32, torch.bfloat16)
    )
    found = inspect(source, rounded).comparison
    assert found is not None
    ours, theirs = state(source), state(rounded)
    pairs = [(ffn(ours, layer, None), ffn(theirs, layer, None)) for layer in range(L)]
    assert found.experts[0].layers == pytest.approx(
        [float((a - b).norm() / b.norm()) for a, b in pairs], rel=1e-4
    )
    attention = [n for n in ours if ".self_attn." in n]
    a, b = (torch.cat([t[n].flatten() for n in attention]) for t in (ours, theirs))
    assert found.shared["attention"] == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-4)
    assert found.pairs == ((0.0,),)
    assert found.verdict == f"its feed-forward nets are within 0.17 % of {rounded.label}: tuned from it"
    same = inspect(source, source).comparison
    assert same is not None
    assert same.verdict == f"every weight equals {source.label}'s: a copy of it"


@pytest.mark.parametrize("tied_first", [True, False])
def test_a_tied_head_is_compared_with_one_of_its_own(
    tied_first: bool, tiny_checkpoint: TinyCheckpoint
) -> None:
    pair = [SafetensorsSource(tiny_checkpoint("llama", tie_word_embeddings=tied)) for tied in (True, False)]
    source, base = pair if tied_first else pair[::-1]
    found = inspect(source, base).comparison
    assert found is not None
    ours, theirs = (
        {"lm_head.weight": s["model.embed_tokens.weight"]} | s for s in (state(source), state(base))
    )
    names = ("model.embed_tokens.weight", "lm_head.weight")
    a, b = (torch.cat([t[name].flatten() for name in names]) for t in (ours, theirs))
    assert found.shared["embeddings"] == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-4)


def test_added_vocabulary_is_no_hindrance(tiny_checkpoint: TinyCheckpoint) -> None:
    small, large = (SafetensorsSource(tiny_checkpoint("llama", vocab_size=n)) for n in (96, 100))
    ours, theirs = state(small), state(large)
    for source, base, a, b in ((small, large, ours, theirs), (large, small, theirs, ours)):
        found = inspect(source, base).comparison
        assert found is not None
        names = ("model.embed_tokens.weight", "lm_head.weight")
        x, y = (torch.cat([t[name][:96].flatten() for name in names]) for t in (a, b))
        assert found.shared["embeddings"] == pytest.approx(float((x - y).norm() / y.norm()), rel=1e-4)


def test_long_tensors_are_summed_in_blocks() -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(3, CHUNK - 7, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    a, b, c = (t.double() for t in tensors)
    torch.testing.assert_close(
        pair_squares(tensors),
        torch.stack([(x - y).square().sum() for x, y in ((a, b), (a, c), (b, c))]),
        rtol=1e-5,
        atol=0,
    )
    own, other, apart = squares_to(tensors[:2], tensors[2])
    torch.testing.assert_close(own, torch.stack([a.square().sum(), b.square().sum()]), rtol=1e-5, atol=0)
    torch.testing.assert_close(other, c.square().sum().expand(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(apart[0], (a - c).square().sum(), rtol=1e-5, atol=0)


# ---- what is read, and when ---------------------------------------------------------------------------------


def test_one_projection_of_all_experts_at_a_time(upcycle: Upcycle) -> None:
    mixture, base = upcycle([0.0, 0.01, 0.02])
    steps: list[float] = []
    inspect(mixture, base, lambda stage, done: steps.append(done))
    assert (mixture.most, base.most) == (E, 1)
    assert (mixture.alive, base.alive) == (0, 0)
    assert sorted(mixture.reads) == sorted(mixture.names())  # each once: routers for their norms
    assert sorted(base.reads) == sorted(base.names())
    experts = [name for name in mixture.reads if ".experts." in name]
    assert [layer_of(name) for name in experts] == sorted(layer_of(name) or 0 for name in experts)
    assert steps == sorted(steps)
    assert steps[-1] == 1


def test_a_mixture_to_compare_with_is_read_one_tensor_at_a_time(tiny_checkpoint: TinyCheckpoint) -> None:
    source, base = (Recording(tiny_checkpoint("mixtral", dtype=d)) for d in (torch.float32, torch.bfloat16))
    inspect(source, base)
    assert (source.most, base.most) == (E, 1)


def test_an_adapter_is_a_model_like_any_other(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    peft = pytest.importorskip("peft")
    directory = tiny_checkpoint("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path)
    base = SafetensorsSource(directory, "base")
    found = inspect(AdapterSource(base, tmp_path), base).comparison
    assert found is not None
    assert found.shared["attention"] > 0
    assert found.shared["norms"] == 0
    assert found.verdict == "its feed-forward nets are equal to base: its feed-forward is the same"


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers is 2 here, 1 there"),
        ({"hidden_size": 16}, "hidden_size is 32 here, 16 there"),
        ({"intermediate_size": 40}, "feed-forward width of layer 0 is 48 here, 40 there"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is \[16, 32\] here, \[32, 32\] there"),
        ({"attention_bias": True}, r"q_proj.bias is none here, \[32\] there"),
    ],
)
def test_other_shapes_are_refused_before_reading(
    changes: dict[str, Any], message: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    source, base = (
        Recording(tiny_checkpoint("mixtral"), "ours"),
        Recording(tiny_checkpoint("llama", **changes), "other"),
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        inspect(source, base)
    assert str(caught.value).startswith("ours: cannot be compared with other: ")
    assert "\n" not in str(caught.value)
    assert source.reads == base.reads == []


def test_other_mixtures_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    mixture, dense = (SafetensorsSource(tiny_checkpoint(f), f) for f in ("mixtral", "llama"))
    with pytest.raises(CheckpointError, match="llama: is dense, mixtral a mixture of 3 experts; compare the"):
        inspect(dense, mixture)
    four = SafetensorsSource(tiny_checkpoint("mixtral", num_local_experts=4), "four")
    with pytest.raises(CheckpointError, match="num_experts is 3 here, 4 there"):
        inspect(mixture, four)
    mixed = SafetensorsSource(tiny_checkpoint("qwen3_moe"))
    sparse = SafetensorsSource(tiny_checkpoint("qwen3_moe", mlp_only_layers=[]))
    with pytest.raises(CheckpointError, match="feed-forward of layer 0 is one dense net here, experts there"):
        inspect(mixed, sparse)
