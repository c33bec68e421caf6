"""`octad serve --backend`: another server's answers passed on, with who spoke where it tells; in front of servers that
send what vLLM, SGLang and llama-server send, and of octad's own."""

# ruff: noqa: F401, F811 (fixtures are imported)

import base64
import json
import socket
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from fake_engines import LAYERS, TOP_K, WORDS, FakeEngine, routes
from fronting import Front, front, until
from serving import Running, running, served_mixture, start

from octad.errors import RequestError
from octad.serve.backend import base_url
from octad.serve.foreign_routes import aligned, routes_in, speakers
from octad.serve.security import Access

HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
NAMES = ["general", "french", "maths", "code"]
ANSWER = "".join(WORDS)


def expected_speakers() -> list[tuple[str, str]]:
    """By hand: at position p both layers give a place each to (p, p + 1) and (p + 1, p + 2): p + 1 has two of four."""
    return [(word, NAMES[(at + 1) % 4]) for at, word in enumerate(WORDS)]


def chunks_of(text: str) -> list[dict[str, Any]]:
    frames = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data:")]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


# ---- in front of octad itself ------------------------------------------------------------------------------


def test_octad_in_front_of_octad(running: Running, front: Front) -> None:
    """Everything is there that is there without: clients, masks, speakers, errors, names."""
    shown = front(running.url)
    body = HI | {"model": "mixture", "temperature": 0, "max_tokens": 12}
    direct = running.openai().chat.completions.create(**body)
    client = shown.client()
    assert client.chat.completions.create(**body).choices[0].message == direct.choices[0].message
    streamed = client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}, extra_body={"speakers": True}
    )
    chunks = list(streamed)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == direct.choices[0].message.content
    told = [s for c in chunks if c.choices for s in (c.choices[0].model_extra or {}).get("speakers", [])]
    assert "".join(s["token"] for s in told) == text
    assert chunks[-1].usage is not None
    assert direct.usage is not None
    assert chunks[-1].usage.total_tokens == direct.usage.total_tokens
    assert [m.id for m in client.models.list()] == ["mixture"]
    assert shown.get("/v1/experts").json() == running.get("/v1/experts").json()
    assert shown.post("/tokenize", {"prompt": "Hi"}).json()["count"] == 2
    masked = shown.post("/v1/chat/completions", body | {"only_experts": ["french"], "speakers": True}).json()
    assert {s["expert"] for s in masked["choices"][0]["speakers"]} == {"french"}
    refused = shown.post("/v1/chat/completions", body | {"model": "other"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "octad:generation_tokens_total" in shown.get("/metrics").text
    answer = httpx2.post(
        shown.url + "/v1/messages",
        json={"model": "mixture", "max_tokens": 4, "messages": body["messages"], "stream": True},
        timeout=30,
    )
    assert answer.text.startswith("event: message_start")


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_ends_the_backends_work(running: Running, front: Front, stream: bool) -> None:
    shown = front(running.url)
    body = HI | {"model": "mixture", "max_tokens": 3000, "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", shown.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        until(lambda: running.llm.engine.stats.running == 1)
    until(running.idle)


# ---- what other engines tell -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_who_spoke_in_a_whole_answer(front: Front, kind: str) -> None:
    with FakeEngine(kind) as engine:
        shown = front(engine.url, names=NAMES, shape=(LAYERS, TOP_K), made={"base": "x"})
        told = shown.get("/v1/experts").json()
        assert [row["name"] for row in told["data"]] == NAMES
        assert (told["layers"], told["top_k"], told["masks"], told["make_up"]) == (2, 2, False, {"base": "x"})
        answer = shown.post("/v1/chat/completions", HI | {"speakers": True}).json()
        choice = answer["choices"][0]
        assert choice["message"]["content"] == ANSWER
        assert [(s["token"], s["expert"]) for s in choice["speakers"]] == expected_speakers()
        assert {s["weight"] for s in choice["speakers"]} == {0.5}
        assert choice["logprobs"] is None
        assert "routed_experts" not in choice
        assert "sglext" not in answer
        text = shown.post("/v1/completions", {"model": "m", "prompt": "Hi", "speakers": True}).json()
        assert [(s["token"], s["expert"]) for s in text["choices"][0]["speakers"]] == expected_speakers()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_who_spoke_in_a_stream(front: Front, kind: str) -> None:
    """They are known at the end: a chunk before [DONE] names them all; the rest is as it came."""
    with FakeEngine(kind) as engine:
        shown = front(engine.url, names=NAMES, shape=(LAYERS, TOP_K))
        body = HI | {"speakers": True, "stream": True, "stream_options": {"include_usage": True}}
        chunks = chunks_of(shown.post("/v1/chat/completions", body).text)
        assert (
            "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == ANSWER
        )
        last = chunks[-1]["choices"][0]
        assert [(s["token"], s["expert"]) for s in last["speakers_of_answer"]] == expected_speakers()
        assert chunks[-2]["usage"]["completion_tokens"] == len(WORDS)
        rest = json.dumps(chunks[:-1])
        assert "token_ids" not in rest
        assert "sglext" not in rest
        assert all(c["choices"][0].get("logprobs") is None for c in chunks if c["choices"])


def test_names_and_shape_that_nobody_told(front: Front) -> None:
    """Without the mixture at hand experts have numbers; SGLang's bare numbers are counted by the row all the same."""
    for kind in ("vllm", "sglang"):
        with FakeEngine(kind) as engine:
            shown = front(engine.url)
            names = [row["name"] for row in shown.get("/v1/experts").json()["data"]]
            assert names == [f"expert {i}" for i in range(4)]
            answer = shown.post("/v1/chat/completions", HI | {"speakers": True}).json()
            found = [s["expert"] for s in answer["choices"][0]["speakers"]]
            assert found == [f"expert {NAMES.index(name)}" for _, name in expected_speakers()]


def test_a_backend_without_routing(front: Front) -> None:
    with FakeEngine("plain") as engine:
        shown = front(engine.url)
        assert shown.get("/v1/experts").json()["data"] == []
        client = shown.client()
        assert client.chat.completions.create(**HI).choices[0].message.content == ANSWER
        for field in ({"speakers": True}, {"return_routed_experts": True}, {"only_experts": [0]}):
            refused = shown.post("/v1/chat/completions", HI | field)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == next(iter(field))
        assert (
            shown.post("/v1/chat/completions", HI | {"speakers": False, "only_experts": None}).status_code
            == 200
        )
    with FakeEngine("vllm") as engine:
        masked = front(engine.url).post("/v1/chat/completions", HI | {"only_experts": [0]})
        assert (masked.status_code, masked.json()["error"]["param"]) == (400, "only_experts")


def test_the_page_and_the_guards_are_the_same(front: Front) -> None:
    with FakeEngine("plain") as engine:
        shown = front(engine.url)
        assert "octad" in shown.get("/").text
        assert shown.get("/health").json() == {"status": "ok"}
        assert shown.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert (
            shown.post("/v1/chat/completions", HI, headers={"Origin": "https://evil.example"}).status_code
            == 403
        )
        assert shown.get("/etc/passwd").status_code == 404
        assert shown.get("/v1/%2e%2e/secret").json()["error"]["code"] == "not_found"
        assert not any("secret" in path for path, _, _ in engine.requests)
        assert shown.get("/v1/models", headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc"
        assert engine.requests[-1][2]["x-request-id"] == "abc"


# ---- keys --------------------------------------------------------------------------------------------------


def test_keys(front: Front, tmp_path: Path) -> None:
    """Without keys of its own the clients' are passed on; with them they stay here, and the backend gets its own."""
    (tmp_path / "keys").write_text("mine\n")
    access = Access.of("127.0.0.1", (), (), tmp_path / "keys")
    with FakeEngine("vllm", key="theirs") as engine:
        passing = front(engine.url)
        assert passing.client(api_key="theirs").chat.completions.create(**HI).choices
        wrong = passing.post("/v1/chat/completions", HI)
        assert (wrong.status_code, wrong.json()["error"]["message"]) == (401, "Unauthorized")
        assert passing.get("/v1/experts").json()["data"] == []  # nobody's key to ask with
        guarded = front(engine.url, access, key="theirs", pass_keys=False)
        assert guarded.client(api_key="mine").chat.completions.create(**HI).choices
        assert engine.requests[-1][2]["authorization"] == "Bearer theirs"
        assert guarded.client(api_key="mine").models.list().data
        with pytest.raises(openai.AuthenticationError):
            guarded.client(api_key="theirs").chat.completions.create(**HI)
        told = guarded.get("/v1/experts", headers={"Authorization": "Bearer mine"}).json()
        assert len(told["data"]) == 4
        lost = front(engine.url, access, pass_keys=False)
        assert (
            lost.post("/v1/chat/completions", HI, headers={"Authorization": "Bearer mine"}).status_code == 401
        )
        assert "mine" not in str([headers for _, _, headers in engine.requests])


# ---- trouble -----------------------------------------------------------------------------------------------


def test_a_backend_that_is_not_there(front: Front) -> None:
    with FakeEngine("plain") as engine:
        engine.down = True
        shown = front(engine.url, wait=False)
        until(lambda: shown.app.state.stage.startswith("the backend answered 503"))
        health = shown.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        early = shown.post("/v1/chat/completions", HI)
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        assert early.headers["retry-after"]
        engine.down = False
        until(lambda: shown.get("/health").status_code == 200)
        engine.down = True
        until(lambda: shown.get("/health").json()["status"] == "unreachable")
        assert shown.post("/v1/chat/completions", HI).json()["error"]["code"] == "unreachable"
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        shown = front(f"http://127.0.0.1:{closed.getsockname()[1]}", wait=False)
        until(lambda: "cannot be reached" in shown.app.state.stage)
        shown.app.backend.ended.set()
        shown.app.state.become("ready", "")  # as if it had been there a moment ago
        for stream in (True, False):
            gone = shown.post("/v1/chat/completions", HI | {"stream": stream})
            assert (gone.status_code, gone.json()["error"]["code"]) == (502, "backend_unreachable")
            assert gone.headers["retry-after"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"object": "error", "message": "flat", "type": "BadRequest", "code": 400}, "flat"),
        ({"detail": "a detail"}, "a detail"),
        ({"detail": [{"loc": ["body"], "msg": "missing"}]}, "missing"),
        ({"error": {"message": "good", "type": "t", "param": "p", "code": "c"}}, "good"),
        (["odd"], "the backend answered 400"),
    ],
)
def test_errors_of_any_form(front: Front, body: Any, message: str) -> None:
    with FakeEngine("plain") as engine:
        shown = front(engine.url)
        engine.status, engine.error = 400, body
        for stream in (True, False):
            answer = shown.post("/v1/chat/completions", HI | {"stream": stream})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert message in error["message"]


def test_a_stream_that_breaks_or_takes_too_long(front: Front) -> None:
    with FakeEngine("plain") as engine:
        engine.pace = 0.3
        text = front(engine.url, seconds=0.8).post("/v1/chat/completions", HI | {"stream": True}).text
        assert text.endswith("data: [DONE]\n\n")
        assert json.loads(text.split("data: ")[-2])["error"]["code"] == "backend_timeout"
        assert WORDS[0] in text


# ---- arithmetic --------------------------------------------------------------------------------------------


def test_speakers_from_ids_by_hand() -> None:
    ids = np.array([[[0, 1], [0, 2]], [[3, 1], [1, -1]], [[-1, -1], [-1, -1]]])
    found = speakers(ids, ["a", "b", "c"], "abc", NAMES)
    assert [(s["token"], s["expert"], s["weight"]) for s in found] == [
        ("a", "general", 0.5),
        ("b", "french", 0.6667),
        ("c", None, 0.0),
    ]
    tie = speakers(np.array([[[2, 1], [2, 1]]]), ["x"], "x", NAMES)
    assert tie[0]["expert"] == "maths"  # as many places, more often the first
    after = speakers(ids, ["a", "b", "c"], "c", NAMES, skipped="ab")
    assert [s["token"] for s in after] == ["", "", "c"]
    assert speakers(ids[1:], ["a", "b", "c"], "abc", NAMES)[0]["expert"] is None  # no row for it


def test_tokens_and_text() -> None:
    assert aligned(["a", "b"], "ab") == ["a", "b"]
    assert aligned(["<s>", "a", "\ufffd", "\ufffd", "b"], "aüb") == ["", "a", "", "ü", "b"]
    assert aligned(["x"], "other") == ["other"]
    assert aligned(["a", "</s>"], "a") == ["a", ""]
    assert aligned([], "") == []


def test_routes_that_cannot_be_read() -> None:
    for told in (None, 5, "!!!", base64.b64encode(b"\x93NUMPY rubbish").decode(), "AAAA"):
        assert routes_in({}, {"routed_experts": told}, (2, 2)) is None
    pickled = base64.b64encode(b"\x93NUMPY\x01\x00v\x00{'descr': '|O', }").decode()
    assert routes_in({}, {"routed_experts": pickled}, (2, 2)) is None
    raw = base64.b64encode(routes(range(3)).tobytes()).decode()
    assert routes_in({"sglext": {"routed_experts": raw}}, None, (LAYERS, TOP_K)).shape == (3, 2, 2)


def test_addresses() -> None:
    assert base_url("http://host:8000/v1/") == "http://host:8000"
    assert base_url("https://host/prefix") == "https://host/prefix"
    for wrong in ("host:8000", "ftp://host", "http://", "http://user:key@host", "http://host?x=1"):
        with pytest.raises(RequestError, match="--backend"):
            base_url(wrong)
