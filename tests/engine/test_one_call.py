"""A step of decoding in one call is the same step module by module, to the bit: logits, likeliest tokens, routing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recording import recording
from tiny import GREEDY, byte_tokenizer, ids, load, make_engine, prompts, run
from tiny_models import TinyCheckpoint

from octad.engine.engine import Engine, EngineConfig
from octad.engine.model_runner import Ran
from octad.engine.params import SamplingParams
from octad.fast.native_modules import native_attention
from octad.fast.optimize import native_kernels, optimize
from octad.model.moe import FixedRouter
from octad.model.observe import said
from octad.model.transformer import Transformer

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "sliding mixtral": ("mixtral", {"sliding_window": 3, "num_experts_per_tok": 1}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    if native_kernels() is None:
        pytest.skip("there are no kernels here")


def engine_of(model: Transformer, quantize: str | None = "int8") -> Engine:
    attention = optimize(model, quantize=quantize)
    settings = EngineConfig(block_size=4, num_blocks=256)
    return Engine(model, byte_tokenizer(model.config.vocab_size), settings, attention)


def twice(engine: Engine) -> list[tuple[Ran, Ran, tuple[Any, Any], tuple[Any, Any]]]:
    """Filled with every step that decodes in one call, what it gives and what the modules give; and both routings."""
    found: list[Any] = []
    runner, inner = engine.runner, engine.runner.run

    def both(*args: Any) -> Ran:
        ran = inner(*args)
        routing = ran.routing() if ran.routing else None
        if ran.likeliest is None:
            return ran
        one_call, runner.one_call = runner.one_call, None
        plain = inner(*args)
        runner.one_call = one_call
        kept = ran._replace(logits=ran.logits.clone())
        found.append((kept, plain, routing, plain.routing() if plain.routing else None))
        return ran

    engine.runner.run = both  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [
        (torch.float32, "int8"),
        pytest.param(torch.float32, None, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "int8", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, None, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_one_call_is_the_modules_to_the_bit(
    case: str, dtype: torch.dtype, quantize: str | None, tiny_checkpoint: TinyCheckpoint
) -> None:
    family, changes = CASES[case]
    engine = engine_of(load(tiny_checkpoint(family, **changes)).to(dtype), quantize)
    for threads, batch in ((1, prompts(1)), (2, prompts(2)), (2, prompts(5, shortest=3))):
        torch.set_num_threads(threads)
        steps = twice(engine)
        run(engine, batch, GREEDY)
        assert len(steps) > 10
        for ran, plain, routing, other in steps:
            assert torch.equal(ran.logits, plain.logits)
            assert ran.likeliest == plain.logits.float().argmax(-1).tolist()
            assert (routing is None) == (other is None) == (family != "mixtral")
            if routing is not None:
                assert all(torch.equal(a, b) for a, b in zip(routing, other, strict=True))
                assert ran.speakers is not None
                for found, wanted in zip(ran.speakers, said(*routing), strict=True):
                    assert found == (wanted[0], pytest.approx(wanted[1], rel=1e-12))


def test_weights_put_in_place_of_others_are_noticed(tiny_checkpoint: TinyCheckpoint) -> None:
    """The call gets embeddings, norm and head by their addresses."""
    engine = engine_of(load(tiny_checkpoint("mixtral")))
    steps = twice(engine)
    run(engine, prompts(1), GREEDY)
    count = len(steps)
    norm = engine.model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * torch.linspace(0.5, 2.0, len(norm.weight)))
    engine.reset_prefix_cache()
    run(engine, prompts(1), GREEDY)
    assert len(steps) > count > 10
    assert all(torch.equal(ran.logits, plain.logits) for ran, plain, _, _ in steps)


def bars(engine: Engine) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, only_experts=(1,))


def fixes(engine: Engine) -> SamplingParams:
    for layer in engine.model.model.layers:
        layer.mlp.gate = FixedRouter([1])  # type: ignore[union-attr]
    return GREEDY


@pytest.mark.parametrize("change", [bars, fixes])
def test_experts_by_request_go_through_the_modules(
    change: Callable[[Engine], SamplingParams], tiny_checkpoint: TinyCheckpoint
) -> None:
    """And a router that comes later is noticed; so is one that goes."""
    engine = engine_of(load(tiny_checkpoint("mixtral")))
    steps, batch = twice(engine), prompts(2)
    before = ids(run(engine, batch, GREEDY))
    gates = [layer.mlp.gate for layer in engine.model.model.layers]  # type: ignore[union-attr]
    count = len(steps)
    assert count > 10
    run(engine, batch, change(engine))
    assert len(steps) == count
    for layer, gate in zip(engine.model.model.layers, gates, strict=True):
        layer.mlp.gate = gate  # type: ignore[union-attr]
    engine.reset_prefix_cache()
    assert ids(run(engine, batch, GREEDY)) == before
    assert len(steps) > count


def test_who_listens_at_the_routers_hears_them(tiny_checkpoint: TinyCheckpoint) -> None:
    engine = engine_of(load(tiny_checkpoint("mixtral")))
    expected = ids(run(engine, prompts(2), GREEDY))
    steps = twice(engine)
    with recording(engine.model) as record:
        assert ids(run(engine, prompts(2), GREEDY)) == expected
        assert all(entry is not None for entry in record)
    assert not steps


def test_least_lengths_end_tokens_and_log_probabilities(tiny_checkpoint: TinyCheckpoint) -> None:
    """What may change the likeliest token, or says more of it, beside engines of the plain modules."""
    each = [
        SamplingParams(temperature=0, max_tokens=12, min_tokens=12),
        SamplingParams(temperature=0, max_tokens=12, logprobs=2),
        SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=12, logit_bias={5: 30.0}),
        SamplingParams(
            temperature=0, max_tokens=12, min_tokens=6, stop_token_ids=[5, 7, 9, 11, 13, 60, 61, 62]
        ),
        SamplingParams(temperature=0.9, top_p=0.9, top_k=20, seed=3, max_tokens=12),
    ]
    plain = make_engine(load(tiny_checkpoint("mixtral")))
    expected = [run(plain, [prompt], one)[0].outputs[0] for prompt, one in zip(prompts(6), each, strict=True)]
    native = engine_of(load(tiny_checkpoint("mixtral")), None)
    found = [out.outputs[0] for out in run(native, prompts(6), each)]
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    assert found[1].logprobs is not None
    assert len(found[1].logprobs) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_broken_rows_have_no_likeliest_token(dtype: torch.dtype, tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("mixtral")).to(dtype)
    engine = engine_of(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    bad, good = run(engine, [[3, 7], [3, 4]], SamplingParams(temperature=0, max_tokens=2))
    assert bad.outputs[0].finish_reason == "error"
    assert good.outputs[0].token_ids[0] != 7 or good.outputs[0].finish_reason == "error"


def test_blocks_that_are_handed_out_anew(tiny_checkpoint: TinyCheckpoint) -> None:
    """More sequences than the cache holds, beside a cache that holds all."""
    model = load(tiny_checkpoint("mixtral"))
    optimize(model, quantize="int8")
    kernels = native_kernels()
    assert kernels is not None
    tokenizer, answers = byte_tokenizer(model.config.vocab_size), []
    for blocks in (24, 256):
        settings = EngineConfig(block_size=4, num_blocks=blocks)
        engine = Engine(model, tokenizer, settings, native_attention(kernels))
        answers.append(ids(run(engine, prompts(6, shortest=5), GREEDY)))
        assert (engine.stats.preemptions > 0) == (blocks == 24)
    assert answers[0] == answers[1]
