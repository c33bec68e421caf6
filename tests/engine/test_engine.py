"""The engine against transformers and plain generation, token for token in float32; and against itself, whatever else
is in the batch and however the scheduler cuts, evicts or reuses."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from plain_generation import generate
from tiny import GREEDY, byte_tokenizer, finish, ids, load, make_engine, prompts, run
from tiny_models import FAMILIES, TinyCheckpoint

from octad.engine.engine import Engine, EngineConfig
from octad.engine.params import SamplingParams, StructuredOutput
from octad.errors import RequestError
from octad.kernels.paged import paged_attention_reference
from octad.model.transformer import Transformer

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
SLIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-sliding": ("mistral", {"sliding_window": 7}),
    "mixtral-sliding": ("mixtral", {"sliding_window": 9}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FAMILIES} | SLIDING


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model(tiny_checkpoint: TinyCheckpoint) -> Transformer:
    return load(tiny_checkpoint("mixtral"))


def their_answer(directory: Path, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy continuation with its cache, and the logits before each of its tokens."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    out = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def logits_of(engine: Engine) -> list[torch.Tensor]:
    """Filled with a row for each token that the engine samples."""
    rows: list[torch.Tensor] = []
    inner = engine.runner.run

    def run(*args: Any) -> Any:
        ran = inner(*args)
        rows.extend(ran.logits.clone())
        return ran

    engine.runner.run = run  # type: ignore[method-assign]
    return rows


# ---- against others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_greedy_is_that_of_transformers(case: str, tiny_checkpoint: TinyCheckpoint) -> None:
    family, changes = CASES[case]
    directory = tiny_checkpoint(family, **changes)
    expected, logits = their_answer(directory, PROMPT, 40)
    ours = load(directory)
    for chunk in (64, 4):
        engine = make_engine(ours, max_num_batched_tokens=chunk)
        rows = logits_of(engine)
        assert ids(run(engine, [PROMPT], replace(GREEDY, max_tokens=40))) == [expected]
        torch.testing.assert_close(torch.stack(rows), logits, atol=2e-5, rtol=1e-4)
    assert [token.id for token in generate(ours, PROMPT, max_tokens=40)] == expected


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_sixteen_is_each_alone(case: str, tiny_checkpoint: TinyCheckpoint) -> None:
    family, changes = CASES[case]
    ours, batch = load(tiny_checkpoint(family, **changes)), prompts(16)
    alone = [[token.id for token in generate(ours, prompt, max_tokens=20)] for prompt in batch]
    assert ids(run(make_engine(ours), batch)) == alone
    assert ids(run(make_engine(ours, max_num_batched_tokens=7, max_num_seqs=5), batch)) == alone


def test_bfloat16_is_near_float32(tiny_checkpoint: TinyCheckpoint) -> None:
    """The half-precision path, by log-probability of the same tokens."""
    directory = tiny_checkpoint("qwen3_moe")
    exact, half = load(directory), load(directory).to(torch.bfloat16)
    batch = prompts(6, shortest=5)
    for one, other in zip(run(make_engine(exact), batch), run(make_engine(half), batch), strict=True):
        assert len(other.outputs[0].token_ids) == 20
        assert one.prompt_token_ids == other.prompt_token_ids
    engines = [make_engine(exact), make_engine(half)]
    rows = [logits_of(engine) for engine in engines]
    for engine in engines:
        run(engine, batch, replace(GREEDY, max_tokens=1))
    torch.testing.assert_close(torch.stack(rows[1]).float(), torch.stack(rows[0]), atol=0.15, rtol=0.05)


def test_another_attention_is_used(model: Transformer) -> None:
    calls = []

    def attention(*args: Any) -> torch.Tensor:
        calls.append(args[-1])
        return paged_attention_reference(*args)

    usual = make_engine(model)
    other = Engine(model, usual.tokenizer, usual.config, attention)
    batch = prompts(3, longest=12)
    assert ids(run(other, batch)) == ids(run(usual, batch))
    assert len(calls) == 20 * 2


# ---- against itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_preempted_is_not_preempted(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    ours, batch = load(tiny_checkpoint(family)), prompts(8, shortest=10, longest=30)
    roomy, tight = make_engine(ours), make_engine(ours, num_blocks=16)
    assert ids(run(tight, batch)) == ids(run(roomy, batch))
    assert tight.stats.preemptions > 3
    assert roomy.stats.preemptions == 0


def test_a_prefix_hit_is_a_miss(model: Transformer) -> None:
    prompt = prompts(1, shortest=30, longest=30)[0]
    cold, warm = make_engine(model, enable_prefix_caching=False), make_engine(model)
    expected = run(cold, [prompt])[0]
    first, again = run(warm, [prompt])[0], run(warm, [prompt])[0]
    assert first.outputs == again.outputs == expected.outputs
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 28)
    turn = [
        *prompt,
        *again.outputs[0].token_ids,
        5,
        6,
    ]  # a conversation goes on: the answer's blocks count too
    assert ids(run(warm, [turn])) == ids(run(cold, [turn]))
    assert warm.stats.prefix_hit_tokens == 28 + 48
    assert run(cold, [prompt])[0].num_cached_tokens == 0


def test_a_prompt_that_is_cached_as_a_whole(model: Transformer) -> None:
    """Its last token runs again, to know what follows."""
    prompt = prompts(1, shortest=16, longest=16)[0]
    engine = make_engine(model)
    first = run(engine, [prompt], replace(GREEDY, max_tokens=1))[0]
    again = run(engine, [prompt], replace(GREEDY, max_tokens=1))[0]
    assert again.num_cached_tokens == 12
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_other_weights_do_not_hit(model: Transformer) -> None:
    prompt, engine = prompts(1, shortest=30, longest=30)[0], make_engine(model)
    run(engine, [prompt])
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1)
    engine.reset_prefix_cache()
    changed = run(engine, [prompt])[0]
    assert changed.num_cached_tokens == 0
    assert ids([changed]) == ids(run(make_engine(model), [prompt]))


def test_a_seed_is_the_same_alone_and_in_a_batch(model: Transformer) -> None:
    params = SamplingParams(temperature=1.3, top_p=0.95, seed=11, max_tokens=25, ignore_eos=True)
    batch = prompts(8)
    alone = [ids(run(make_engine(model), [prompt], params))[0] for prompt in batch]
    mixed = [params if i % 2 else SamplingParams(temperature=1.0, max_tokens=9) for i in range(8)]
    together = ids(run(make_engine(model, num_blocks=40, max_num_batched_tokens=16), batch, mixed))
    assert together[1::2] == alone[1::2]
    assert alone[1] != ids(run(make_engine(model), [batch[1]], replace(params, seed=12)))[0]


def test_n_answers_are_n_requests(model: Transformer) -> None:
    """Answer 0 is that of a request for one, each has draws of its own, and the prompt is computed once."""
    prompt = prompts(1, shortest=22, longest=22)[0]
    params = SamplingParams(temperature=1.5, seed=3, n=4, max_tokens=12, ignore_eos=True)
    for caching in (True, False):
        engine = make_engine(model, enable_prefix_caching=caching)
        output = run(engine, [prompt], params)[0]
        assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
        found = [answer.token_ids for answer in output.outputs]
        assert found[0] == ids(run(make_engine(model), [prompt], replace(params, n=1)))[0]
        others = [ids(run(make_engine(model), [prompt], replace(params, seed=s, n=1)))[0] for s in (4, 5, 6)]
        assert (
            len({tuple(answer) for answer in found + others}) == 7
        )  # answer 1 of seed 3 is not that of seed 4
        assert found == [a.token_ids for a in run(make_engine(model), [prompt], params)[0].outputs]
        assert engine.stats.prefix_hit_tokens == 3 * 20
        assert output.num_cached_tokens == 0


def test_several_greedy_answers_are_the_same(model: Transformer) -> None:
    for params in (replace(GREEDY, n=3), replace(GREEDY, n=3, temperature=1.0, top_p=7e-46)):
        answers = run(make_engine(model), [PROMPT], params)[0].outputs
        assert [a.token_ids for a in answers] == [ids(run(make_engine(model), [PROMPT]))[0]] * 3


def test_extreme_parameters_end(model: Transformer) -> None:
    """Numbers at the edge of float32: every step ends, with tokens of the vocabulary."""
    for extreme in (
        {"top_p": 1e-45, "temperature": 3e38},
        {"top_p": 1.2e-38, "min_p": 1e-46},
        {"repetition_penalty": 1e-45},
        {"repetition_penalty": 3e38, "frequency_penalty": 2.0, "presence_penalty": -2.0},
        {"temperature": 1.1e-5, "repetition_penalty": 1e-30, "top_p": 0.9},
    ):
        params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1, **extreme)
        assert all(0 <= token < 96 for token in ids(run(make_engine(model), [PROMPT], params))[0])


def test_arrays_are_prompts_and_other_things_are_not(model: Transformer) -> None:
    expected = ids(run(make_engine(model), [PROMPT]))
    for prompt in (
        torch.tensor(PROMPT),
        np.array(PROMPT, np.int32),
        tuple(PROMPT),
        [np.int64(t) for t in PROMPT],
    ):
        assert ids(run(make_engine(model), [prompt])) == expected
    wrong = ([1.0, 2.0], [None], None, 1.5, [True], torch.tensor([0.5]), torch.tensor([[1, 2]]), "text")
    for prompt in wrong:
        with pytest.raises(RequestError, match="prompts: found"):
            make_engine(model).add_request("a", prompt, GREEDY)


def test_the_prompts_own_log_probabilities(model: Transformer) -> None:
    batch, asked = prompts(3, shortest=20), replace(GREEDY, prompt_logprobs=2, max_tokens=2)
    for options in ({}, {"max_num_batched_tokens": 7}):
        engine = make_engine(model, **options)
        run(engine, batch)  # what is cached is computed again
        for prompt, output in zip(batch, run(engine, batch, asked), strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([prompt]))[0].log_softmax(-1)
            assert output.prompt_logprobs is not None
            first, *rest = output.prompt_logprobs
            assert first is None
            assert [entry.chosen.token_id for entry in rest if entry] == prompt[1:]
            ours = torch.tensor([entry.chosen.logprob for entry in rest if entry])
            torch.testing.assert_close(ours, expected[range(len(rest)), prompt[1:]], atol=1e-4, rtol=1e-4)
            likeliest = [entry.top[0].token_id for entry in rest if entry]
            assert likeliest == expected[:-1].argmax(-1).tolist()
            assert all(len(entry.top) == 2 for entry in rest if entry)


def test_a_model_that_has_answered_can_be_trained(tiny_checkpoint: TinyCheckpoint) -> None:
    ours = load(tiny_checkpoint("mixtral"))
    run(make_engine(ours), [PROMPT])
    ours(torch.tensor([PROMPT])).logsumexp(-1).sum().backward()
    gradient = ours.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


# ---- ends --------------------------------------------------------------------------------------------------


def free_run(model: Transformer, tokens: int = 30) -> list[int]:
    return ids(run(make_engine(model), [PROMPT], replace(GREEDY, max_tokens=tokens)))[0]


def test_an_end_token_stops_and_has_no_text(model: Transformer) -> None:
    free = free_run(model)
    engine = make_engine(model)
    engine.eos_ids = (free[4],)
    first = free.index(free[4])
    answer = run(engine, [PROMPT], SamplingParams(temperature=0))[0].outputs[0]
    assert answer.token_ids == free[: first + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert answer.text == engine.tokenizer.decode(free[:first])
    assert run(engine, [PROMPT], replace(GREEDY, max_tokens=30))[0].outputs[0].token_ids == free


@pytest.mark.parametrize("included", [False, True])
def test_stop_ids_and_stop_strings(included: bool, model: Transformer) -> None:
    free = free_run(model)
    engine = make_engine(model)
    letters = [engine.tokenizer.decode([token]) for token in free]
    by_id = replace(GREEDY, stop_token_ids=(free[6],), include_stop_str_in_output=included)
    answer = run(engine, [PROMPT], by_id)[0].outputs[0]
    at = free.index(free[6])
    assert answer.token_ids == free[: at + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", free[6])
    assert answer.text == "".join(letters[: at + included])
    word = "".join(letters[4:7])  # across three tokens
    end = "".join(letters).index(word)
    answer = run(
        engine, [PROMPT], replace(GREEDY, stop=("never met", word), include_stop_str_in_output=included)
    )[0].outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", word)
    assert answer.text == "".join(letters)[: end + len(word) * included]
    assert answer.token_ids == free[: end + len(word)]


def test_lengths(model: Transformer) -> None:
    for engine in (
        make_engine(model),
        make_engine(model, max_model_len=128, num_blocks=None, kv_cache_gb=0.01),
    ):
        answer = run(engine, [[1] * 127], replace(GREEDY, max_tokens=50))[0].outputs[0]
        assert (len(answer.token_ids), answer.finish_reason) == (1, "length")
        answer = run(engine, [[1] * 100], replace(GREEDY, max_tokens=None))[0].outputs[0]
        assert (len(answer.token_ids), answer.finish_reason) == (28, "length")
        answer = run(engine, [[1] * 100], replace(GREEDY, max_tokens=3))[0].outputs[0]
        assert (len(answer.token_ids), answer.finish_reason) == (3, "length")
    whole_cache = make_engine(model, num_blocks=8)
    answers = run(whole_cache, [[1] * 20, [2] * 25], replace(GREEDY, max_tokens=None))
    assert [len(output.outputs[0].token_ids) for output in answers] == [12, 7]


def test_structured_output_ends_with_its_form(model: Transformer) -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=0, structured=StructuredOutput(regex="[a-c]{3}-[0-9]{2}"))
    outputs = run(make_engine(model), prompts(3), params)
    for output in outputs:
        text = output.outputs[0].text
        assert len(text) == 6
        assert set(text[:3]) <= set("abc")
        assert text[3] == "-"
        assert text[4:].isdigit()
        assert output.outputs[0].finish_reason == "stop"


# ---- requests ----------------------------------------------------------------------------------------------


def test_deltas_add_up_to_the_output(model: Transformer) -> None:
    engine, params = make_engine(model), replace(GREEDY, logprobs=2, stop=("zz",))
    for name, prompt in zip("abc", prompts(3), strict=True):
        engine.add_request(name, prompt, params, "told")
    deltas = []
    while engine.has_unfinished():
        deltas += engine.step()
    for name in "abc":
        mine, output = [d for d in deltas if d.request_id == name], engine.output(name)
        answer = output.outputs[0]
        assert "".join(d.text for d in mine) == answer.text
        assert [t for d in mine for t in d.token_ids] == answer.token_ids
        assert [e for d in mine for e in d.logprobs or ()] == answer.logprobs
        assert [d.finish_reason for d in mine] == [None] * 19 + ["length"]
        assert output.prompt == "told"
        assert output.metrics.arrival <= output.metrics.first_token <= output.metrics.finished  # type: ignore[operator]


def test_logprobs_are_those_of_transformers(model: Transformer, tiny_checkpoint: TinyCheckpoint) -> None:
    expected, logits = their_answer(tiny_checkpoint("mixtral"), PROMPT, 10)
    logprobs = logits.float().log_softmax(-1)
    answer = run(make_engine(model), [PROMPT], replace(GREEDY, max_tokens=10, logprobs=3))[0].outputs[0]
    assert answer.logprobs is not None
    for row, entry in zip(logprobs, answer.logprobs, strict=True):
        best = row.topk(3)
        assert [e.token_id for e in entry.top] == best.indices.tolist()
        assert [e.logprob for e in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    chosen = logprobs.gather(1, torch.tensor(expected)[:, None]).sum()
    assert answer.cumulative_logprob == pytest.approx(float(chosen), abs=1e-3)


def test_output_underway_and_handed_out_once(model: Transformer) -> None:
    engine = make_engine(model)
    engine.add_request("a", PROMPT, GREEDY)
    for _ in range(5):
        engine.step()
    early = engine.output("a")
    assert (early.finished, len(early.outputs[0].token_ids)) == (False, 5)
    finish(engine)
    whole = engine.output("a")
    assert whole.finished
    assert whole.outputs[0].token_ids[:5] == early.outputs[0].token_ids
    with pytest.raises(RequestError, match="'a': there is none"):
        engine.output("a")
    engine.add_request("a", PROMPT, GREEDY)  # the id is free again
    assert engine.abort("a") is not None


def test_abort(model: Transformer) -> None:
    engine, batch = make_engine(model, max_num_seqs=2), prompts(4)
    expected = ids(run(make_engine(model), batch))
    for number, prompt in enumerate(batch):
        engine.add_request(str(number), prompt, GREEDY)
    for _ in range(3):
        engine.step()
    running, waiting = engine.abort("0"), engine.abort("3")
    assert running is not None
    assert waiting is not None
    assert running.outputs[0].token_ids == expected[0][:3]
    assert [o.outputs[0].finish_reason for o in (running, waiting)] == ["abort", "abort"]
    assert waiting.finished
    assert engine.abort("0") is None
    finish(engine)
    assert [ids([engine.output(name)])[0] for name in "12"] == expected[1:3]
    assert (engine.requests, engine.answers) == ({}, {})


def test_a_step_that_was_interrupted_is_repeated(model: Transformer) -> None:
    batch = prompts(3)
    engine, calls = make_engine(model, num_blocks=40, max_num_batched_tokens=16), iter(range(1000))
    inner = engine.sampler.sample

    def sample(*args: Any) -> Any:
        if next(calls) % 3 == 1:
            raise KeyboardInterrupt
        return inner(*args)

    engine.sampler.sample = sample  # type: ignore[method-assign]
    for number, prompt in enumerate(batch):
        engine.add_request(str(number), prompt, GREEDY)
    while engine.has_unfinished():
        with suppress(KeyboardInterrupt):
            engine.step()
    assert next(calls) > 30
    assert ids([engine.output(str(i)) for i in range(3)]) == ids(run(make_engine(model), batch))


def test_whose_fault_an_id_outside_is(model: Transformer) -> None:
    """A tokenizer with more tokens than the model has rows is named; an id that it lacks is the caller's."""
    engine = Engine(model, byte_tokenizer(98), EngineConfig(block_size=4, num_blocks=16))
    with pytest.raises(RequestError, match=r"^tokenizer: its tokenizer reads '.' as id 96, .* \(it has 96\)"):
        engine.add_request("a", [3, 96], GREEDY)
    with pytest.raises(RequestError, match=r"ids outside 0\.\.95"):
        engine.add_request("b", [3, 98], GREEDY)


def test_requests_that_cannot_be(model: Transformer) -> None:
    engine = make_engine(model)
    with pytest.raises(RequestError, match="prompt is empty"):
        engine.add_request("a", [], GREEDY)
    for length in (128, 500):
        with pytest.raises(
            RequestError, match=f"has {length} tokens, the context 128 with the answer; shorten"
        ):
            engine.add_request("a", [1] * length, GREEDY)
    with pytest.raises(
        RequestError, match=r"has 40 tokens, the context 32 .* \(all that .* cache holds; the model takes 128"
    ):
        make_engine(model, num_blocks=8).add_request("a", [1] * 40, GREEDY)
    for wrong in (-1, 96):
        with pytest.raises(RequestError, match=r"ids outside 0\.\.95"):
            engine.add_request("a", [5, wrong], GREEDY)
    with pytest.raises(RequestError, match="logit_bias"):
        engine.add_request("a", [5], SamplingParams(logit_bias={96: 1.0}))
    engine.add_request("a", [5], GREEDY)
    with pytest.raises(RequestError, match="'a': this id is in use"):
        engine.add_request("a", [5], GREEDY)
    finish(engine)
    assert ids([engine.output("a")]) == ids(run(make_engine(model), [[5]])), (
        "refused ones left nothing behind"
    )


def test_configs_that_cannot_be(model: Transformer) -> None:
    with pytest.raises(RequestError, match="block_size: found 0"):
        EngineConfig(block_size=0)
    with pytest.raises(RequestError, match="kv_cache_gb: found -1"):
        EngineConfig(kv_cache_gb=-1.0)
    with pytest.raises(RequestError, match="max_model_len: found 500, the model's context is 128"):
        make_engine(model, max_model_len=500)


def test_the_cache_has_the_size_that_was_asked_for(model: Transformer) -> None:
    a_block = 4 * 2 * 2 * 2 * 8 * 4  # tokens, layers, k and v, heads, values, bytes
    gigabytes = 10.5 * a_block / 1e9
    assert make_engine(model, num_blocks=None, kv_cache_gb=gigabytes).stats.num_blocks == 10
    engine = make_engine(model, num_blocks=None, max_num_seqs=3)
    assert engine.stats.num_blocks == 3 * 128 / 4, "no more than all sequences at their longest can use"
    assert sum(t.nbytes for t in (*engine.runner.pool.keys, *engine.runner.pool.values)) == 96 * a_block
