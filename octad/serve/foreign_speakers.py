"""`speakers` in front of vLLM and SGLang: what is asked of them in addition, and what their answers become.

    speaking = Speaking(asked, routing, chat=True)
    speaking.body                                           # for the backend
    speaking.whole(answer)                                  # a whole answer, with `speakers` in its choices
    async for frame in speaking.stream(frames, routes): ... # a stream; `speakers_of_answer` in a chunk at its end

The tokens' texts come from log-probabilities, which are asked for and taken out again. In a stream neither engine tells
routing as it goes: SGLang sends it before the end, of vLLM the whole text is asked again, as a prompt (its prefix cache
keeps the routing). So a stream's speakers come late, all at once: [{"token", "expert", "weight"}] whose texts joined are
the whole answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octad.serve.backend import Routing
from octad.serve.event_stream import DONE, frame
from octad.serve.foreign_routes import routes_in, speakers
from octad.serve.npy import encoded_ids

Routes = Callable[[list[int], int], Awaitable[dict[str, Any]]]


@dataclass
class _Told:
    """One choice of a stream so far."""

    text: str = ""
    thought: str = ""
    tokens: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    routes: Any = None


class Speaking:
    """One request. `asked` is the client's body, which stays as it is."""

    def __init__(self, asked: Mapping[str, Any], routing: Routing, *, chat: bool) -> None:
        self.asked, self.routing, self.chat = asked, routing, chat
        own = ("speakers", "only_experts")
        self.body = {name: value for name, value in asked.items() if name not in own}
        self.scored = asked.get("logprobs") not in (None, False)
        if not self.scored:
            self.body["logprobs"] = True if chat else 1
        start = asked.get("routed_experts_prompt_start") or 0
        if routing.kind == "sglang":
            self.body |= {"return_routed_experts": True, "routed_experts_start_len": start}
        elif asked.get("stream"):
            self.body["return_token_ids"] = True
        self.prompt: list[int] = []
        self.told: dict[int, _Told] = {}

    # ---- whole answers -------------------------------------------------------------------------------------

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer with speakers, without what the client did not ask for."""
        for choice in answer.get("choices") or ():
            first = choice.get("index", 0) == 0
            routes = routes_in(answer if first else {}, choice, (self.routing.layers, self.routing.top_k))
            if self.asked.get("speakers"):
                message = choice.get("message") or {"content": choice.get("text")}
                thought = message.get("reasoning") or message.get("reasoning_content") or ""
                tokens = self._tokens(choice)
                choice["speakers"] = (
                    None
                    if routes is None
                    else speakers(routes, tokens, message.get("content") or "", self.routing.names, thought)
                )
            self._clean(choice)
            if routes is not None and self.asked.get("return_routed_experts"):
                choice["routed_experts"] = encoded_ids(routes)  # SGLang's, in vLLM's form
        if not self.asked.get("return_routed_experts"):
            answer.pop("sglext", None)
        return answer

    def _tokens(self, choice: Mapping[str, Any]) -> list[str]:
        scored = choice.get("logprobs") or {}
        if self.chat:
            return [str(entry.get("token", "")) for entry in scored.get("content") or ()]
        return [str(token) for token in scored.get("tokens") or ()]

    def _clean(self, choice: dict[str, Any]) -> None:
        """Take out what was asked for on octad's own account."""
        if not self.scored:
            choice["logprobs"] = None
        if not self.asked.get("return_token_ids"):
            choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
        if not self.asked.get("return_routed_experts"):
            choice.pop("routed_experts", None)

    # ---- streams -------------------------------------------------------------------------------------------

    async def stream(self, parts: AsyncGenerator[bytes], routes: Routes) -> AsyncGenerator[bytes]:
        """The backend's events, then the speakers, then the end."""
        head: dict[str, Any] = {}
        try:
            async for data in events(parts):
                if data == "[DONE]":
                    break
                chunk = json.loads(data)
                head = {
                    name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk
                } or head
                if self._hear(chunk):
                    yield frame(chunk)
            for chunk in await self._late(routes):
                yield frame(head | chunk)
            yield DONE
        finally:
            await parts.aclose()

    def _hear(self, chunk: dict[str, Any]) -> bool:
        """Note what a chunk tells and take out what is octad's affair; False where nothing is left to send."""
        self.prompt = chunk.get("prompt_token_ids") or self.prompt
        for choice in chunk.get("choices") or ():
            told = self.told.setdefault(choice.get("index", 0), _Told())
            delta = choice.get("delta") or {"content": choice.get("text")}
            told.text += delta.get("content") or ""
            told.thought += delta.get("reasoning") or delta.get("reasoning_content") or ""
            told.tokens += self._tokens(choice)
            told.ids += choice.get("token_ids") or []
            self.prompt = choice.get("prompt_token_ids") or self.prompt
            self._clean(choice)
        if not self.asked.get("return_token_ids"):
            chunk.pop("prompt_token_ids", None)
        return bool(chunk.get("choices") or chunk.get("usage") or chunk.get("error") or self._routed(chunk))

    def _routed(self, chunk: dict[str, Any]) -> bool:
        """Note SGLang's routing; whether the client is to have the chunk."""
        shape = self.routing.layers, self.routing.top_k
        if self.told and (found := routes_in(chunk, None, shape)) is not None:
            self.told.setdefault(0, _Told()).routes = found
        return bool(chunk.get("sglext")) and bool(self.asked.get("return_routed_experts"))

    async def _late(self, routes: Routes) -> list[dict[str, Any]]:
        """A chunk for each choice with what is known at the end only."""
        chunks = []
        for index, told in sorted(self.told.items()):
            more: dict[str, Any] = {}
            if self.routing.kind == "vllm" and self.prompt and told.ids:
                start = self.asked.get("routed_experts_prompt_start") or 0
                asked = self.asked.get("return_routed_experts")
                answer = await routes(self.prompt + told.ids[:-1], start if asked else len(self.prompt) - 1)
                choice = (answer.get("choices") or [{}])[0]
                told.routes = routes_in(answer, choice, (0, 0))
            if told.routes is not None and self.asked.get("return_routed_experts"):
                more["routed_experts"] = encoded_ids(told.routes)
            if self.asked.get("speakers"):
                found = None
                if told.routes is not None:
                    found = speakers(told.routes, told.tokens, told.text, self.routing.names, told.thought)
                more["speakers_of_answer"] = found
            delta: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
            chunks.append({"choices": [{"index": index, **delta, "finish_reason": None} | more]})
        return chunks


async def events(parts: AsyncIterator[bytes]) -> AsyncGenerator[str]:
    """The data of server-sent events, however they are cut."""
    held = b""
    async for part in parts:
        held = (held + part).replace(b"\r\n", b"\n")
        *whole, held = held.split(b"\n\n")
        for event in whole:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines).decode("utf-8", "replace")
