"""What the engine hands back: the whole of a request's answers, or what one step added to one of them.

    output = llm.generate("Once")[0]; output.outputs[0].text, output.outputs[0].finish_reason
    for delta in llm.stream("Once"): print(delta.text, end="")

Field names are vLLM's where vLLM has the field. Plain data: nothing here refers to the engine, so an output can be kept,
compared and pickled. Texts never end inside a character; ids may be ahead of the text while one is unfinished.

Every delta of a mixture names its token's speaker, the expert with the most routing weight over the layers, and that
expert's share of it. Routing traces (only where `SamplingParams.routed_experts` asked): row t of an answer's trace is
what the routers chose *while the model produced token t*, that is at the position before it; so the last row of the
prompt's trace is the first of the answer's. Layers are the model's own; those without a router hold -1 (weight 0).

Shapes: tokens of the prompt or answer, layers of the model, top_k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from octad.errors import RequestError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability (natural logarithm) before temperature and filters; rank 1 is the most likely."""

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token and the most likely ones at its place, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class RequestMetrics:
    """Moments of a request in seconds of time.monotonic; None where they have not come yet."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None


@dataclass
class CompletionOutput:
    """One of a request's n answers so far. `token_ids` holds an end token that stopped it, `text` does not.

    finish_reason: "stop" (an end token, or stop_reason: the stop string or token id that was met), "length" (max_tokens
    or the model's context), "abort", "error" (the structured output failed underway, or the model computes no numbers:
    stop_reason says it), or None while it runs. `routed_experts` is int16 and `routed_weights` float32, both
    [tokens, layers, top_k]; `speakers` names per token the expert with the most weight over the layers.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    routed_experts: torch.Tensor | None = None
    routed_weights: torch.Tensor | None = None
    speakers: list[int] | None = None


@dataclass
class RequestOutput:
    """A prompt and its answers. `num_cached_tokens`: how many of the prompt's tokens were found in the prefix cache.

    `prompt_routed_experts` begins at `routed_experts_prompt_start`. `prompt_logprobs`: one entry a token, None for the
    first, which nothing stands before."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics
    prompt_routed_experts: torch.Tensor | None = None
    prompt_routed_weights: torch.Tensor | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def check(self) -> None:
        """Raises RequestError where an answer failed underway."""
        for answer in self.outputs:
            if answer.finish_reason == "error":
                raise RequestError(f"the answer failed: {answer.stop_reason}")


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer. Texts of all deltas joined are the answer's text, likewise ids and the rest.

    An answer's last delta has a finish_reason; it may have no new text. `speaker_shares`: of the routing weight, 0 to 1,
    what the speaker has. `num_cached_tokens`: of the prompt, found in the prefix cache.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    speakers: tuple[int, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    speaker_shares: tuple[float, ...] | None = None
    num_cached_tokens: int = 0
