"""From a batch of logits to one token for each sequence.

    state = SamplingState(params, prompt_ids, eos_ids, index=0)       # one for each answer
    sampler = Sampler(text_of=lambda token: token_text(tokenizer, token))     # of octad.engine.detokenize
    for state, sampled in zip(states, sampler.sample(logits_RV, states)):
        state.append(sampled.token_id)

Order, as in vLLM: logit_bias; repetition, frequency and presence penalties; min_tokens (end and stop tokens are
masked); the grammar; temperature; min-p; top-k; top-p; the draw. Equally likely tokens are kept or dropped together.
Log-probabilities are the model's own: of the raw logits, before all of that. `distribution` is the slow twin that
defines what is drawn from.

What shapes it: a vocabulary is wide and sorting it is slow (7 ms a row of 49,152 on one core, against 0.04 ms for its
exponentials), so nothing is sorted. Top-k takes the k-th largest weight as a floor. Top-p draws from everything above
the floor and, where the token lies outside the nucleus, draws again among the likelier ones only: the accepted token
has the nucleus's distribution (Ye et al., "Sorting-Free GPU Kernels for LLM Sampling", FlashInfer, 2025). A draw takes
one uniform number of the row's own generator, so a seeded row does not depend on its neighbours.

Shapes: R rows (sequences) of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from octad.engine.draw import LEAST, Buffer, Numbers, generator, keep, likeliest, pick, total
from octad.engine.outputs import TokenLogprob, TokenLogprobs
from octad.engine.params import SamplingParams, mix_seed
from octad.kernels.drawing import Drawing

BROKEN = "the model computes no numbers (NaN or infinite logits): its weights are damaged, or too large for the dtype"
LARGEST = 1e37  # of a logit: differences of two are still float32 numbers


class Grammar(Protocol):
    """What a sampler needs of octad.engine.structured.Matcher."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""

    @property
    def error(self) -> str | None:
        """Why the form failed underway, if it did."""

    def mask(self, logits_V: Tensor) -> None:
        """Set what the grammar does not allow next to -inf, in place."""

    def accept(self, token: int) -> None:
        """Move on by one token."""


@dataclass(frozen=True)
class Sampled:
    """A drawn token, with log-probabilities where the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class TokenCounts:
    """The distinct tokens of a prompt and its answer, and how often each stands in the answer.

    Sparse and growing: a token costs O(1) to add, a penalty O(distinct tokens) to apply.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._slots = {token: slot for slot, token in enumerate(distinct)}
        self._ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    def add(self, token: int) -> None:
        """Count one more token of the answer."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            more = max(64, slot)
            self._ids = np.concatenate([self._ids, np.zeros(more, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, dtype=np.float32)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def penalise(self, logits_V: Tensor, params: SamplingParams) -> None:
        """Repetition counts prompt and answer, frequency and presence the answer alone; in place."""
        size, device = len(self._slots), logits_V.device
        ids = torch.from_numpy(self._ids[:size]).to(device)
        counts = torch.from_numpy(self._counts[:size]).to(device)
        seen = logits_V[ids]
        factor = params.repetition_penalty
        seen = torch.where(seen > 0, seen / factor, seen * factor)
        seen -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits_V[ids] = seen.clamp_(-LARGEST, LARGEST)  # an extreme penalty is no infinity


class SamplingState:
    """What the sampler remembers of one answer; `index` tells a request's n answers apart."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_ids: Sequence[int],
        index: int = 0,
        matcher: Grammar | None = None,
    ) -> None:
        self.params, self.matcher = params, matcher
        self.broken = False  # the model's logits are no numbers
        self.output_ids: list[int] = []
        self.numbers: Numbers | None = None  # of a generator of its own
        if params.seed is not None:
            self.numbers = Numbers(generator().manual_seed(mix_seed(params.seed, index) & 0xFFFFFFFF))
        self._counts = TokenCounts(prompt_ids) if params.penalised else None
        self._ends = torch.tensor([*eos_ids, *params.stop_token_ids], dtype=torch.int64)
        self._end_ids = frozenset(self._ends.tolist())
        plain = params.greedy and params.logprobs is None and not params.logit_bias and matcher is None
        self._likeliest = plain and self._counts is None
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)

    def append(self, token: int) -> None:
        """Count a token of the answer and move the grammar on. The end token is a token too."""
        self.output_ids.append(token)
        if self._counts is not None:
            self._counts.add(token)
        if self.matcher is not None:
            self.matcher.accept(token)

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and allows nothing more: stop, even without an end token."""
        return self.matcher is not None and self.matcher.finished

    @property
    def failure(self) -> str | None:
        """Why the answer cannot go on, or have the form that it should, else None."""
        if self.broken:
            return BROKEN
        return None if self.matcher is None else self.matcher.error

    @property
    def adjusts(self) -> bool:
        """Whether the next logits need `adjust`."""
        early = len(self.output_ids) < self.params.min_tokens
        return early or self._counts is not None or self.matcher is not None or bool(self.params.logit_bias)

    def takes(self, token: int) -> bool:
        """Whether the likeliest token of the raw logits is the one, and nothing else is to be said of it."""
        early = len(self.output_ids) < self.params.min_tokens
        return self._likeliest and token >= 0 and not (early and token in self._end_ids)

    def adjust(self, logits_V: Tensor) -> None:
        """Apply logit_bias, the penalties, min_tokens and the grammar to float32 logits, in place."""
        device = logits_V.device
        if self.params.logit_bias:
            logits_V[self._biased.to(device)] += self._biases.to(device)
        if self._counts is not None:
            self._counts.penalise(logits_V, self.params)
        if len(self.output_ids) < self.params.min_tokens:
            logits_V[self._ends[self._ends < len(logits_V)].to(device)] = -math.inf
        if self.matcher is not None:
            self.matcher.mask(logits_V)


class Sampler:
    """Draws one token a row. `text_of` gives the text of a token that is reported with its log-probability; `seed` is
    that of the generator which all rows without a seed share (None: a new one each time). `drawing`: the kernels that
    draw, for logits on the CPU; without it PyTorch does."""

    def __init__(
        self,
        text_of: Callable[[int], str] | None = None,
        seed: int | None = None,
        drawing: Drawing | None = None,
    ) -> None:
        self._text_of = text_of or (lambda token: "")
        self._seed, self._drawing = seed, drawing
        self._work, self._scratch = Buffer(), Buffer()

    @cached_property
    def _shared(self) -> Numbers:
        shared = generator()
        if self._seed is None:
            shared.seed()
        else:
            shared.manual_seed(self._seed)
        return Numbers(shared)

    def sample(
        self, logits_RV: Tensor, states: Sequence[SamplingState], likeliest: Sequence[int] | None = None
    ) -> list[Sampled]:
        """One token for each row; the logits (any float dtype, any device) are left as they are. `likeliest`: of each row
        the largest logit's token, or -1 where that is no number, if it is known."""
        if likeliest is not None and all(map(SamplingState.takes, states, likeliest)):
            return [Sampled(token) for token in likeliest]
        if not states:
            return []
        wanted = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        by_kernels = self._drawing is not None and not wanted and not any(state.adjusts for state in states)
        with nullcontext() if by_kernels else torch.inference_mode():
            tokens = self._choose(logits_RV, states)
            for row in _without_numbers(logits_RV, likeliest):
                states[row].broken, tokens[row] = True, 0
            logprobs = self._logprobs(logits_RV, tokens, states, wanted) if wanted else {}
        return [Sampled(token, logprobs.get(row)) for row, token in enumerate(tokens)]

    # ---- choosing ------------------------------------------------------------------------------------------

    def _choose(self, logits_RV: Tensor, states: Sequence[SamplingState]) -> list[int]:
        """A token for each row, drawn or the likeliest."""
        adjusted = [row for row, state in enumerate(states) if state.adjusts]
        greedy = [state.params.greedy for state in states]
        if not adjusted and all(greedy):
            return list(likeliest(logits_RV).tolist())
        V = logits_RV.shape[1]
        untouched = self._drawing is not None and not adjusted
        work_RV = logits_RV if untouched else self._work.padded(logits_RV)
        for row in adjusted:
            states[row].adjust(work_RV[row, :V])
        if all(greedy):
            return list(likeliest(work_RV).tolist())
        best = likeliest(work_RV).tolist() if any(greedy) else []
        plain = SamplingParams()
        params = [plain if state.params.greedy else state.params for state in states]
        if self._drawing is not None:
            narrow_RV = work_RV if untouched else work_RV[:, :V]
            drawn = self._draw_natively(self._drawing, narrow_RV, states, params)
        else:
            drawn = self._draw(work_RV, states, params).tolist()
        return [best[row] if greedy[row] else token for row, token in enumerate(drawn)]

    def _draw_natively(
        self,
        drawing: Drawing,
        logits_RV: Tensor,
        states: Sequence[SamplingState],
        params: Sequence[SamplingParams],
    ) -> list[int]:
        """As `_draw`, by the kernels; the logits stay as they are."""
        outside = drawing.draw(
            logits_RV,
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.top_k for p in params],
            self._uniforms(states),
        )
        while any(outside):
            rows = [row for row, again in enumerate(outside) if again]
            numbers = dict(zip(rows, self._uniforms([states[row] for row in rows]), strict=True))
            outside = drawing.again([numbers.get(row, 0.0) for row in range(len(states))])
        return drawing.tokens

    def _draw(
        self, logits_RV: Tensor, states: Sequence[SamplingState], params: Sequence[SamplingParams]
    ) -> Tensor:
        """tokens_R from temperature, min-p, top-k and top-p; overwrites the logits. Greedy rows are drawn in vain."""
        device = logits_RV.device
        logits_RV -= logits_RV.amax(-1, keepdim=True)
        logits_RV /= _column([p.temperature for p in params], device)
        weights_RV = logits_RV.exp_()  # the likeliest weighs 1
        floor_R1 = _floor(weights_RV, params)
        kept_RV = keep(weights_RV, floor_R1, True, self._scratch.like(weights_RV))
        chosen_R = pick(kept_RV, torch.tensor(self._uniforms(states), dtype=torch.float64))
        if all(p.top_p == 1 for p in params):
            return chosen_R
        top_p_R1 = _column([p.top_p if p.top_p < 1 else math.inf for p in params], device)
        nucleus_R1 = top_p_R1 * total(kept_RV) * floor_R1
        return self._into_nucleus(weights_RV, chosen_R, nucleus_R1, states)

    def _into_nucleus(
        self, weights_RV: Tensor, chosen_R: Tensor, nucleus_R1: Tensor, states: Sequence[SamplingState]
    ) -> Tensor:
        """Draw again, among likelier tokens only, while the tokens likelier than the chosen one fill the nucleus."""
        while True:
            pivot_R1 = weights_RV.gather(1, chosen_R[:, None])
            likelier_RV = keep(weights_RV, pivot_R1, False, self._scratch.like(weights_RV))
            mass_R1 = total(
                likelier_RV
            )  # nothing likelier: whatever the nucleus is, this is the end of the search
            outside_R = ((mass_R1 > 0) & (mass_R1 * pivot_R1 >= nucleus_R1))[:, 0]
            rows = outside_R.nonzero()[:, 0].tolist()
            if not rows:
                return chosen_R
            uniforms_R = torch.zeros(len(states), dtype=torch.float64)
            numbers = self._uniforms([states[row] for row in rows])
            uniforms_R[rows] = torch.tensor(numbers, dtype=torch.float64)
            chosen_R = torch.where(outside_R, pick(likelier_RV, uniforms_R), chosen_R)

    def _uniforms(self, states: Sequence[SamplingState]) -> list[float]:
        """A number in [0, 1) for each row, from its own generator or the shared one."""
        return [(self._shared if state.numbers is None else state.numbers).take() for state in states]

    # ---- log-probabilities ---------------------------------------------------------------------------------

    def _logprobs(
        self, logits_RV: Tensor, tokens: list[int], states: Sequence[SamplingState], rows: list[int]
    ) -> dict[int, TokenLogprobs]:
        """By row, for the rows that want them."""
        some_RV = logits_RV if len(rows) == len(states) else logits_RV[rows]
        counts = [states[row].params.logprobs or 0 for row in rows]
        return dict(zip(rows, self.report(some_RV, [tokens[row] for row in rows], counts), strict=True))

    def report(self, logits_RV: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
        """Of each row its token's log-probability and as many of the likeliest as its count says: a few passes over all
        rows together."""
        raw_RV = self._work.padded(logits_RV)
        largest_R1 = raw_RV.amax(-1, keepdim=True)
        weights_RV = torch.sub(raw_RV, largest_R1, out=self._scratch.like(raw_RV)).exp_()
        norm_R1 = largest_R1 + total(weights_RV).log()
        chosen_R1 = raw_RV.gather(1, torch.tensor(tokens, device=raw_RV.device)[:, None])
        ranks = ((raw_RV > chosen_R1).sum(-1) + 1).tolist()
        values = (chosen_R1 - norm_R1)[:, 0].tolist()
        top_Rk, ids_Rk = raw_RV.topk(min(max(counts), logits_RV.shape[1]), -1)
        tops, ids = (top_Rk - norm_R1).tolist(), ids_Rk.tolist()
        return [
            TokenLogprobs(
                self._told(token, values[i], ranks[i]),
                tuple(self._told(ids[i][j], tops[i][j], j + 1) for j in range(min(counts[i], len(ids[i])))),
            )
            for i, token in enumerate(tokens)
        ]

    def _told(self, token: int, logprob: float, rank: int) -> TokenLogprob:
        return TokenLogprob(token, logprob, rank, self._text_of(token))


def distribution(
    logits_V: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    eos_ids: Sequence[int] = (),
) -> Tensor:
    """probabilities_V (float64) that a token is drawn: the slow twin of everything above but the grammar; O(V²)."""
    x_V = logits_V.double().clone()
    for token, bias in params.logit_bias.items():
        x_V[token] += bias
    for token in {*prompt_ids, *output_ids}:
        x_V[token] *= params.repetition_penalty ** (-1 if x_V[token] > 0 else 1)
    for token in set(output_ids):
        x_V[token] -= params.frequency_penalty * list(output_ids).count(token) + params.presence_penalty
    if len(output_ids) < params.min_tokens:
        x_V[[*eos_ids, *params.stop_token_ids]] = -math.inf
    if params.greedy:
        return torch.nn.functional.one_hot(x_V.argmax(), len(x_V)).double()
    p_V = (x_V / params.temperature).softmax(-1)
    p_V[p_V < params.min_p * p_V.max()] = 0
    if params.top_k:
        p_V[p_V < p_V.topk(min(params.top_k, len(p_V))).values[-1]] = 0
    p_V /= p_V.sum()
    if params.top_p < 1:
        likelier_VV = p_V[None, :] > p_V[:, None]
        p_V[(likelier_VV * p_V).sum(-1) >= params.top_p] = 0
    return p_V / p_V.sum()


def _without_numbers(logits_RV: Tensor, likeliest: Sequence[int] | None) -> list[int]:
    """The rows whose largest logit is NaN or infinite: whatever was chosen there means nothing."""
    if likeliest is not None:
        return [row for row, token in enumerate(likeliest) if token < 0]
    if logits_RV.device.type == "cpu":  # NumPy's are quicker at one row
        finite = np.isfinite(logits_RV.float().numpy().max(-1))
        return [] if finite.all() else [int(row) for row in np.flatnonzero(~finite)]
    largest_R = logits_RV.amax(-1)
    return [] if largest_R.isfinite().all() else (~largest_R.isfinite()).nonzero()[:, 0].tolist()


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def _floor(weights_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """floor_R1: the least weight that min-p and top-k keep, where the likeliest weighs 1."""
    ks = [p.top_k if p.top_k < weights_RV.shape[1] else 0 for p in params]
    floor_R1 = _column([max(p.min_p, LEAST) for p in params], weights_RV.device)
    if not any(ks):
        return floor_R1
    largest_Rk = weights_RV.topk(max(ks), -1).values
    k_R1 = torch.tensor(ks, device=weights_RV.device)[:, None]
    kth_R1 = largest_Rk.gather(1, (k_R1 - 1).clamp(min=0))
    return torch.where(k_R1 > 0, floor_R1.maximum(kth_R1), floor_R1)
