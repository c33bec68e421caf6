"""Routing traces against transformers' router logits, row by row."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tiny import GREEDY, finish, load, make_engine, prompts, run
from tiny_models import MOE, TinyCheckpoint

from octad.engine.outputs import RequestOutput
from octad.model.observe import Trace, speakers, watching
from octad.model.transformer import Transformer

TRACED = replace(GREEDY, routed_experts=True, max_tokens=12)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def their_routing(directory: Any, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """experts and weights [tokens, layers, 2] from the router logits; -1 and 0 where a layer has no router."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        routers = list(theirs(torch.tensor([tokens]), output_router_logits=True).router_logits)
    dense = getattr(theirs.config, "mlp_only_layers", None) or []
    experts = torch.full((len(tokens), theirs.config.num_hidden_layers, 2), -1)
    weights = torch.zeros(experts.shape)
    present = [r for r in routers if r is not None and r.dim() == 2]
    sparse = [layer for layer in range(theirs.config.num_hidden_layers) if layer not in dense]
    for layer, logits in zip(sparse, present, strict=True):
        w, experts[:, layer] = logits.float().softmax(-1).topk(2)
        whole = w.sum(-1, keepdim=True) if getattr(theirs.config, "norm_topk_prob", True) else 1
        weights[:, layer] = w / whole
    return experts, weights


def check(output: RequestOutput, directory: Any) -> None:
    prompt, answer = output.prompt_token_ids, output.outputs[0]
    experts, weights = their_routing(directory, [*prompt, *answer.token_ids[:-1]])
    begin = len(prompt)
    assert output.prompt_routed_experts is not None
    assert answer.routed_experts is not None
    assert answer.routed_experts.dtype == torch.int16
    assert torch.equal(output.prompt_routed_experts.long(), experts[:begin])
    assert torch.equal(answer.routed_experts.long(), experts[begin - 1 :])
    torch.testing.assert_close(answer.routed_weights, weights[begin - 1 :], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.prompt_routed_weights, weights[:begin], atol=1e-5, rtol=1e-4)
    shares = torch.zeros(len(experts), 3)
    for layer in range(experts.shape[1]):
        shares.scatter_add_(1, experts[:, layer].clamp(min=0), weights[:, layer])
    assert answer.speakers == shares[begin - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("family", MOE)
def test_traces_are_the_routers_of_transformers(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint(family)
    model, batch = load(directory), prompts(4, longest=30)
    each = [TRACED, GREEDY, TRACED, GREEDY]
    for config in ({}, {"max_num_batched_tokens": 6}, {"num_blocks": 14}):
        engine = make_engine(model, **config)
        outputs = run(engine, batch, each)
        for output, params in zip(outputs, each, strict=True):
            if params is TRACED:
                check(output, directory)
            else:
                answer = output.outputs[0]
                assert (answer.routed_experts, answer.speakers, output.prompt_routed_experts) == (
                    None,
                    None,
                    None,
                )
    assert engine.stats.preemptions > 0


def test_deltas_tell_the_speakers(tiny_checkpoint: TinyCheckpoint) -> None:
    engine = make_engine(load(tiny_checkpoint("mixtral")))
    engine.add_request("a", prompts(1)[0], TRACED)
    engine.add_request("b", prompts(1)[0], GREEDY)
    said: dict[str, list[int]] = {"a": [], "b": []}
    shares: list[float] = []
    while engine.has_unfinished():
        for delta in engine.step():
            said[delta.request_id] += delta.speakers or ()
            shares += delta.speaker_shares or ()
    traced = engine.output("a").outputs[0]
    assert said["a"] == said["b"][: len(said["a"])] == traced.speakers  # with a trace and without
    assert traced.routed_weights is not None
    most = traced.routed_weights.sum((1, 2))  # of two layers with weights that sum to 1
    torch.testing.assert_close(most, torch.full_like(most, 2.0))
    assert all(0.25 < share <= 1 for share in shares)


def test_a_trace_is_whole_in_spite_of_the_prefix_cache(tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint("mixtral")
    engine, prompt = make_engine(load(directory)), prompts(1, shortest=30)[0]
    run(engine, [prompt])
    for _ in range(2):
        output = run(engine, [prompt], TRACED)[0]
        assert output.num_cached_tokens == 0
        check(output, directory)


def test_every_answer_has_its_own_trace(tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint("mixtral")
    engine, prompt = make_engine(load(directory)), prompts(1, shortest=30)[0]
    output = run(engine, [prompt], replace(TRACED, temperature=1.5, n=3, seed=1))[0]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    for answer in output.outputs:
        check(replace(output, outputs=[answer]), directory)


def test_a_dense_model_has_no_trace(tiny_checkpoint: TinyCheckpoint) -> None:
    engine = make_engine(load(tiny_checkpoint("llama")))
    output = run(engine, prompts(1), TRACED)[0]
    assert (output.outputs[0].routed_experts, output.outputs[0].speakers) == (None, None)
    assert output.prompt_routed_experts is None


def test_hooks_are_there_only_while_somebody_asks(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("mixtral"))
    engine = make_engine(model)

    def hooks(model: Transformer) -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    with watching(model, lambda *heard: None):
        assert hooks(model) == 2
    assert hooks(model) == 0
    engine.add_request("a", [1, 2], TRACED)
    engine.step()
    engine.abort("a")
    engine.add_request("b", [1, 2], GREEDY)
    finish(engine)
    assert hooks(model) == 0


def test_speakers_by_hand() -> None:
    experts = torch.tensor([[[2, 0], [-1, -1], [0, 1]], [[1, 2], [-1, -1], [2, 1]]], dtype=torch.int16)
    weights = torch.tensor([[[0.6, 0.4], [0, 0], [0.7, 0.3]], [[0.6, 0.4], [0, 0], [0.55, 0.45]]])
    assert speakers(experts, weights) == [0, 1]  # 0: 1.1; 1: 1.05 against 0.95


def test_a_trace_keeps_positions() -> None:
    trace = Trace()
    rows = torch.arange(12, dtype=torch.int16).view(6, 1, 2)
    trace.write(0, rows[:2], rows[:2].float())
    trace.write(2, rows[2:], rows[2:].float())
    trace.write(1, rows[1:3], rows[1:3].float())  # computed again
    assert len(trace) == 6
    assert torch.equal(trace.rows(0, 99)[0], rows)
    assert torch.equal(trace.rows(3, 5)[1], rows[3:5].float())
