"""Experts by request: masks side by side in one batch, each as if it were alone, and nobody else's answer changes."""

from dataclasses import replace

import pytest
import torch
from plain_generation import generate
from tiny import GREEDY, byte_tokenizer, ids, load, make_engine, prompts, run
from tiny_models import MOE, TinyCheckpoint

from octad.checkpoint.load import load_model, open_source
from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.evaluate.contestants import Member, contestant, moe_layers
from octad.fast.optimize import native_kernels
from octad.model.moe import Router
from octad.model.observe import barred
from octad.model.transformer import Transformer

TRACED = replace(GREEDY, routed_experts=True, max_tokens=10)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def masked_by_weights(model: Transformer, allowed: tuple[int, ...], prompt: list[int]) -> list[int]:
    """Greedy tokens where the barred experts' logits are pulled down by hand, router by router."""
    hooks = []
    for _, moe in moe_layers(model):

        def choose(gate: Router, args: tuple[torch.Tensor], out: object) -> tuple[torch.Tensor, torch.Tensor]:
            p_NE = (args[0].float() @ gate.weight.float().T).softmax(-1)
            keep_E = torch.zeros(p_NE.shape[1])
            keep_E[list(allowed)] = 1
            p_NE = p_NE * keep_E
            weights, experts = (p_NE / p_NE.sum(-1, keepdim=True)).topk(gate.top_k)
            return (weights / weights.sum(-1, keepdim=True) if gate.normalise else weights), experts

        hooks.append(moe.gate.register_forward_hook(choose))
    try:
        return [token.id for token in generate(model, prompt, max_tokens=GREEDY.max_tokens or 0)]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", MOE)
def test_masks_side_by_side(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint(family))
    batch = prompts(8, shortest=3)
    masks: list[tuple[int, ...] | None] = [None, (0,), (1, 2), None, (2,), (0, 2), (0, 1, 2), None]
    each = [replace(GREEDY, only_experts=mask) for mask in masks]
    for options in ({}, {"max_num_batched_tokens": 9}, {"num_blocks": 40}):
        together = ids(run(make_engine(model, **options), batch, each))
        for prompt, mask, found in zip(batch, masks, together, strict=True):
            if mask is None:
                assert found == ids(run(make_engine(model), [prompt]))[0]
            else:
                assert found == masked_by_weights(model, mask, prompt)


@pytest.mark.parametrize("family", MOE)
def test_one_expert_is_the_member(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model, prompt = load(tiny_checkpoint(family)), prompts(1, shortest=12)[0]
    engine = make_engine(model)
    for expert in range(3):
        output = run(engine, [prompt], replace(TRACED, only_experts=[expert]))[0].outputs[0]
        assert output.speakers == [expert] * 10
        with contestant(model, Member(expert)):
            assert output.token_ids == [t.id for t in generate(model, prompt, max_tokens=10)]


def test_each_mask_has_its_own_cache(tiny_checkpoint: TinyCheckpoint) -> None:
    engine, prompt = make_engine(load(tiny_checkpoint("mixtral"))), prompts(1, shortest=30, longest=30)[0]
    cached = []
    for mask in (None, [0], [1, 0], [0], None, [0, 1]):
        cached.append(run(engine, [prompt], replace(GREEDY, only_experts=mask))[0].num_cached_tokens)
    assert cached == [0, 0, 0, 28, 28, 28]


def test_a_trace_from_some_place_on_uses_the_cache_before_it(tiny_checkpoint: TinyCheckpoint) -> None:
    engine, prompt = make_engine(load(tiny_checkpoint("mixtral"))), prompts(1, shortest=30, longest=30)[0]
    whole = run(engine, [prompt], TRACED)[0]
    for start, cached in ((0, 0), (3, 0), (17, 16), (29, 28), (500, 28)):
        part = run(engine, [prompt], replace(TRACED, routed_experts_prompt_start=start, n=2))[0]
        assert part.num_cached_tokens == cached
        begin = min(start, 29)
        assert part.prompt_routed_experts is not None
        assert whole.prompt_routed_experts is not None
        assert torch.equal(part.prompt_routed_experts, whole.prompt_routed_experts[begin:])
        for answer in part.outputs:
            assert torch.equal(answer.routed_experts, whole.outputs[0].routed_experts)  # type: ignore[arg-type]


def test_what_is_left_is_divided_by_hand() -> None:
    """Three experts with logits ln 1, ln 2, ln 5; without the last, 1/3 and 2/3."""

    class Gate(torch.nn.Module):
        weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
        top_k, normalise = 2, True

    out = torch.tensor([[0.9, 0.1]] * 3), torch.tensor([[2, 1]] * 3)
    bias = torch.tensor([[0, 0, -torch.inf], [0, 0, 0], [-torch.inf, 0, -torch.inf]])
    weights, experts = barred(Gate(), torch.ones(3, 1), out, bias)
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 1 / 3], [0.9, 0.1], [1.0, 0.0]]))
    assert experts.tolist() == [[1, 0], [2, 1], [1, 1]]


def test_a_dense_model_has_no_experts_to_choose(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(Exception, match="only_experts: this model is dense"):
        make_engine(load(tiny_checkpoint("llama"))).add_request("a", [1], SamplingParams(only_experts=[0]))


@pytest.mark.skipif(native_kernels() is None, reason="no native kernels here")
def test_masks_in_the_layers_that_decode_in_one_call(tiny_checkpoint: TinyCheckpoint) -> None:
    """One expert each is decoded in one call, other masks go through the parts; both to the bit as with neighbours."""
    directory = tiny_checkpoint("mixtral")
    source = open_source(directory)

    def make() -> LLM:
        model = load_model(source, torch.bfloat16)
        return LLM((model, byte_tokenizer(96)), quantize="int8", block_size=4, num_blocks=256)

    llm, batch = make(), prompts(6, shortest=3)
    masks: list[tuple[int, ...] | None] = [(0,), (1,), None, (2,), (0, 1), None]
    params = [replace(GREEDY, only_experts=mask, logprobs=0, routed_experts=True) for mask in masks]
    together = llm.generate(batch, params)
    for prompt, own, beside in zip(batch, params, together, strict=True):
        alone, answer = make().generate([prompt], own)[0].outputs[0], beside.outputs[0]
        assert alone.logprobs == answer.logprobs
        assert torch.equal(alone.routed_experts, answer.routed_experts)  # type: ignore[arg-type]
        assert alone.speakers == answer.speakers
        if own.only_experts is not None:
            assert set(alone.speakers or ()) <= set(own.only_experts)
