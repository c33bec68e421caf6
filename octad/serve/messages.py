"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of a conversation, translated to the chat path.

    response = await messages(request, generator, names)
    response = await count_tokens(request, generator, names)

Blocks become messages: texts, tool_use, tool_result; thinking that a client sends back is left out, and so are tools that
only Anthropic's own servers run. Pictures are refused. Errors carry "type": "error", as its clients expect.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octad.serve.chat_completions import Gathered
from octad.serve.event_stream import EventStream, frame, unless_gone
from octad.serve.generation import Generator, Job, Piece
from octad.serve.limits import read_body
from octad.serve.listing import ModelNames
from octad.serve.protocol import MessagesRequest, check_absent, check_one_answer, parse
from octad.serve.replies import ANTHROPIC, ApiError, as_api_error, json_response
from octad.serve.sampling_options import response_schema, sampling
from octad.serve.tool_calls import Toolbox

log = logging.getLogger("octad.serve")
LEFT_OUT = ("thinking", "redacted_thinking")


async def messages(request: Request, generator: Generator, names: ModelNames) -> Response:
    """The endpoint; `names` are those that the model answers to."""
    asked = parse(MessagesRequest, await read_body(request))
    model = names.of(asked.model)
    if asked.max_tokens is None:
        raise ApiError(400, "max_tokens: is missing", param="max_tokens", code="missing_required_parameter")
    job = await unless_gone(request, _begin(asked, generator))
    head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model}
    if asked.stream:
        return EventStream(_events(job, head), job.close)
    try:
        return json_response(await unless_gone(request, _whole(job, head)))
    finally:
        job.close()


async def count_tokens(request: Request, generator: Generator, names: ModelNames) -> Response:
    """How many tokens a conversation has."""
    asked = parse(MessagesRequest, await read_body(request))
    names.of(asked.model)
    chat, toolbox = as_chat(asked), _toolbox(asked)
    if not chat:
        raise ApiError(400, "messages: the conversation is empty", param="messages")
    ids = await generator.aside(lambda: generator.encode(chat, toolbox, _variables(chat)))
    return json_response({"input_tokens": len(ids)})


async def _begin(asked: MessagesRequest, generator: Generator) -> Job:
    check_one_answer(asked)
    check_absent(asked, {"response_format": "use output_config.format"})
    given = asked
    if stops := [text for text in asked.stop_sequences or [] if text]:
        given = asked.model_copy(update={"stop": stops})
    params = sampling(given, generator.llm, asked.max_tokens, None, {"stop": "stop_sequences"})
    chat = as_chat(asked)
    form = (asked.output_config or {}).get("format")
    if form is not None and not isinstance(form, Mapping):
        raise ApiError(400, "output_config.format: should be an object", param="output_config")
    schema = response_schema(form, "output_config.format")
    return await generator.chat(chat, params, _toolbox(asked), schema, _variables(chat))


def _variables(chat: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A conversation that ends with the assistant is one that it goes on with."""
    last = chat[-1] if chat else {}
    continued = last.get("role") == "assistant" and not last.get("tool_calls")
    return {"continue_final_message": True, "add_generation_prompt": False} if continued else {}


def _toolbox(asked: MessagesRequest) -> Toolbox:
    tools = []
    for place, tool in enumerate(asked.tools or ()):
        if not isinstance(tool, Mapping):
            raise ApiError(400, f"tools[{place}]: should be an object", param="tools")
        if tool.get("type") not in (None, "custom"):
            log.warning("tools of type %s are skipped", ascii(tool.get("type"))[:50])
            continue
        function = {
            "name": tool.get("name"),
            "description": tool.get("description") or "",
            "parameters": tool.get("input_schema"),
        }
        tools.append({"type": "function", "function": function})
    given = asked.tool_choice or {}
    named = {"type": "function", "function": {"name": given.get("name")}}
    choices: dict[Any, Any] = {None: None, "auto": "auto", "any": "required", "none": "none", "tool": named}
    kind = given.get("type")
    if not isinstance(kind, (str, type(None))) or kind not in choices:
        raise ApiError(
            400, f"tool_choice: found {ascii(kind)[:50]}, allowed: auto, any, tool, none", param="tool_choice"
        )
    return Toolbox.of(tools, choices[kind], False if given.get("disable_parallel_tool_use") is True else None)


def as_chat(asked: MessagesRequest) -> list[dict[str, Any]]:
    """System text and blocks as messages of the chat path. Raises ApiError for a block that has no meaning here."""
    found: list[dict[str, Any]] = []
    if asked.system:
        found.append({"role": "system", "content": _text(asked.system, "system")})
    for place, message in enumerate(asked.messages):
        if not isinstance(message, Mapping):
            raise ApiError(400, f"messages[{place}]: should be an object", param="messages")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise ApiError(
                400,
                f"messages[{place}].role: found {ascii(role)[:50]}, allowed: user, assistant",
                param="messages",
            )
        found += _from_blocks(str(role), content, f"messages[{place}]")
    return found


def _from_blocks(role: str, content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content: should be a text or a list of blocks", param="messages")
    texts, calls, results = [], [], []
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            text = _text(block.get("content") or "", f"{where}.content[{number}]")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind not in LEFT_OUT:
            raise ApiError(
                400, f"{where}.content[{number}]: is {kind!a}; this model reads text alone", param="messages"
            )
    said = {"role": role, "content": "".join(texts)}
    if calls:
        return [*results, said | {"content": said["content"] or None, "tool_calls": calls}]
    return [*results, said] if texts or not results else results


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(b, Mapping) and isinstance(b.get("text"), str) for b in content
    ):
        return "".join(block["text"] for block in content)
    raise ApiError(
        400, f"{where}: should be a text or blocks of text", param=where.partition("[")[0].partition(".")[0]
    )


def _stopped(reason: str, stopped: Any) -> dict[str, Any]:
    names = {"length": "max_tokens", "tool_calls": "tool_use"}
    by_text = reason == "stop" and isinstance(stopped, str)
    return {
        "stop_reason": "stop_sequence" if by_text else names.get(reason, "end_turn"),
        "stop_sequence": stopped if by_text else None,
    }


def _usage(job: Job) -> dict[str, int]:
    usage = job.usage
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.answered,
    }


async def _whole(job: Job, head: dict[str, Any]) -> dict[str, Any]:
    answer = Gathered()
    async for piece in job.pieces():
        answer.add(piece)
    content: list[dict[str, Any]] = []
    if answer.text or not answer.calls:
        content.append({"type": "text", "text": answer.text})
    for call in answer.calls:
        function = call["function"]
        content.append(
            {
                "type": "tool_use",
                "id": call["id"],
                "name": function["name"],
                "input": _input(function["arguments"]),
            }
        )
    stopped = job.outputs[0].outputs[0].stop_reason
    return head | {"content": content, "usage": _usage(job)} | _stopped(answer.reason, stopped)


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; of one that was cut off, nothing."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class _Blocks:
    """The events of an answer's blocks."""

    def __init__(self) -> None:
        self.index, self.open = -1, ""

    def add(self, piece: Piece) -> list[tuple[str, dict[str, Any]]]:
        """The events that a piece of the answer makes: names and data."""
        events = []
        if piece.text:
            if self.open != "text":
                events += self.begin("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.calls:
            if call.name is not None:
                block: dict[str, Any] = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                events += self.begin("tool_use", block)
            if call.arguments:
                events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return events

    def begin(self, kind: str, block: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        events = self.end()
        self.index, self.open = self.index + 1, kind
        return [*events, ("content_block_start", {"index": self.index, "content_block": block})]

    def end(self) -> list[tuple[str, dict[str, Any]]]:
        if not self.open:
            return []
        self.open = ""
        return [("content_block_stop", {"index": self.index})]

    def _delta(self, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"index": self.index, "delta": delta}


async def _events(job: Job, head: dict[str, Any]) -> AsyncGenerator[bytes]:
    def event(kind: str, fields: dict[str, Any]) -> bytes:
        return frame({"type": kind} | fields, kind)

    blocks, begun = _Blocks(), False
    job.usage.prompt = sum(map(len, job.prompts))
    reason, stopped = "stop", None
    try:
        async for piece in job.pieces():
            if not begun:
                begun = True
                start = head | {"content": [], "stop_reason": None, "stop_sequence": None}
                usage = _usage(job) | {"output_tokens": 0}
                yield event("message_start", {"message": start | {"usage": usage}})
                yield event("ping", {})
            for told in blocks.add(piece):
                yield event(*told)
            if piece.finish_reason is not None:
                reason = piece.finish_reason
                stopped = piece.delta.stop_reason if piece.delta else None
        if blocks.index < 0:
            for told in blocks.begin("text", {"type": "text", "text": ""}):
                yield event(*told)
        for told in blocks.end():
            yield event(*told)
        yield event("message_delta", {"delta": _stopped(reason, stopped), "usage": _usage(job)})
        yield event("message_stop", {})
    except Exception as error:
        told_error = as_api_error(error)
        if told_error.code == "internal_error":
            raise
        yield frame(told_error.body(ANTHROPIC), "error")
    finally:
        job.close()
