"""Agents' APIs: /v1/responses with the openai client, /v1/messages with anthropic's, beside the chat path's answers."""

# ruff: noqa: F401, F811 (fixtures are imported)

import json
import shutil
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from serving import CONTEXT, Running, Start, running, served_mixture, start

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
FLAT = {"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True}
THEIRS = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}


def said(running: Running, messages: list[dict[str, Any]], **options: Any) -> str:
    body = {"model": "mixture", "messages": messages, "temperature": 0, "max_tokens": 12} | options
    content: str = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    return content


def respond(running: Running, **options: Any) -> Any:
    return running.openai().responses.create(model="mixture", temperature=0, **options)


def test_a_response_is_the_chats_answer(running: Running) -> None:
    found = respond(running, input="Hi", instructions="Be brief.", max_output_tokens=12)
    expected = said(running, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert found.output_text == expected
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (found.usage.output_tokens, found.usage.total_tokens) == (12, found.usage.input_tokens + 12)
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    ]
    assert respond(running, input=items, max_output_tokens=12).output_text == expected


def test_a_streamed_response(running: Running) -> None:
    whole = respond(running, input="Hi", max_output_tokens=12)
    with running.openai().responses.stream(
        model="mixture", input="Hi", max_output_tokens=12, temperature=0
    ) as stream:
        events = list(stream)
        final = (
            stream.get_final_response() if events[-1].type == "response.completed" else events[-1].response
        )
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text == final.output_text


def test_a_responses_calls(running: Running) -> None:
    options = {
        "input": "Hi",
        "tools": [FLAT, {"type": "web_search"}],
        "tool_choice": "required",
        "max_output_tokens": 200,
    }
    (call,) = respond(running, **options).output
    assert (call.type, call.name, call.status) == ("function_call", "add", "completed")
    assert 0 <= json.loads(call.arguments)["a"] <= 99
    events = list(respond(running, **options, stream=True))
    pieces = "".join(
        event.delta for event in events if event.type == "response.function_call_arguments.delta"
    )
    assert pieces == call.arguments
    assert events[-1].type == "response.completed"
    assert events[-1].response.output[0].arguments == call.arguments
    back = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ]
    call_back = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    expected = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call_back]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    assert respond(running, input=back, max_output_tokens=12).output_text == said(running, expected)


def test_a_response_in_a_form(running: Running) -> None:
    form = {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA, "strict": True}}
    assert (
        0 <= json.loads(respond(running, input="Hi", text=form, max_output_tokens=100).output_text)["a"] <= 99
    )


@pytest.mark.parametrize(
    "change",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"background": True},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": []},
        {"max_output_tokens": 0},
        {"text": {"format": {"type": "xml"}}},
    ],
)
def test_responses_that_cannot_be(running: Running, change: dict[str, Any]) -> None:
    found = running.post("/v1/responses", {"model": "mixture", "input": "Hi"} | change)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["message"]


def test_a_message_is_the_chats_answer(running: Running) -> None:
    client = running.anthropic()
    found = client.messages.create(
        model="mixture",
        max_tokens=12,
        extra_body={"temperature": 0},
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    )
    expected = said(running, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert found.content[0].type == "text"
    assert found.content[0].text == expected
    assert (found.stop_reason, found.usage.output_tokens) == ("max_tokens", 12)
    counted = client.messages.count_tokens(
        model="mixture", system="Be brief.", messages=[{"role": "user", "content": "Hi"}]
    )
    used = found.usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_a_streamed_message(running: Running) -> None:
    client = running.anthropic()
    options: dict[str, Any] = {"model": "mixture", "max_tokens": 12, "extra_body": {"temperature": 0}}
    chat: list[Any] = [{"role": "user", "content": "Hi"}]
    whole = client.messages.create(**options, messages=chat)
    with client.messages.stream(**options, messages=chat) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == final.content[0].type == "text"
    assert text == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    stop = text[5:8]
    stopped = client.messages.create(**options | {"max_tokens": 40}, messages=chat, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


def test_a_messages_calls(running: Running) -> None:
    client = running.anthropic()
    options: dict[str, Any] = {
        "model": "mixture",
        "max_tokens": 200,
        "extra_body": {"temperature": 0},
        "tools": [THEIRS],
        "tool_choice": {"type": "any"},
    }
    whole = client.messages.create(**options, messages=[{"role": "user", "content": "Hi"}])
    (block,) = whole.content
    assert (block.type, block.name, whole.stop_reason) == ("tool_use", "add", "tool_use")
    with client.messages.stream(**options, messages=[{"role": "user", "content": "Hi"}]) as stream:
        final = stream.get_final_message().content[0]
    assert final.type == "tool_use"
    assert final.input == block.input
    back: list[Any] = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "tool_use", "id": block.id, "name": "add", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "2"}]},
    ]
    assert client.messages.create(
        **options | {"tool_choice": {"type": "auto"}, "max_tokens": 5}, messages=back
    ).content


def test_a_message_that_goes_on(running: Running) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
    found = running.anthropic().messages.create(
        model="mixture", max_tokens=12, extra_body={"temperature": 0}, messages=chat
    )  # type: ignore[arg-type]
    expected = said(running, chat, continue_final_message=True, add_generation_prompt=False)
    assert found.content[0].type == "text"
    assert found.content[0].text == expected


def test_messages_that_cannot_be(running: Running) -> None:
    client = running.anthropic()
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(
            model="mixture", max_tokens=5, messages=[{"role": "user", "content": "x" * 5000}]
        )
    assert caught.value.body["type"] == "error"  # type: ignore[index, call-overload]
    assert caught.value.body["error"]["code"] == "context_length_exceeded"  # type: ignore[index, call-overload]
    for change in (
        {"max_tokens": None},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": []},
        {"tool_choice": {"type": "tool", "name": "x"}},
        {"temperature": 99, "top_k": -5},
    ):
        body = {"model": "mixture", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]} | change
        found = running.post("/v1/messages", body)
        assert found.status_code == 400, (change, found.text)
        assert found.json()["type"] == "error"
    with pytest.raises(openai.NotFoundError):
        running.openai().responses.retrieve("resp_1")


def test_a_message_in_a_form(running: Running) -> None:
    """Anthropic's output_config: JSON of the schema, or a 400 that names the field."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    body = {"model": "mixture", "max_tokens": 200, "messages": [{"role": "user", "content": "Hi"}]}
    form = {"type": "json_schema", "schema": schema}
    answer = running.post("/v1/messages", body | {"output_config": {"format": form, "effort": "low"}}).json()
    assert 0 <= json.loads(answer["content"][0]["text"])["n"] <= 9
    for wrong in ("json", {"type": "json_schema"}):
        refused = running.post("/v1/messages", body | {"output_config": {"format": wrong}})
        assert refused.status_code == 400
        assert "output_config.format" in refused.json()["error"]["message"]


def test_a_chat_is_sampled_as_the_checkpoint_says(start: Start, served_mixture: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(served_mixture, tmp_path / "own"))
    file = own / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.0}))
    running, chat = start(model=own), [{"role": "user", "content": "Hi"}]
    body = {"model": "mixture", "messages": chat, "max_tokens": 12}
    answers = {
        running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        for _ in range(3)
    }
    assert answers == {said(running, chat)}
    client = running.openai()
    assert client.responses.create(model="mixture", input="Hi", max_output_tokens=2).temperature == 0
    asked = client.responses.create(model="mixture", input="Hi", max_output_tokens=2, temperature=0.5)
    assert asked.temperature == 0.5
