"""Answer: what becomes of the tokens that are sampled for one sequence: text, an end, log-probabilities, a trace.

    delta = answer.take(sampled, speaker)      # after each sampled token
    answer.output()                            # all so far

The sequence is the scheduler's side of an answer, this is the user's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octad.engine.detokenize import Detokenizer
from octad.engine.outputs import CompletionOutput, Delta, FinishReason, TokenLogprobs
from octad.model.observe import Speaker, Trace, speakers

if TYPE_CHECKING:
    import torch

    from octad.engine.sampling import Sampled, SamplingState
    from octad.engine.sequence import Sequence
    from octad.text.tokenizer import Tokenizer


class Answer:
    """One of a request's answers. `state` is what the sampler keeps for it; `limit` is the longest that prompt and answer
    may be together."""

    def __init__(
        self,
        sequence: Sequence,
        state: SamplingState,
        tokenizer: Tokenizer,
        eos_ids: tuple[int, ...],
        limit: int,
    ) -> None:
        self.sequence, self.state, self.params = sequence, state, sequence.request.params
        prompt = sequence.request.prompt
        self.detokenizer = Detokenizer(tokenizer, prompt, self.params)
        self.eos_ids = () if self.params.ignore_eos else eos_ids
        self.begin = len(prompt)
        self.longest = min(limit, self.begin + (self.params.max_tokens or limit))
        self.stop_reason: int | str | None = None
        self.logprobs: list[TokenLogprobs] | None = None if self.params.logprobs is None else []
        start = min(self.params.routed_experts_prompt_start, self.begin - 1)
        self.trace = Trace(start) if sequence.request.traced else None

    def take(self, sampled: Sampled, speaker: Speaker | None) -> Delta:
        """Add a token; says what is new. Sets the sequence's finish_reason where it is the last one."""
        sequence, token = self.sequence, sampled.token_id
        sequence.token_ids.append(token)
        self.state.append(token)
        sequence.finish_reason = self._end(token)
        text = self._push(token)
        if sampled.logprobs is not None and self.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
        return Delta(
            sequence.request.request_id,
            sequence.index,
            text,
            (token,),
            None if self.logprobs is None else tuple(self.logprobs[-1:]),
            None if speaker is None else (speaker[0],),
            sequence.finish_reason,
            self.stop_reason,
            None if speaker is None else (speaker[1],),
            sequence.request.num_cached_tokens or 0,
        )

    def output(self) -> CompletionOutput:
        """All of the answer so far, copied."""
        sequence = self.sequence
        answer = CompletionOutput(
            sequence.index,
            self.detokenizer.text,
            sequence.token_ids[self.begin :],
            finish_reason=sequence.finish_reason,
        )
        answer.stop_reason = self.stop_reason
        if self.logprobs is not None:
            answer.logprobs = list(self.logprobs)
            answer.cumulative_logprob = sum(entry.chosen.logprob for entry in self.logprobs)
        if self.trace is not None and len(self.trace) >= self.begin:
            experts, weights = self.trace.rows(self.begin - 1, len(sequence) - 1)
            answer.routed_experts, answer.routed_weights = experts, weights
            answer.speakers = speakers(experts, weights)
        return answer

    def prompt_trace(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(experts, weights) of the prompt's tokens from where the trace starts, as far as they have been computed; None
        where nobody asked."""
        if self.trace is None or not len(self.trace):
            return None, None
        return self.trace.rows(self.trace.start, self.begin)

    def _end(self, token: int) -> FinishReason | None:
        """Why this token, the newest, is the last: the form failed, an end token, a stop id, the form's end, or the
        length."""
        if (failure := self.state.failure) is not None:
            self.stop_reason = failure
            return "error"
        if token in self.eos_ids:
            return "stop"
        if token in self.params.stop_token_ids:
            self.stop_reason = token
            return "stop"
        if self.state.finished:
            return "stop"
        return "length" if len(self.sequence) >= self.longest else None

    def _push(self, token: int) -> str:
        """The text that the token makes known. A stop string in it ends the answer; a token that ended it has no text
        unless asked for."""
        sequence = self.sequence
        silent = token in self.eos_ids or token in self.params.stop_token_ids
        text = "" if silent and not self.params.include_stop_str_in_output else self.detokenizer.push(token)
        if self.detokenizer.stopped is not None:
            sequence.finish_reason, self.stop_reason = "stop", self.detokenizer.stopped
        if sequence.finish_reason is not None:
            text += self.detokenizer.finish()
        return text
