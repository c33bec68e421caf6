"""What a request may ask for, and the line that says what is wrong with one that may not."""

import json
import subprocess
import sys

import pytest

from octad.engine.params import SamplingParams, StructuredOutput, mix_seed, own_sampling
from octad.errors import RequestError


def test_lists_are_frozen_and_numbers_brought_to_their_type() -> None:
    stops, bias = ["a", "b"], {3: 1}
    params = SamplingParams(stop=stops, stop_token_ids=[1], logit_bias=bias, temperature=1, top_k=-1)
    stops.append("c")
    bias[4] = 2
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a", "b"), (1,), {3: 1.0})
    assert isinstance(params.temperature, float)
    assert params.top_k == 0
    assert SamplingParams(stop="end").stop == ("end",)
    hash(params)


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("n", (0, 1.5, True, "2", None), (1, 7)),
        ("max_tokens", (0, -1, 2.0), (1, None)),
        ("min_tokens", (-1, None), (0, 5)),
        ("temperature", (-0.1, float("nan"), float("inf"), 1e39, 10**400, "hot", None), (0, 0.5, 3)),
        ("top_p", (1.01, -1, float("nan")), (0, 7e-46, 1e-9, 1)),
        ("top_k", (-2, 0.5), (-1, 0, 9)),
        ("min_p", (-0.1, 1.1), (0, 1)),
        ("repetition_penalty", (0, -1, 1e-46), (0.5, 1.3)),
        ("presence_penalty", (-2.1, 2.1), (-2, 2)),
        ("frequency_penalty", (-2.1, 2.1), (-2, 2)),
        ("seed", (1.0, 2**63), (None, 0, -5)),
        ("stop", ("", [""], [1], {"a"}), ((), ["a"])),
        ("stop_token_ids", ([-1], ["1"], 3), ([0],)),
        ("include_stop_str_in_output", (1, None), (True,)),
        ("logprobs", (-1, True), (None, 0, 20)),
        ("logit_bias", ({1: 101}, {-1: 0}, {"1": 0}, [1], {1: float("nan")}), ({}, {1: -100})),
        ("structured", ({"regex": "a"},), (None,)),
    ],
)
def test_bounds(field: str, bad: tuple[object, ...], good: tuple[object, ...]) -> None:
    for value in good:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    for value in bad:
        with pytest.raises(RequestError, match=rf"^{field}: found .*, allowed: .+") as caught:
            SamplingParams(**{field: value})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: found 9, allowed: at most max_tokens, which is 8"),
        ({"structured": StructuredOutput(regex="a"), "ignore_eos": True}, "ignore_eos: found True"),
        ({"structured": StructuredOutput(regex="a"), "min_tokens": 3}, "min_tokens: found 3"),
    ],
)
def test_combinations_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_greedy_is_no_temperature_to_speak_of() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-7).greedy
    assert SamplingParams(top_p=0).greedy
    assert SamplingParams(top_p=7e-46).greedy  # nothing in float32, which the sampler computes in
    assert SamplingParams(temperature=0, n=3).n == 3
    assert not SamplingParams(temperature=0.01).greedy


def test_seeds_do_not_meet() -> None:
    places = [mix_seed(seed, index) for seed in range(-3, 40) for index in range(40)]
    assert len(set(places)) == len(places)
    assert mix_seed(4, 1) == mix_seed(4, 1)


def test_experts_are_a_set_of_numbers() -> None:
    assert SamplingParams(only_experts=[2, 0, 2]).only_experts == (0, 2)
    for wrong in ([], [-1], ["french"], 3, [1.5]):
        with pytest.raises(RequestError, match="only_experts: found"):
            SamplingParams(only_experts=wrong)  # type: ignore[arg-type]


def test_ids_that_the_model_does_not_have() -> None:
    SamplingParams(logit_bias={9: 1}, stop_token_ids=[9]).check_vocabulary(10)
    with pytest.raises(RequestError, match="logit_bias: found 10, allowed: token ids from 0 to 9"):
        SamplingParams(logit_bias={10: 1}).check_vocabulary(10)
    with pytest.raises(RequestError, match="stop_token_ids: found 12"):
        SamplingParams(stop_token_ids=[12]).check_vocabulary(10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regex": "a", "json_object": True},
        {"regex": ""},
        {"grammar": 3},
        {"choice": []},
        {"choice": ["a", ""]},
        {"json": "{"},
        {"json": "[1]"},
        {"json": True},
        {"json": {"a": object()}},
        {"json": {"a": float("nan")}},
        {"json_object": 1},
    ],
)
def test_forms_that_are_none(options: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=r"^structured.*") as caught:
        StructuredOutput(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_schema_is_frozen_in_its_order() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "null"}, "a": {}}}
    form = StructuredOutput(json=schema)
    schema["type"] = "array"
    assert isinstance(form.json, str)
    assert list(json.loads(form.json)["properties"]) == ["b", "a"]
    assert form == StructuredOutput(json=form.json)
    assert len({form, StructuredOutput(json=form.json), StructuredOutput(choice=["x"])}) == 2


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, octad.engine.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_checkpoint_says_of_sampling() -> None:
    said = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "max_new_tokens": 5,
        "min_p": None,
    }
    assert own_sampling(said) == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert own_sampling(said | {"do_sample": False}) == {}
    assert own_sampling({"temperature": "hot", "top_p": 7, "repetition_penalty": 1.05}) == {
        "repetition_penalty": 1.05
    }
