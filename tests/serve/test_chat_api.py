"""POST /v1/chat/completions with the real openai client: whole and streamed answers, their options, and errors."""

# ruff: noqa: F401, F811 (fixtures are imported)

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import openai
import pytest
from serving import CONTEXT, Running, Start, running, served_mixture, start

from octad.engine.params import SamplingParams

HI = [{"role": "user", "content": "Hi"}]
GREEDY = {"model": "mixture", "messages": HI, "temperature": 0, "max_tokens": 12}


def streamed(running: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    response = running.post("/v1/chat/completions", body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


def refused(
    running: Running, body: dict[str, Any], status: int = 400, path: str = "/v1/chat/completions"
) -> dict[str, Any]:
    response = running.post(path, body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "/tmp" not in error["message"]
    return error


def test_an_answer_is_the_engines(running: Running) -> None:
    answer = running.openai().chat.completions.create(**GREEDY)
    expected = running.llm.chat(HI, SamplingParams(temperature=0, max_tokens=12))
    choice = answer.choices[0]
    assert choice.message.content == expected.outputs[0].text.rstrip("\ufffd")
    assert (choice.finish_reason, choice.message.role, choice.message.tool_calls) == (
        "length",
        "assistant",
        None,
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_is_the_answer(running: Running) -> None:
    client = running.openai()
    whole = client.chat.completions.create(**GREEDY)
    chunks = list(
        client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "length"
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    last = chunks[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_asyncio_clients_side_by_side(running: Running) -> None:
    """Sixteen at once, with and without seeds: each answer is that of the request alone."""
    client = openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0)
    bodies = [
        {"model": "mixture", "messages": [{"role": "user", "content": f"Question {i}"}], "max_tokens": 16}
        | ({"temperature": 1.2, "seed": i} if i % 2 else {"temperature": 0})
        for i in range(16)
    ]

    async def ask(body: dict[str, Any], stream: bool) -> str:
        if not stream:
            return (await client.chat.completions.create(**body)).choices[0].message.content or ""
        chunks = await client.chat.completions.create(**body, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])

    async def together() -> list[str]:
        return list(await asyncio.gather(*(ask(body, i % 3 == 0) for i, body in enumerate(bodies))))

    found = asyncio.run(together())
    sync = running.openai()
    assert found == [sync.chat.completions.create(**body).choices[0].message.content for body in bodies]
    assert running.idle()


def test_several_answers(running: Running) -> None:
    for options in ({"temperature": 0}, {"temperature": 1.3, "seed": 4}, {"top_p": 0}):
        body = GREEDY | options | {"n": 3}
        whole = running.openai().chat.completions.create(**body)
        texts = [choice.message.content for choice in whole.choices]
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        assert (len(set(texts)) == 1) == ("seed" not in options)
        found = {0: "", 1: "", 2: ""}
        for chunk in streamed(running, body):
            found[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content") or ""
        assert list(found.values()) == texts


def test_log_probabilities(running: Running) -> None:
    body = GREEDY | {"logprobs": True, "top_logprobs": 3}
    whole = running.openai().chat.completions.create(**body).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content or []
    assert len(content) == 12
    assert all(place.logprob == place.top_logprobs[0].logprob for place in content)
    assert all(len(place.top_logprobs) == 3 for place in content)
    places = [
        place
        for chunk in streamed(running, body)
        for place in (chunk["choices"][0]["logprobs"] or {}).get("content", [])
    ]
    assert [p["logprob"] for p in places] == pytest.approx([p.logprob for p in content])
    only = running.openai().chat.completions.create(**GREEDY, logprobs=True).choices[0].logprobs
    assert only is not None
    assert all(place.top_logprobs == [] for place in only.content or [])
    assert refused(running, GREEDY | {"top_logprobs": 2})["param"] == "top_logprobs"
    assert "allowed: an integer from 0 to 20" in refused(running, body | {"top_logprobs": 21})["message"]


def test_who_speaks(running: Running) -> None:
    body = GREEDY | {"speakers": True}
    whole = running.post("/v1/chat/completions", body).json()["choices"][0]
    assert "".join(entry["token"] for entry in whole["speakers"]) == whole["message"]["content"]
    assert len(whole["speakers"]) == 12
    assert all(
        entry["expert"] in running.llm.expert_names and 0 < entry["weight"] <= 1
        for entry in whole["speakers"]
    )
    entries = []
    for chunk in streamed(running, body):
        choice = chunk["choices"][0]
        said = choice.get("speakers", [])
        assert "".join(entry["token"] for entry in said) == (choice["delta"].get("content") or "")
        entries += said
    assert entries == whole["speakers"]
    assert "speakers" not in running.post("/v1/chat/completions", GREEDY).json()["choices"][0]


def test_the_whole_routing(running: Running) -> None:
    expected = running.llm.chat(HI, SamplingParams(temperature=0, max_tokens=12, routed_experts=True))
    rows = np.concatenate([expected.prompt_routed_experts, expected.outputs[0].routed_experts[1:]])  # type: ignore[index]
    for start_at in (0, 5):
        body = GREEDY | {"return_routed_experts": True, "routed_experts_prompt_start": start_at}
        whole = running.post("/v1/chat/completions", body).json()["choices"][0]
        found = np.load(io.BytesIO(base64.b64decode(whole["routed_experts"])))
        assert found.dtype == np.uint8
        assert np.array_equal(found, rows[start_at:])
        last = streamed(running, body)[-1]["choices"][0]
        assert last["routed_experts"] == whole["routed_experts"]
        assert last["finish_reason"] == "length"


def test_the_weights_of_the_routing(running: Running) -> None:
    """Beside the numbers, of the same shape; the speaker is who has most of them over the layers."""
    expected = running.llm.chat(HI, SamplingParams(temperature=0, max_tokens=12, routed_experts=True))
    body = GREEDY | {"return_routed_experts": True, "return_routed_weights": True, "speakers": True}
    choice = running.post("/v1/chat/completions", body).json()["choices"][0]
    ids, weights = (
        np.load(io.BytesIO(base64.b64decode(choice[name]))) for name in ("routed_experts", "routed_weights")
    )
    assert weights.dtype == np.float32
    assert weights.shape == ids.shape
    assert np.array_equal(weights[-12:], expected.outputs[0].routed_weights)  # type: ignore[arg-type]
    for row, entry in enumerate(choice["speakers"]):
        sums = np.bincount(ids[row - 12].ravel(), weights[row - 12].ravel(), minlength=3)
        assert ["general", "french", "maths"][int(sums.argmax())] == entry["expert"]
        assert abs(sums.max() / sums.sum() - entry["weight"]) < 1e-3
    alone = GREEDY | {"return_routed_weights": True}
    last = streamed(running, alone)[-1]["choices"][0]
    assert last["routed_weights"] == choice["routed_weights"]
    assert "routed_experts" not in last


def test_masks_of_one_request(running: Running) -> None:
    for named in ("maths", 2):
        body = GREEDY | {"speakers": True, "only_experts": [named]}
        whole = running.post("/v1/chat/completions", body).json()["choices"][0]
        assert {entry["expert"] for entry in whole["speakers"]} == {"maths"}
    for wrong in (["german"], [3], [], [True], [1.5], "maths"):
        assert refused(running, GREEDY | {"only_experts": wrong})["param"] == "only_experts"


def test_cached_tokens_are_told(running: Running) -> None:
    body = GREEDY | {
        "messages": [{"role": "user", "content": "A question that fills several blocks of the cache."}]
    }
    running.openai().chat.completions.create(**body)
    usage = running.openai().chat.completions.create(**body).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // 16 * 16


@pytest.mark.parametrize("start_at", [0, 1, 3])
def test_stop_strings_are_cut_exactly(running: Running, start_at: int) -> None:
    text = (
        running.openai().chat.completions.create(**GREEDY | {"max_tokens": 40}).choices[0].message.content
        or ""
    )
    stop = text[start_at + 4 : start_at + 7]
    body = GREEDY | {"max_tokens": 40, "stop": [stop, "never there", text[-1] + "x"]}
    choice = running.openai().chat.completions.create(**body).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    joined = "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed(running, body))
    assert joined == choice.message.content
    flushed = running.openai().chat.completions.create(**GREEDY | {"max_tokens": 40, "stop": text[-3:] + "!"})
    assert flushed.choices[0].message.content == text  # a match that never completes is no loss


def test_a_cut_leaves_no_half_characters(running: Running) -> None:
    """Forced to write a character of four bytes: cut after each of them."""
    form = {"structured_outputs": {"choice": ["😀é"]}}
    for tokens in range(1, 8):
        body = GREEDY | form | {"max_tokens": tokens}
        text = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        assert text == ("" if tokens < 4 else "😀" if tokens < 6 else "😀é")
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed(running, body)) == text


def test_what_clients_send_without_asking(running: Running) -> None:
    names = (
        "n stop seed stream tools tool_choice logprobs top_logprobs response_format logit_bias user stream_options"
        " presence_penalty frequency_penalty top_p max_completion_tokens parallel_tool_calls modalities audio"
        " reasoning_effort only_experts speakers functions"
    )
    odd = dict.fromkeys(names.split()) | {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "verbosity": "low",
        "reasoning_effort": "low",
        "field_of_the_future": {"x": [1]},
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "name": "me", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
            {"role": "user", "content": "And?"},
        ],
    }
    assert running.post("/v1/chat/completions", GREEDY | odd).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"top_p": 1.5}, "top_p"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 200}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
        ),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_what_cannot_be_is_refused(running: Running, change: dict[str, Any], param: str) -> None:
    error = refused(running, GREEDY | change)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    stream = running.post("/v1/chat/completions", GREEDY | change | {"stream": True})
    assert stream.status_code == 400  # known before the first byte


def test_a_prompt_that_does_not_fit(running: Running) -> None:
    error = refused(running, GREEDY | {"messages": [{"role": "user", "content": "x" * CONTEXT}]})
    assert error["code"] == "context_length_exceeded"
    assert str(CONTEXT) in error["message"]
    assert "4114 tokens" in error["message"]
    assert running.openai().chat.completions.create(**GREEDY | {"max_tokens": 10**6, "stop": "\n"}).choices
    with pytest.raises(openai.BadRequestError) as caught:
        running.openai().chat.completions.create(
            **GREEDY | {"messages": [{"role": "user", "content": "x" * 5000}]}
        )
    assert caught.value.code == "context_length_exceeded"


def test_control_words_in_content_stay_text(running: Running) -> None:
    spelled = running.post("/tokenize", {"messages": [{"role": "user", "content": "<|end|></s>"}]}).json()
    assert not set(spelled["tokens"]) & running.llm.tokenizer.special_ids


def test_a_model_that_is_not_there(running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        running.openai().chat.completions.create(**GREEDY | {"model": "gpt-5"})
    assert caught.value.code == "model_not_found"
    assert (
        running.post("/v1/chat/completions", {k: v for k, v in GREEDY.items() if k != "model"}).status_code
        == 200
    )


def test_answers_in_a_form(running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    body = GREEDY | {"response_format": form, "max_tokens": 200, "temperature": 1, "seed": 3}
    answer = running.openai().chat.completions.create(**body).choices[0]
    found = json.loads(answer.message.content or "")
    assert 0 <= found["a"] <= 9
    assert found["b"] in ("x", "y")
    assert answer.finish_reason == "stop"
    assert (
        "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed(running, body))
        == answer.message.content
    )
    for wrong, told in (
        (
            {
                "type": "object",
                "properties": {"a": {"type": "string", "pattern": "(?=a)b"}},
                "required": ["a"],
            },
            "look-a",
        ),
        ({"not": {"type": "string"}}, "not"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "string", "minLength": 10**7}, "too large"),
    ):
        strict = {"type": "json_schema", "json_schema": {"name": "it", "schema": wrong, "strict": True}}
        error = refused(running, GREEDY | {"response_format": strict})
        assert error["param"] == "response_format"
        assert told in error["message"]


def test_whole_numbers_may_be_written_as_floats(running: Running) -> None:
    body = GREEDY | {"max_tokens": 12.0, "n": 2.0, "seed": 3.0, "top_k": -1.0}
    found = running.post("/v1/chat/completions", body).json()
    assert found["usage"]["completion_tokens"] == 24
    assert refused(running, GREEDY | {"max_tokens": 1.5})["param"] == "max_tokens"


def test_options_of_other_engines(running: Running) -> None:
    """What would change the answer is refused, values that change nothing are taken."""
    expected = running.post("/v1/chat/completions", GREEDY).json()["choices"]
    neutral = {
        "mirostat": 0,
        "typical_p": 1.0,
        "dry_multiplier": 0,
        "length_penalty": 1,
        "best_of": 1,
        "echo": False,
    }
    neutral |= {"allowed_token_ids": None, "bad_words": [], "grammar": "", "cache_salt": None, "priority": 0}
    assert running.post("/v1/chat/completions", GREEDY | neutral).json()["choices"] == expected
    for name, value in {
        "mirostat": 2,
        "typical_p": 0.5,
        "dry_multiplier": 0.8,
        "best_of": 2,
        "echo": True,
        "allowed_token_ids": [5],
        "bad_words": ["no"],
        "grammar": 'root ::= "a"',
        "regex": "a+",
        "json_schema": {"type": "integer"},
        "cache_salt": "x",
        "lora_path": "x",
        "prompt_logprobs": 1,
    }.items():
        error = refused(running, GREEDY | {name: value})
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_token_ids(running: Running) -> None:
    expected = running.llm.chat(HI, SamplingParams(temperature=0, max_tokens=12))
    body = GREEDY | {"return_token_ids": True}
    whole = running.post("/v1/chat/completions", body).json()
    assert whole["prompt_token_ids"] == expected.prompt_token_ids
    assert whole["choices"][0]["token_ids"] == expected.outputs[0].token_ids
    chunks = streamed(running, body)
    assert [c["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c] == [expected.prompt_token_ids]
    told = [token for c in chunks for choice in c["choices"] for token in choice.get("token_ids", [])]
    assert told == expected.outputs[0].token_ids
    text = running.post("/v1/completions", {"prompt": "Hi", "max_tokens": 3, "return_token_ids": True}).json()
    assert text["choices"][0]["prompt_token_ids"] == running.llm.tokenizer.encode_prompt("Hi")
    assert len(text["choices"][0]["token_ids"]) == 3


def test_answers_at_once_share_the_cache(start: Start) -> None:
    """n answers to the end of the context may take no more than the cache holds, and all of them end."""
    small = start(engine={"num_blocks": 30})
    body = GREEDY | {"n": 4, "max_tokens": None, "ignore_eos": True, "temperature": 1, "seed": 1}
    found = small.post("/v1/chat/completions", body).json()
    assert [choice["finish_reason"] for choice in found["choices"]] == ["length"] * 4
    assert found["usage"]["completion_tokens"] <= 30 * 16
    assert found["usage"]["completion_tokens"] >= 4 * 64
    assert small.idle()
    error = refused(small, GREEDY | {"n": 65})
    assert (error["param"], error["message"]) == ("n", "n: found 65, allowed: an integer from 1 to 64")
