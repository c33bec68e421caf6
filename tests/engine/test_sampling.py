"""Sampling against transformers' processors, algebra, and the statistics of what is drawn."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
import transformers

from octad.engine.draw import BLOCK, Buffer, keep, likeliest, pick
from octad.engine.params import SamplingParams
from octad.engine.sampling import Sampler, SamplingState, distribution
from octad.fast.optimize import native_kernels
from octad.kernels.drawing import Drawing

V = 150  # more than two blocks, and not a whole number of them


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def state(
    prompt: Sequence[int] = (), output: Sequence[int] = (), eos: Sequence[int] = (), **options: object
) -> SamplingState:
    made = SamplingState(SamplingParams(**options), prompt, eos)  # type: ignore[arg-type]
    for token in output:
        made.append(token)
    return made


@pytest.fixture(params=["PyTorch", "kernels"])
def drawing(request: pytest.FixtureRequest) -> Drawing | None:
    """What draws: PyTorch, or the kernels."""
    if request.param == "PyTorch":
        return None
    if (kernels := native_kernels()) is None:
        pytest.skip("there are no kernels here")
    return Drawing(kernels.library)


def draws(
    logits: torch.Tensor, one: SamplingState, count: int, seed: int = 0, drawing: Drawing | None = None
) -> torch.Tensor:
    """How often each token came in `count` draws."""
    sampler, rows = Sampler(seed=seed, drawing=drawing), 1000
    batch = logits.expand(rows, -1)
    tokens = [s.token_id for _ in range(count // rows) for s in sampler.sample(batch, [one] * rows)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The chance that draws from these probabilities differ from them at least as much; rare tokens are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    assert counts[expected == 0].sum() == 0, "a token was drawn that has no probability"
    pairs = [(counts[~rare], expected[~rare]), (counts[rare].sum()[None], expected[rare].sum()[None])]
    found, wanted = (torch.cat(column).double() for column in zip(*pairs, strict=True))
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    if len(found) == 1:
        return 1.0  # nothing to choose
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(found) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


# ---- the slow twin is what transformers does ---------------------------------------------------------------

WARPERS = {
    "temperature": ({"temperature": 0.6}, [transformers.TemperatureLogitsWarper(0.6)]),
    "hot": ({"temperature": 3.0}, [transformers.TemperatureLogitsWarper(3.0)]),
    "top_k": ({"top_k": 7}, [transformers.TopKLogitsWarper(7)]),
    "top_k of all": ({"top_k": 1000}, []),
    "top_p": ({"top_p": 0.8}, [transformers.TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.1}, [transformers.MinPLogitsWarper(0.1)]),
    "together": (
        {"temperature": 1.5, "min_p": 0.02, "top_k": 20, "top_p": 0.7},
        [
            transformers.TemperatureLogitsWarper(1.5),
            transformers.MinPLogitsWarper(0.02),
            transformers.TopKLogitsWarper(20),
            transformers.TopPLogitsWarper(0.7),
        ],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("seed", range(5))
def test_filters_are_those_of_transformers(name: str, seed: int) -> None:
    options, warpers = WARPERS[name]
    logits = random_logits(V, seed=seed)
    theirs = logits[None].double()
    for warper in warpers:
        theirs = warper(None, theirs)
    ours = distribution(logits, SamplingParams(**options))  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs[0].softmax(-1))


def test_repetition_penalty_bias_and_min_tokens_are_those_of_transformers() -> None:
    logits, prompt, output = random_logits(V), [3, 4, 5, 5, 9], [4, 70, 70]
    ids = torch.tensor([prompt + output])
    biases = {(5,): 2.0, (80,): -50.0}
    theirs = transformers.SequenceBiasLogitsProcessor(biases)(ids, logits[None].double())
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, theirs)
    theirs = transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 4, [7, 8], device="cpu")(ids, theirs)
    params = SamplingParams(
        repetition_penalty=1.7, logit_bias={5: 2.0, 80: -50.0}, min_tokens=4, stop_token_ids=[8]
    )
    torch.testing.assert_close(distribution(logits, params, prompt, output, [7]), theirs[0].softmax(-1))


def test_presence_and_frequency_by_hand() -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence, of the answer's tokens alone."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = distribution(torch.zeros(5), params, prompt_ids=[0, 0], output_ids=[1, 2, 2, 2])
    expected = torch.tensor([0.0, -0.75, -1.25, 0.0, 0.0], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(found, expected)


# ---- the sampler draws from the slow twin's distribution ---------------------------------------------------

CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 12},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "top_p small": {"top_p": 0.05},
    "top_p tiny": {"top_p": 1e-9},
    "top_p nearly all": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.3, "min_p": 0.01, "top_k": 30, "top_p": 0.8},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2, "top_p": 0.9},
    "bias and minimum": {"logit_bias": {3: 3.0, 140: -9.0}, "min_tokens": 9, "stop_token_ids": [12]},
}
PROMPT, OUTPUT, EOS = [1, 2, 3, 3, 140, 149], [3, 10, 10, 10, 77], [11]


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case: str, scale: float, drawing: Drawing | None) -> None:
    logits = random_logits(V, seed=len(case), scale=scale)
    one = state(PROMPT, OUTPUT, EOS, **CASES[case])
    expected = distribution(logits, one.params, PROMPT, OUTPUT, EOS)
    assert chi_square(draws(logits, one, 10_000, drawing=drawing), expected) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [V, 50_000])
def test_the_kernels_draw_what_pytorch_draws(vocabulary: int, dtype: torch.dtype) -> None:
    """The same tokens from the same seeds, in batches of all kinds and on two threads, greedy and adjusted rows among
    them: what differs is the rounding of e^x, which moves the borders between tokens by some 1e-7."""
    if (kernels := native_kernels()) is None:
        pytest.skip("there are no kernels here")
    options: list[dict[str, object]] = [*CASES.values(), {"temperature": 0}]
    found = []
    for one in (None, Drawing(kernels.library)):
        sampler, torch_threads = Sampler(seed=3, drawing=one), 1 if one is None else 2
        torch.set_num_threads(torch_threads)
        rows = [state(PROMPT, OUTPUT, EOS, seed=n, **some) for n, some in enumerate(options)]
        batches = [random_logits(len(rows), vocabulary, seed=step).to(dtype) for step in range(3)]
        before = [batch.clone() for batch in batches]
        found.append([[s.token_id for s in sampler.sample(batch, rows)] for batch in batches])
        found[-1] += [[s.token_id for s in sampler.sample(batches[0][:1], rows[:1])] for _ in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))
    assert found[0] == found[1]


def test_the_statistical_test_can_fail() -> None:
    logits = random_logits(V)
    right = distribution(logits, SamplingParams())
    for wrong in (
        {"temperature": 1.1},
        {"top_p": 0.99},
        {"top_k": 90},
        {"logit_bias": {int(logits.argmax()): 0.2}},
    ):
        assert chi_square(draws(logits, state(**wrong), 40_000), right) < 1e-4, wrong


def test_evenly_spread_numbers_pick_in_proportion() -> None:
    """Without chance: of N evenly spread uniforms, token v gets N p(v), give or take one."""
    weights = random_logits(1, 3 * BLOCK).exp()
    weights[0, 5:90] = 0
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    found = torch.bincount(pick(weights.expand(20_000, -1), uniforms), minlength=3 * BLOCK)
    expected = (weights[0] / weights.sum()).double() * 20_000
    assert (found - expected).abs().max() < 1.01


def test_the_ends_of_the_unit_interval_pick_a_token_that_has_weight() -> None:
    weights = torch.zeros(2, 4 * BLOCK)
    weights[:, [70, 71, 200]] = torch.tensor([1.0, 1e-30, 0.1])
    assert pick(weights, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [70, 200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_is_the_first_of_the_largest(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, [3, 700]], logits[2], logits[3, 9] = 50.0, -torch.inf, torch.inf
    assert likeliest(logits).tolist() == [max(range(1000), key=row.__getitem__) for row in logits.tolist()]


def test_keep_is_exact_to_the_last_bit() -> None:
    floor = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) + 2**-20
    near = torch.cat([floor.nextafter(torch.zeros(1)), floor, floor.nextafter(torch.ones(1) * 2)], 1)
    for ties, expected in ((True, [False, True, True]), (False, [False, False, True])):
        kept = keep(near, floor, ties, Buffer().like(near)) > 0
        assert torch.equal(kept, torch.tensor(expected).expand(500, 3))


def test_equally_likely_tokens_are_kept_together(drawing: Drawing | None) -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        drawn = draws(logits, state(**options), 1000, drawing=drawing)
        assert set(drawn.nonzero()[:, 0].tolist()) == {0, 1, 2, 3}
        assert (distribution(logits, SamplingParams(**options)) > 0).tolist() == [True] * 4 + [False]  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-4, 1e30])
def test_extreme_temperatures_and_logits(temperature: float, drawing: Drawing | None) -> None:
    logits = random_logits(V, scale=1e4)
    logits[7] = 1e30
    counts = draws(logits, state(temperature=temperature), 1000, drawing=drawing)
    assert chi_square(counts, distribution(logits, SamplingParams(temperature=temperature))) > 1e-4


# ---- batches -----------------------------------------------------------------------------------------------


def test_a_seeded_row_does_not_depend_on_its_neighbours() -> None:
    options = {"seed": 7, "temperature": 1.2, "top_p": 0.6}
    logits = random_logits(40, V)
    alone, crowded = state(**options), state(**options)
    ours: list[int] = []
    theirs: list[int] = []
    for step in range(40):
        ours.append(Sampler().sample(logits[step : step + 1], [alone])[0].token_id)
        others = [state(top_k=1 + step), state(temperature=0), state(seed=3), state(min_p=0.3)]
        place = step % 5
        batch = random_logits(5, V, seed=step)
        batch[place] = logits[step]
        others.insert(place, crowded)
        theirs.append(Sampler(seed=step).sample(batch, others)[place].token_id)
    assert ours == theirs
    assert len(set(ours)) > 10


def test_answers_of_one_request_differ_and_seeds_repeat() -> None:
    logits = random_logits(30, V, scale=1.0)
    params = SamplingParams(seed=5, n=3)

    def run(index: int) -> list[int]:
        one, sampler = SamplingState(params, [], [], index), Sampler()
        return [sampler.sample(row[None], [one])[0].token_id for row in logits]

    assert run(0) == run(0)
    assert run(0) != run(1) != run(2)


def test_rows_without_seed_are_new_each_time() -> None:
    logits = torch.zeros(50, V)
    first, second = (
        [s.token_id for s in Sampler().sample(logits, [state() for _ in range(50)])] for _ in range(2)
    )
    assert first != second
    assert len(set(first)) > 20


def test_greedy_rows_take_the_likeliest_after_penalties() -> None:
    logits = random_logits(3, V)
    best = logits.argmax(-1).tolist()
    second = logits[1].topk(2).indices[1].item()
    rows = [
        state(temperature=0),
        state(
            output=[best[1]],
            temperature=0,
            presence_penalty=2.0,
            frequency_penalty=2.0,
            logit_bias={best[1]: -9},
        ),
        state(temperature=1.0, top_k=1),
    ]
    assert [s.token_id for s in Sampler().sample(logits, rows)] == [best[0], second, best[2]]
    assert [s.token_id for s in Sampler().sample(logits[:2], rows[:2])] == [best[0], second]


def test_a_greedy_batch_is_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(4, V).bfloat16()

    def refuse(*_: object) -> None:
        raise AssertionError("a greedy batch was copied")

    monkeypatch.setattr(Buffer, "padded", refuse)
    found = Sampler().sample(logits, [state([1, 2], temperature=0) for _ in range(4)])
    assert [s.token_id for s in found] == logits.argmax(-1).tolist()
    assert Sampler().sample(logits[:0], []) == []


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(2, 128)
    before = logits.clone()
    Sampler().sample(logits, [state(logit_bias={1: 9.0}, logprobs=2), state([5], repetition_penalty=2.0)])
    assert torch.equal(logits, before)


def test_counts_grow_with_the_answer() -> None:
    """The incremental counts equal a count of everything, at every step."""
    options = {"repetition_penalty": 1.3, "presence_penalty": -0.4, "frequency_penalty": 0.7}
    one, tokens = (
        state([1, 1, 2], **options),
        torch.randint(0, V, (300,), generator=torch.Generator().manual_seed(0)),
    )
    logits = random_logits(V)
    for step, token in enumerate(tokens.tolist()):
        if step % 37 == 0:
            found = logits.clone()
            one.adjust(found)
            counted = Counter(one.output_ids)
            expected = [
                (x / 1.3 if x > 0 else x * 1.3) if v in {1, 2, *counted} else x
                for v, x in enumerate(logits.tolist())
            ]
            expected = [x - 0.7 * counted[v] + 0.4 * (v in counted) for v, x in enumerate(expected)]
            torch.testing.assert_close(found, torch.tensor(expected))
        one.append(token)


def test_end_tokens_wait_for_the_minimum() -> None:
    logits = torch.zeros(1, V)
    logits[0, [4, 6]] = 50.0
    one = state(eos=[4, V + 3], min_tokens=2, stop_token_ids=[6], temperature=0, logit_bias={9: 1.0})
    found = []
    for _ in range(3):
        found.append(Sampler().sample(logits, [one])[0].token_id)
        one.append(found[-1])
    assert found == [9, 9, 4]


# ---- log-probabilities -------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4, V)
    options: list[dict[str, object]] = [
        {"temperature": 0, "logprobs": 3},
        {"temperature": 0.1},
        {"top_k": 2, "logprobs": 0, "logit_bias": {70: 100.0}},
        {"temperature": 5.0, "seed": 1, "logprobs": 1000},
    ]
    found = Sampler(text_of=str).sample(logits, [state(**o) for o in options])
    expected = logits.log_softmax(-1)
    assert found[1].logprobs is None
    assert found[2].token_id == 70
    for row, count in ((0, 3), (2, 0), (3, V)):
        told = found[row].logprobs
        assert told is not None
        token = told.chosen.token_id
        assert token == found[row].token_id
        assert math.isclose(told.chosen.logprob, expected[row, token], rel_tol=1e-5)
        assert told.chosen.rank == 1 + sum(x > logits[row, token] for x in logits[row])
        assert told.chosen.text == str(token)
        best = expected[row].sort(descending=True)
        assert [t.token_id for t in told.top] == best.indices[:count].tolist()
        assert [t.rank for t in told.top] == list(range(1, count + 1))
        torch.testing.assert_close(torch.tensor([t.logprob for t in told.top]), best.values[:count])


def test_inside_and_outside_of_inference_mode() -> None:
    sampler, rows = Sampler(), [state(repetition_penalty=1.5), state(temperature=0, logprobs=1)]
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            for one, found in zip(rows, sampler.sample(random_logits(2, V), rows), strict=True):
                one.append(found.token_id)
    assert all(len(one.output_ids) == 3 for one in rows)
