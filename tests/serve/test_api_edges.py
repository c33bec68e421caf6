"""What clients ask at the edges: forms that exclude each other, lists of allowed tools, options of paths that have none,
names of templates, large bodies, and the words in which errors are told."""

# ruff: noqa: F401, F811 (fixtures are imported)

import gzip
import json
import socket
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from serving import CONTEXT, Running, Start, running, served_mixture, start

from octad.engine.detokenize import token_bytes
from octad.serve.security import Access, host_name

HI = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "mixture", "messages": HI, "temperature": 0, "max_tokens": 6}
TEXT = {"model": "mixture", "prompt": "Hi", "temperature": 0, "max_tokens": 6}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("now", "then", "never")]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (
            "chat/completions",
            {"response_format": FORM, "structured_outputs": {"regex": "a"}},
            "response_format",
        ),
        ("completions", {"response_format": FORM, "structured_outputs": {"regex": "a"}}, "response_format"),
        ("completions", {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ("completions", {"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ("completions", {"structured_outputs": {"json": 3}}, "structured_outputs"),
        ("chat/completions", {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ("chat/completions", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ("chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat/completions", {"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
        ("chat/completions", {"max_new_tokens": 5}, "max_new_tokens"),
        ("completions", {"prompt": ["a", [1]]}, "prompt"),
        ("completions", {"prompt": [True]}, "prompt"),
        ("completions", {"prompt": {"a": 1}}, "prompt"),
        ("embeddings", {"input": [1.0]}, "input"),
        ("embeddings", {"input": None}, "input"),
        ("responses", {"max_output_tokens": 0}, "max_output_tokens"),
        ("responses", {"max_tokens": 5}, "max_tokens"),
        ("responses", {"n": 2}, "n"),
        ("responses", {"speakers": True}, "speakers"),
        ("responses", {"prompt": {"id": "pmpt_1"}}, "prompt"),
        ("messages", {"stop_sequences": ["x"] * 65}, "stop_sequences"),
        ("messages", {"n": 2}, "n"),
        ("messages", {"return_routed_experts": True}, "return_routed_experts"),
        ("messages", {"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)
def test_what_is_refused_names_its_field(
    running: Running, path: str, change: dict[str, Any], param: str
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "chat/completions": CHAT,
        "completions": TEXT,
        "embeddings": {"input": "Hi"},
        "responses": {"input": "Hi"},
        "messages": {"messages": HI, "max_tokens": 5},
    }
    found = running.post(f"/v1/{path}", bodies[path] | change)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)


def test_a_limit_is_told_in_json_words(running: Running) -> None:
    error = running.post("/v1/completions", TEXT | {"max_tokens": -1}).json()["error"]
    assert error["message"] == "max_tokens: found -1, allowed: an integer from 1, or null"


def test_names_that_tokenize_has_too(running: Running) -> None:
    found = running.post("/tokenize", {"messages": HI, "chat_template_kwargs": {"messages": []}})
    assert found.json()["error"]["param"] == "chat_template_kwargs"


def test_only_the_allowed_tools_are_called(running: Running) -> None:
    """OpenAI's allowed_tools in both forms; all tools are told, one of two can be called."""
    named = [{"type": "function", "function": {"name": "then"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": named}}
    for seed in range(3):
        body = CHAT | {
            "tools": TOOLS,
            "tool_choice": choice,
            "max_tokens": 80,
            "temperature": 1,
            "seed": seed,
        }
        (call,) = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "then"
    flat = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "then"}]}
    tools = [{"type": "function", "name": name} for name in ("now", "then")]
    body = {"input": "Hi", "tools": tools, "tool_choice": flat, "max_output_tokens": 80}
    assert running.post("/v1/responses", body).json()["output"][0]["name"] == "then"
    for wrong in ([{"type": "function", "function": {"name": "other"}}], [], "x"):
        refused = CHAT | {
            "tools": TOOLS,
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": wrong}},
        }
        assert running.post("/v1/chat/completions", refused).json()["error"]["param"] == "tool_choice"


def test_options_that_responses_and_messages_share(running: Running) -> None:
    """stop, penalties, forms of vLLM's: they do what they do in a chat."""
    longer = CHAT | {"max_tokens": 30}
    text = running.post("/v1/chat/completions", longer).json()["choices"][0]["message"]["content"]
    stop = text[3:6]
    body = {"input": "Hi", "temperature": 0, "max_output_tokens": 30, "stop": stop}
    said = running.post("/v1/responses", body).json()["output"][0]["content"][0]["text"]
    assert said == text[: text.index(stop)]
    form = {"structured_outputs": {"choice": ["blue"]}}
    told = running.post("/v1/messages", {"messages": HI, "max_tokens": 9} | form).json()
    assert told["content"][0]["text"] == "blue"
    answer = running.post("/v1/responses", {"input": "Hi", "max_output_tokens": 9} | form).json()
    assert answer["output"][0]["content"][0]["text"] == "blue"


def test_usage_in_every_chunk(running: Running) -> None:
    for path, body in (("chat/completions", CHAT), ("completions", TEXT)):
        options = {"include_usage": True, "continuous_usage_stats": True}
        text = running.post(f"/v1/{path}", body | {"stream": True, "stream_options": options}).text
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        told = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert told == sorted(told)
        assert told[-1] == 6
        assert chunks[-1]["choices"] == []


def test_the_bytes_of_tokens_are_their_own(running: Running) -> None:
    """Parts of a character have their bytes, so that all of them joined are the text."""
    form = {"structured_outputs": {"choice": ["😀é!"]}}
    body = CHAT | form | {"logprobs": True, "max_tokens": 20}
    choice = running.post("/v1/chat/completions", body).json()["choices"][0]
    joined = bytes(byte for place in choice["logprobs"]["content"] for byte in place["bytes"])
    assert joined.decode().removesuffix("<|end|>") == choice["message"]["content"] == "😀é!"
    tokenizer = running.llm.tokenizer
    assert [token_bytes(tokenizer, i) for i in tokenizer.encode("é")] == [b"\xc3", b"\xa9"]
    assert token_bytes(tokenizer, next(iter(tokenizer.special_ids))) == b"<|end|>"


def test_old_forms_of_messages(running: Running) -> None:
    """function_call and a refusal are said, not dropped."""
    new = {"type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    called = running.post(
        "/tokenize", {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [new]}]}
    )
    old = {"role": "assistant", "content": None, "function_call": new["function"]}
    assert running.post("/tokenize", {"messages": [*HI, old]}).json() == called.json()
    refusal = {"role": "assistant", "content": None, "refusal": "I will not."}
    told = running.post("/tokenize", {"messages": [*HI, refusal]}).json()["tokens"]
    assert "I will not." in running.llm.tokenizer.decode(told)


def test_too_long_in_the_words_that_agents_look_for(running: Running) -> None:
    """Those of Anthropic's and OpenAI's, on every path."""
    long = "x" * 5000
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": long}], "max_tokens": 5}),
        ("/v1/responses", {"input": long}),
        ("/v1/completions", {"prompt": long}),
    ):
        error = running.post(path, body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "prompt is too long" in error["message"]
        assert f"maximum context length is {CONTEXT} tokens" in error["message"]


def test_errors_have_the_form_of_their_path(running: Running) -> None:
    """OpenAI's object alone, and Anthropic's below its paths, from the layers before them too."""
    assert running.post("/v1/chat/completions", {}).json().keys() == {"error"}
    assert running.get("/v1/nothing").json().keys() == {"error"}
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/nothing"):
        assert running.post(path, {}).json()["type"] == "error"
    foreign = running.post("/v1/messages", {}, headers={"Origin": "https://evil.example"})
    assert (foreign.status_code, foreign.json()["type"]) == (403, "error")
    with pytest.raises(anthropic.NotFoundError) as caught:
        running.anthropic().messages.create(model="other", max_tokens=5, messages=HI)  # type: ignore[arg-type]
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index, call-overload]


def test_a_body_that_is_packed(running: Running) -> None:
    packed = gzip.compress(json.dumps(CHAT).encode())
    found = httpx2.post(
        running.url + "/v1/chat/completions", content=packed, headers={"Content-Encoding": "gzip"}
    )
    assert (found.status_code, found.json()["error"]["code"]) == (415, "unsupported_content_encoding")
    assert found.headers["accept-encoding"] == "identity"
    form = httpx2.post(running.url + "/v1/completions", files={"file": b"x"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_a_large_body_is_heard_before_it_is_refused(start: Start, tmp_path: Path) -> None:
    """Whoever sends a megabyte to the wrong path, or with a wrong key, reads why, and the connection lives on."""
    (tmp_path / "keys").write_text("right\n")
    running = start(Access.of("127.0.0.1", key_file=tmp_path / "keys"))
    body = json.dumps(CHAT | {"padding": "x" * 900_000}).encode()
    with httpx2.Client(base_url=running.url) as client:
        for path, key, status in (
            ("/v1/chat/completions", "wrong", 401),
            ("/v1/nothing", "right", 404),
            ("/v1/models", "right", 405),
            ("/v1/chat/completions", "right", 200),
        ):
            found = client.post(path, content=body, headers={"Authorization": f"Bearer {key}"})
            assert found.status_code == status
    both = {"Authorization": "Bearer x", "x-api-key": "right"}
    assert running.post("/v1/chat/completions", CHAT, headers=both).status_code == 200


def test_one_that_waits_to_be_asked_is_told_at_once(running: Running) -> None:
    """Expect: 100-continue with a body that is too large: no byte of it is asked for."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    answer = running.raw(head + b"Content-Length: 9000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_requests_one_after_the_other(running: Running) -> None:
    """Pipelined: two requests at once on one connection, answered in order; then one more by HTTP/1.0."""
    one = b"GET /v1/models/mixture HTTP/1.1\r\nHost: localhost\r\n\r\n"
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = running.raw(one + two)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.index(b'"mixture"') < answer.index(b'{"status":"ok"}')
    assert b" 200 " in running.raw(b"GET /health HTTP/1.0\r\n\r\n")
    for path in (b"/v1/models", b"/health", b"/metrics", b"/"):
        head, _, body = running.raw(
            b"HEAD " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        ).partition(b"\r\n\r\n")
        assert (b" 200 " in head, body) == (True, b"")


def test_names_in_a_host_header() -> None:
    for host, name in (
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("[::1]:8000", "::1"),
        ("evil@localhost", ""),
        ("localhost/evil", ""),
        ("localhost:evil", ""),
        ("localhost:80:80", ""),
        ("localhost#x", ""),
        ("[::1", ""),
        ("", ""),
    ):
        assert host_name(host) == name


def test_a_preflight_gets_the_headers_that_it_asks_for(start: Start) -> None:
    """The openai and anthropic clients of a browser send a dozen of their own."""
    running = start(Access.of("127.0.0.1", cors=["https://app.example"]))
    wanted = "authorization,content-type,x-stainless-lang,anthropic-dangerous-direct-browser-access"
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": wanted,
        "Access-Control-Request-Private-Network": "true",
    }
    answer = httpx2.options(running.url + "/v1/messages", headers=headers)
    allowed = answer.headers["access-control-allow-headers"].lower()
    assert set(wanted.split(",")) <= {name.strip() for name in allowed.split(",")}
    assert answer.headers["access-control-allow-private-network"] == "true"
    odd = httpx2.options(
        running.url + "/v1/messages", headers=headers | {"Access-Control-Request-Headers": "a\x7fb"}
    )
    assert "a\x7fb" not in odd.headers.get("access-control-allow-headers", "")


def test_models_for_both_clients(running: Running) -> None:
    (theirs,) = running.anthropic().models.list().data
    assert (theirs.id, theirs.display_name, theirs.type) == ("mixture", "mixture", "model")
    assert theirs.created_at.year >= 2026
    assert running.get("/v1/models/").json() == running.get("/v1/models").json()


def test_faults_of_the_server_have_the_form_too(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """And say nothing of the inside."""

    def broken(*_: Any) -> None:
        raise ValueError("secret path")

    monkeypatch.setattr(running.llm.tokenizer, "encode_chat", broken)
    for path, extra in (("/v1/chat/completions", {}), ("/v1/messages", {"max_tokens": 3})):
        found = running.post(path, {"messages": HI} | extra)
        assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in found.text


def test_a_chunk_that_is_only_text_is_made_as_all_others(running: Running) -> None:
    """The quick way for most tokens gives the bytes that the long one gives."""

    def texts(**options: Any) -> list[dict[str, Any]]:
        body = CHAT | {
            "messages": [{"role": "user", "content": 'a "b" \\ \n'}],
            "max_tokens": 30,
            "stream": True,
        }
        frames = running.post("/v1/chat/completions", body | options).text.split("\n\n")
        found = [json.loads(frame[6:]) for frame in frames if frame.startswith("data: {")]
        return [{k: v for k, v in chunk.items() if k not in ("id", "created", "usage")} for chunk in found]

    assert texts(n=2) == texts(n=2, stream_options={"continuous_usage_stats": True})


def test_many_readers_are_woken_at_once() -> None:
    """One call into the loop for all that were woken before it came to it; none is forgotten."""
    import asyncio

    from octad.engine.loop import Bell

    async def wait() -> tuple[int, list[int]]:
        loop, heard, calls = asyncio.get_running_loop(), list[int](), 0
        bell, real = Bell(loop), loop.call_soon_threadsafe

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*arguments)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        for _ in range(2):
            for number in range(5):
                bell.ring(lambda number=number: heard.append(number))  # type: ignore[misc]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return calls, heard

    assert asyncio.run(wait()) == (2, [0, 1, 2, 3, 4] * 2)


def test_a_body_of_two_lengths_is_refused(running: Running) -> None:
    """What one server reads as a body another reads as the next request."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
    answer = running.raw(head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_http"' in answer


def test_a_schema_of_a_tool_that_is_none(running: Running) -> None:
    """The line says what is wrong, without the grammar that was made of it."""
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "odd"}}}},
    }
    error = running.post("/v1/chat/completions", CHAT | {"tools": [tool]}).json()["error"]
    assert error["param"] == "tools"
    assert error["message"].endswith("Invalid type: odd")


def test_parts_of_contents_that_are_none(running: Running) -> None:
    for part, told in (
        ({"type": "text", "text": None}, "has no text"),
        ({"type": ["text"], "text": "x"}, "reads text alone"),
        ({"type": {"a": 1}}, "reads text alone"),
        ([], "reads text alone"),
    ):
        found = running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]})
        assert found.status_code == 400
        assert told in found.json()["error"]["message"]
