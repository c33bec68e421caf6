"""POST /v1/completions, tokens and embeddings: what lm-eval and the openai client ask, against the model itself."""

# ruff: noqa: F401, F811 (fixtures are imported)

import base64
from typing import Any

import numpy as np
import pytest
import torch
from serving import CONTEXT, Running, running, served_mixture, start

from octad.engine.params import SamplingParams

BODY = {"model": "mixture", "temperature": 0, "max_tokens": 6}


def scores(running: Running, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return running.llm.model(torch.tensor([ids]))[0].log_softmax(-1)


def test_prompts_of_every_kind(running: Running) -> None:
    client = running.openai()
    ids = running.llm.tokenizer.encode("abc")
    expected = (
        running.llm.generate([ids], SamplingParams(temperature=0, max_tokens=6))[0]
        .outputs[0]
        .text.rstrip("\ufffd")
    )
    for prompt in ("abc", ["abc"], ids, [ids], ["abc", "abc"], [ids, ids]):
        choices = client.completions.create(**BODY, prompt=prompt).choices
        assert {choice.text for choice in choices} == {expected}
        assert [choice.index for choice in choices] == list(range(len(choices)))
    assert client.completions.create(**BODY, prompt="").choices[0].finish_reason
    several = client.completions.create(**BODY | {"n": 2}, prompt=["abc", "x"])
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == expected
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (4, 24)


def test_streams(running: Running) -> None:
    client = running.openai()
    whole = client.completions.create(**BODY, prompt=["abc", "x"], echo=True)
    found = {0: "", 1: ""}
    for chunk in client.completions.create(**BODY, prompt=["abc", "x"], echo=True, stream=True):
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert list(found.values()) == [choice.text for choice in whole.choices]
    assert found[0].startswith("abc")


def test_scores_as_lm_eval_asks_for_them(running: Running) -> None:
    """Its local-completions model: ids, echo, logprobs=1, one token; it reads all but the last."""
    ids = running.llm.tokenizer.encode("A text that is scored, token by token.")
    for tokens in (0, 1):
        body = BODY | {
            "prompt": [ids, ids[:5]],
            "echo": True,
            "logprobs": 1,
            "max_tokens": tokens,
            "seed": 1234,
        }
        answer = running.post("/v1/completions", body).json()
        for choice, prompt in zip(answer["choices"], (ids, ids[:5]), strict=True):
            given = choice["logprobs"]
            assert len(given["tokens"]) == len(given["token_logprobs"]) == len(prompt) + tokens
            assert given["token_logprobs"][0] is None
            expected = scores(running, prompt)[range(len(prompt) - 1), prompt[1:]]
            ours = torch.tensor(given["token_logprobs"][1 : len(prompt)])
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
            best = scores(running, prompt).max(-1).values[:-1].tolist()
            tops = given["top_logprobs"][1 : len(prompt)]
            assert [max(top.values()) for top in tops] == pytest.approx(best, abs=1e-4)
        assert answer["usage"]["completion_tokens"] == 2 * tokens


def test_log_probabilities_of_answers(running: Running) -> None:
    for count in (0, 3):
        choice = running.openai().completions.create(**BODY, prompt="abc", logprobs=count).choices[0]
        assert choice.logprobs is not None
        assert len(choice.logprobs.token_logprobs or []) == 6
        assert all(len(top or {}) >= min(count, 1) for top in choice.logprobs.top_logprobs or [])
        assert (choice.logprobs.text_offset or [])[0] == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1.5]]}, "prompt"),
        ({"prompt": [999]}, None),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 1, "echo": True, "stream": True}, "stream"),
    ],
)
def test_what_cannot_be_is_refused(running: Running, change: dict[str, Any], param: str | None) -> None:
    response = running.post("/v1/completions", BODY | {"prompt": "abc"} | change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_tokens_there_and_back(running: Running) -> None:
    text = "Grüße <|end|>"
    found = running.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == running.llm.tokenizer.encode_prompt(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 4096
    assert running.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = running.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert chat["tokens"] == running.llm.tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    opened = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
    body = {"messages": opened, "continue_final_message": True, "add_generation_prompt": False}
    assert running.llm.tokenizer.decode(running.post("/tokenize", body).json()["tokens"]).endswith(
        "<assistant>So"
    )
    assert running.post("/tokenize", {}).status_code == 400
    assert running.post("/detokenize", {"tokens": [10**6]}).status_code == 400


def test_embeddings(running: Running) -> None:
    client = running.openai()
    ids = running.llm.tokenizer.encode_prompt("abc")
    with torch.no_grad():
        hidden = running.llm.model.model(torch.tensor([ids]))[0].float().mean(0)
    expected = (hidden / hidden.norm()).tolist()
    coded = client.embeddings.create(model="mixture", input=["abc", "x"])  # the client asks for base64
    assert coded.data[0].embedding == pytest.approx(expected, abs=1e-5)
    assert coded.usage.prompt_tokens == 4
    plain = client.embeddings.create(model="mixture", input=ids, encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(expected, abs=1e-5)
    raw = running.post("/v1/embeddings", {"input": "abc", "encoding_format": "base64"}).json()["data"][0][
        "embedding"
    ]
    assert np.frombuffer(base64.b64decode(raw), np.float32).tolist() == pytest.approx(expected, abs=1e-5)
    for wrong in (
        {"input": ""},
        {"input": []},
        {"input": "a", "dimensions": 3},
        {"input": "a", "encoding_format": "x"},
    ):
        assert running.post("/v1/embeddings", wrong).status_code == 400


def test_models_and_experts(running: Running) -> None:
    client = running.openai()
    (listed,) = client.models.list().data
    assert (listed.id, listed.max_model_len) == ("mixture", 4096)  # type: ignore[attr-defined]
    assert client.models.retrieve("mixture").id == "mixture"
    assert running.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    found = running.get("/v1/experts").json()
    assert [entry["name"] for entry in found["data"]] == running.llm.expert_names
    assert found["data"][0] == {"index": 0, "name": "general", "domain": "news"}
    assert (found["layers"], found["top_k"]) == (2, 2)
    assert found["make_up"] == {"experts": [{"name": "general", "domain": "news"}]}
