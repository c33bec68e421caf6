"""A conversation with a model: what was said, what of it still fits, and what is being said now; no terminal here.

    session = Session(llm, SamplingParams(temperature=0.7), system="Be brief.")
    for delta in session.ask("Hi"):            # closing this iterator stops the answer; what was said stays
        print(delta.text, end="")
    session.last.tokens_per_second, session.turns
    session.save(Path("talk.json"))            # {"model": ..., "messages": [{"role": "user", "content": "Hi"}, ...]}

The whole conversation is kept, but only its newest part is sent: once it fills the context, the oldest turns are left
out, down to three quarters of the room, so that the prompts of the following turns begin alike and the engine finds
them in its prefix cache.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from octad.chat import transcript as record
from octad.chat.speakers import expert_number
from octad.chat.transcript import Turn, check_text
from octad.engine.params import mix_seed
from octad.errors import CheckpointError, DataError, RequestError
from octad.figures import percent

if TYPE_CHECKING:
    from octad.engine.llm import LLM
    from octad.engine.outputs import Delta
    from octad.engine.params import SamplingParams
    from octad.text.tokenizer import Tokenizer


@dataclass
class Answer:
    """The answer that is being given, or was given last; times in seconds of time.monotonic."""

    prompt_tokens: int
    started: float
    first: float = 0.0
    latest: float = 0.0
    cached_tokens: int = 0
    tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    speakers: Counter[int] = field(default_factory=Counter)
    newly_forgotten: int = 0

    def add(self, delta: Delta) -> None:
        """Count what one step brought."""
        self.latest = time.monotonic()
        self.first = self.first or self.latest
        self.text += delta.text
        self.tokens += len(delta.token_ids)
        self.finish_reason = delta.finish_reason
        self.cached_tokens = delta.num_cached_tokens
        self.speakers.update(delta.speakers or ())

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the question to the first token."""
        return max(0.0, self.first - self.started)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, which shows the prompt's cost instead; None for fewer than two."""
        seconds = self.latest - self.first
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else None

    @property
    def notice(self) -> str:
        """What happened to the conversation before this answer; empty for nothing."""
        count = self.newly_forgotten
        turns = "turn does" if count == 1 else f"{count} turns do"
        return f"the oldest {turns} not fit the context any more: left out from now on" if count else ""

    def summary(self, expert_names: Sequence[str]) -> str:
        """One line: length, speed, time to first token, prompt and how much of it was cached, who spoke most."""
        speed = self.tokens_per_second
        parts = ["1 token" if self.tokens == 1 else f"{self.tokens} tokens"]
        parts += [f"{speed:.1f} tokens/s"] if speed else []
        parts += [f"first {self.time_to_first_token:.2f} s"]
        parts += [f"prompt {self.prompt_tokens}, {self.cached_tokens} cached"]
        if self.speakers:
            (expert, count), *_ = self.speakers.most_common(1)
            parts += [f"{expert_names[expert]} {percent(count / self.speakers.total())}"]
        if self.finish_reason == "length":
            parts += ["cut off"]
        elif self.finish_reason is None:
            parts += ["stopped"]
        return " · ".join(parts)


class Session:
    """A conversation with `llm`. `params` are those of the next answer; `show_speakers` is for whoever displays it."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str | None = None,
        label: str = "",
        speaker: str | None = None,
    ) -> None:
        """`label` is what the user calls the model, `speaker` the one expert that is to answer.

        Raises CheckpointError for a model without a chat template, RequestError for an expert that is not there."""
        require_chat_template(llm.tokenizer, label)
        self.llm, self.params, self.label = llm, params, label
        self.set_system(system or None)
        self.turns: list[Turn] = []
        self.forgotten = 0  # of the turns, how many are no longer sent
        self.only(speaker)
        self.show_speakers = False
        self.last: Answer | None = None
        self._tries = 0  # at the last question

    # ---- talking -------------------------------------------------------------------------------------------

    def ask(self, question: str) -> Generator[Delta]:
        """The answer, as it comes; it joins the conversation when it ends or is closed, unless nothing was said.

        Raises DataError for a question that is empty, not text, or refused by the chat template, and RequestError for one
        that is longer than the context."""
        if not question.strip():
            raise DataError("the message is empty; write something")
        check_text(question, "the message")
        self._tries = 0
        return self._answer(question, self.turns)

    def retry(self) -> Generator[Delta]:
        """Another answer to the last question, in place of the one given (which stays where nothing new is said).

        Raises RequestError before the first turn."""
        if not self.turns:
            raise RequestError("there is no answer to give again yet; ask something first")
        self._tries += 1
        return self._answer(self.turns[-1].question, self.turns[:-1])

    def undo(self) -> Turn:
        """Takes the last turn back. Raises RequestError where there is none."""
        if not self.turns:
            raise RequestError("there is no turn to take back yet; ask something first")
        self.forgotten = min(self.forgotten, len(self.turns) - 1)
        self._tries = 0
        return self.turns.pop()

    def reset(self) -> None:
        """Forgets every turn; system text, settings and expert stay."""
        self.turns, self.forgotten, self.last = [], 0, None

    def set_system(self, text: str | None) -> None:
        """What the model is told before everything else. Raises DataError for what is not text."""
        check_text(text or "", "the system text")
        self.system = text

    def only(self, expert: str | None) -> None:
        """Sends every token to one expert; None lets the routers choose again. Raises RequestError for an unknown one."""
        self._only = None if expert is None else (expert_number(self.llm, expert),)
        self.speaker = expert

    def _answer(self, question: str, history: Sequence[Turn]) -> Generator[Delta]:
        """Fits the prompt now, so that its mistakes show and `forgotten` is known before the first token."""
        before = self.forgotten
        prompt = self._fit(question, history)
        answer = self.last = Answer(len(prompt), time.monotonic())
        answer.newly_forgotten = max(0, self.forgotten - before)
        return self._stream(question, prompt, answer, keep=len(history))

    def _stream(self, question: str, prompt: Sequence[int], answer: Answer, keep: int) -> Generator[Delta]:
        deltas = self.llm.stream(prompt, self._params(len(prompt), keep))
        try:
            for delta in deltas:
                answer.add(delta)
                yield delta
                if delta.finish_reason == "error":
                    raise RequestError(f"the answer failed: {delta.stop_reason}")
        finally:
            if answer.text or answer.finish_reason:
                self.turns[keep:] = [Turn(question, answer.text)]
            deltas.close()  # type: ignore[attr-defined]  # a generator: closing it frees the engine's blocks

    # ---- what fits -----------------------------------------------------------------------------------------

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may take together."""
        return self.llm.engine.max_model_len

    def _fit(self, question: str, history: Sequence[Turn]) -> list[int]:
        """Ids of as much of the history as leaves room for an answer."""
        first = min(self.forgotten, len(history))
        room = self.context - min(self.params.max_tokens or self.context, self.context // 4)
        ids = self._encode(history[first:], question)
        if len(ids) > room:
            while len(ids) > room * 3 // 4 and first < len(history):
                first += 1
                ids = self._encode(history[first:], question)
        if len(ids) >= self.context:
            taken = f"takes {len(ids)} tokens with what goes around it"
            raise RequestError(f"the message {taken}, the model's context is {self.context}; shorten it")
        self.forgotten = first
        return ids

    def _encode(self, turns: Sequence[Turn], question: str) -> list[int]:
        return self.llm.tokenizer.encode_chat(record.messages(self.system, turns, question))

    def _params(self, prompt_tokens: int, turn: int) -> SamplingParams:
        """The settings of this answer: within the context, and with a seed of its own for each turn and try."""
        left = self.context - prompt_tokens
        seed = self.params.seed
        if seed is not None:
            seed = mix_seed(seed, turn, self._tries)
        most = min(self.params.max_tokens or left, left)
        return replace(self.params, max_tokens=most, seed=seed, only_experts=self._only)

    # ---- files ---------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes the whole conversation. Raises OutputError where it cannot, or would replace something else."""
        record.write(path, self.label, self.system, self.turns)

    def load(self, path: Path) -> None:
        """Goes on with a saved conversation, whose system text it takes over. Raises DataError for anything else."""
        self.system, self.turns = record.read(path)
        self.forgotten, self.last = 0, None


def require_chat_template(tokenizer: Tokenizer, label: str) -> None:
    """Raises CheckpointError for a model that was never taught to hold a conversation."""
    if tokenizer.chat_template is None:
        name = label or tokenizer.label
        raise CheckpointError(
            f'{name}: has no chat template, so it only continues text; use: octad generate {name} "TEXT"'
        )
