"""POST /v1/responses: OpenAI's newer form of a conversation, translated to the chat path and back; nothing is stored.

    response = await responses(request, generator, names)

Items become messages: texts, function calls, their outputs; reasoning that a client sends back is left out. Tools of
other types than functions are skipped with a line in the log: agents send them to every server. `previous_response_id`
and whatever else needs a store is refused.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import count
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octad.serve.chat_completions import token_entries
from octad.serve.event_stream import EventStream, frame, unless_gone
from octad.serve.generation import Generator, Job, Piece
from octad.serve.limits import read_body
from octad.serve.listing import ModelNames
from octad.serve.protocol import ResponsesRequest, check_absent, check_one_answer, parse
from octad.serve.replies import ApiError, as_api_error, json_response
from octad.serve.sampling_options import response_schema, sampling
from octad.serve.tool_calls import Toolbox

NOT_HERE = {
    "max_tokens": "use max_output_tokens",
    "prompt": "templates of prompts are not kept here; use input",
    "response_format": "use text.format",
    "messages": "use input",
}
log = logging.getLogger("octad.serve")


async def responses(request: Request, generator: Generator, names: ModelNames) -> Response:
    """The endpoint; `names` are those that the model answers to."""
    asked = parse(ResponsesRequest, await read_body(request))
    model = names.of(asked.model)
    job = await unless_gone(request, _begin(asked, generator))
    answer = _Answer(asked, job, model)
    if asked.stream:
        return EventStream(_events(answer, job), job.close)
    try:
        await unless_gone(request, answer.read())
        return json_response(answer.response())
    finally:
        job.close()


async def _begin(asked: ResponsesRequest, generator: Generator) -> Job:
    check_one_answer(asked)
    check_absent(asked, NOT_HERE)
    logged = "message.output_text.logprobs" in (asked.include or ())
    logprobs = asked.top_logprobs or 0 if logged or asked.top_logprobs else None
    called = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
    params = sampling(asked, generator.llm, asked.max_output_tokens, logprobs, called)
    toolbox = Toolbox.of(
        _tools(asked.tools or ()), _tool_choice(asked.tool_choice), asked.parallel_tool_calls
    )
    form = (asked.text or {}).get("format")
    if form is not None and not isinstance(form, Mapping):
        raise ApiError(400, "text.format: should be an object", param="text.format")
    messages = as_messages(asked.input, asked.instructions)
    if not asked.input or not messages:
        raise ApiError(400, "input: is empty; give at least one message", param="input")
    return await generator.chat(messages, params, toolbox, response_schema(form, "text.format"))


def _tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Functions in the form of chat completions."""
    found = []
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise ApiError(400, "tools: should be objects", param="tools")
        if tool.get("type") != "function":
            log.warning("tools of type %s are skipped", ascii(tool.get("type"))[:50])
            continue
        function = {
            k: tool[k] for k in ("name", "description", "parameters", "strict") if tool.get(k) is not None
        }
        found.append({"type": "function", "function": tool.get("function", function)})
    return found


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict) or choice.get("type") == "function":
        return choice
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        kept = [t for t in choice["tools"] if isinstance(t, dict) and t.get("type", "function") == "function"]
        if kept or not choice["tools"]:
            return choice | {"tools": kept}
    return "auto"  # a tool that was skipped


def as_messages(given: str | Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """Input items as messages. Raises ApiError for an item that has no meaning here."""
    found: list[dict[str, Any]] = []
    if instructions:
        found.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    for place, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise ApiError(400, f"input[{place}]: should be an object", param="input")
        kind = item.get("type", "message")
        if kind == "message":
            found.append({"role": item.get("role"), "content": item.get("content")})
        elif kind in ("function_call", "custom_tool_call"):
            function = {"name": item.get("name"), "arguments": item.get("arguments", item.get("input"))}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if found and found[-1].get("tool_calls"):
                found[-1]["tool_calls"].append(call)
            else:
                found.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind in ("function_call_output", "custom_tool_call_output"):
            said = item.get("output")
            text = said if isinstance(said, (str, list)) else json.dumps(said)
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind == "item_reference":
            raise ApiError(
                400, f"input[{place}]: nothing is stored here, so no item can be referred to", param="input"
            )
        elif kind != "reasoning":
            log.warning("input items of type %s are skipped", ascii(kind)[:50])
    return found


class _Answer:
    """The response object as it grows."""

    def __init__(self, asked: ResponsesRequest, job: Job, model: str) -> None:
        self.asked, self.job, self.model = asked, job, model
        self.id, self.created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self.output: list[dict[str, Any]] = []
        self.reason: str | None = None

    async def read(self) -> None:
        """Everything to the end."""
        async for piece in self.job.pieces():
            for _ in self.add(piece):
                pass
        for _ in self.finish():
            pass

    def response(self, error: dict[str, Any] | None = None) -> dict[str, Any]:
        """The object that clients read."""
        cut, asked = self.reason == "length", self.asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "failed" if error else self._status(),
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.model,
            "output": self.output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.job.params.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": self.job.params.top_p,
            "truncation": "disabled",
            "user": None,
            "metadata": asked.metadata or {},
            "usage": None if self.reason is None else self._usage(),
        }

    def _status(self) -> str:
        if self.reason is None:
            return "in_progress"
        return "incomplete" if self.reason == "length" else "completed"

    def _usage(self) -> dict[str, Any]:
        usage = self.job.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.answered,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.answered,
        }

    # ---- events: (type, fields) ----------------------------------------------------------------------------

    def add(self, piece: Piece) -> list[tuple[str, dict[str, Any]]]:
        """What one piece brings, as events."""
        events: list[tuple[str, dict[str, Any]]] = []
        if piece.text:
            events += self._text(piece)
        for call in piece.calls:
            if call.name is not None:
                events += self._close()
                item = {
                    "id": f"fc_{secrets.token_hex(12)}",
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": call.id,
                    "name": call.name,
                    "arguments": "",
                }
                self.output.append(item)
                events.append(("response.output_item.added", self._at() | {"item": dict(item)}))
            item = self.output[-1]
            item["arguments"] = str(item["arguments"]) + call.arguments
            if call.arguments:
                where = self._at() | {"item_id": item["id"]}
                events.append(("response.function_call_arguments.delta", where | {"delta": call.arguments}))
        self.reason = piece.finish_reason or self.reason
        return events

    def finish(self) -> list[tuple[str, dict[str, Any]]]:
        """What ends the last item."""
        if not self.output:  # an answer of nothing is a message, too
            return [*self._open(), *self._close()]
        return self._close()

    def _text(self, piece: Piece) -> list[tuple[str, dict[str, Any]]]:
        events = []
        if not self.output or self.output[-1]["type"] != "message":
            events += [*self._close(), *self._open()]
        item = self.output[-1]
        part = item["content"][0]
        part["text"] += piece.text
        told = token_entries([piece.delta] if piece.delta else [], self.job)
        part["logprobs"] += told
        where = self._at() | {"item_id": item["id"], "content_index": 0}
        events.append(("response.output_text.delta", where | {"delta": piece.text, "logprobs": told}))
        return events

    def _open(self) -> list[tuple[str, dict[str, Any]]]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self.output.append(item | {"content": [part]})
        where = self._at()
        return [
            ("response.output_item.added", where | {"item": item}),
            (
                "response.content_part.added",
                where | {"item_id": item["id"], "content_index": 0, "part": dict(part)},
            ),
        ]

    def _close(self) -> list[tuple[str, dict[str, Any]]]:
        if not self.output or self.output[-1]["status"] != "in_progress":
            return []
        item, where = self.output[-1], self._at()
        item["status"] = "incomplete" if self.reason == "length" else "completed"
        events: list[tuple[str, dict[str, Any]]] = []
        if item["type"] == "message":
            part = item["content"][0]
            at = where | {"item_id": item["id"], "content_index": 0}
            events.append(
                ("response.output_text.done", at | {"text": part["text"], "logprobs": part["logprobs"]})
            )
            events.append(("response.content_part.done", at | {"part": part}))
        else:
            at = where | {"item_id": item["id"], "name": item["name"], "arguments": item["arguments"]}
            events.append(("response.function_call_arguments.done", at))
        return [*events, ("response.output_item.done", where | {"item": item})]

    def _at(self) -> dict[str, Any]:
        return {"output_index": len(self.output) - 1}


async def _events(answer: _Answer, job: Job) -> AsyncGenerator[bytes]:
    numbers = count()

    def event(kind: str, fields: dict[str, Any]) -> bytes:
        return frame({"type": kind, "sequence_number": next(numbers)} | fields, kind)

    try:
        for kind in ("response.created", "response.in_progress"):
            yield event(kind, {"response": answer.response()})
        async for piece in job.pieces():
            for told in answer.add(piece):
                yield event(*told)
        for told in answer.finish():
            yield event(*told)
        last = "response.incomplete" if answer.reason == "length" else "response.completed"
        yield event(last, {"response": answer.response()})
    except Exception as error:
        told_error = as_api_error(error)
        if told_error.code == "internal_error":
            raise
        about = {"code": told_error.code or "server_error", "message": told_error.message}
        yield event("response.failed", {"response": answer.response(about)})
    finally:
        job.close()
