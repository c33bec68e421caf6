"""An answer with all that is known about it: as JSON, as a routing table, as log-probabilities.

    as_json(llm, output)                 # {"text": ..., "tokens": [...], "speakers": [...], ...}
    show(llm, output, console)           # what follows the streamed text: other answers, tables, legend

Shapes: T tokens of the answer, L layers, A experts a token, E experts, C columns of a table.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from octad.chat.speakers import Word, legend, visible, write
from octad.report import terminal
from octad.report.table import busiest

if TYPE_CHECKING:
    from octad.engine.llm import LLM
    from octad.engine.outputs import CompletionOutput, RequestOutput, TokenLogprob, TokenLogprobs


def as_json(llm: LLM, output: RequestOutput, *, routes: bool = False) -> dict[str, Any]:
    """The prompt's facts and the answer's; of several answers, a list under `answers`."""
    answers = [_answer(llm, answer, routes) for answer in output.outputs]
    facts: dict[str, Any] = {
        "prompt_tokens": output.prompt_token_ids,
        "cached_prompt_tokens": output.num_cached_tokens,
    }
    return facts | (answers[0] if len(answers) == 1 else {"answers": answers})


def show(llm: LLM, output: RequestOutput, console: Console, *, routes: bool = False) -> None:
    """What follows the first answer's text: the other answers, the tables that were asked for, the legend."""
    for answer in output.outputs[1:]:
        console.print()
        write(console, [Word(answer.text + "\n", None)])
    for answer in output.outputs:
        if answer.logprobs is not None:
            console.print(logprob_table(answer))
        if routes:
            console.print(routing_table(llm, answer))
    if llm.expert_names and console.is_terminal:
        console.print(legend(llm.expert_names, Counter(output.outputs[0].speakers or ())))


def routing_table(llm: LLM, answer: CompletionOutput) -> Table:
    """A row a token: its speaker, and each expert's share of the routing weight over all layers, in per cent.

    Of many experts the busiest have a column each, and the others one together."""
    table = Table(box=None, pad_edge=False, title="share of each token's routing, %", title_justify="left")
    shares_TE = expert_shares(answer, len(llm.expert_names))
    shown = busiest(shares_TE.sum(0).tolist())
    others_T = 1 - shares_TE[:, shown].sum(1)
    table.add_column("token", no_wrap=True)
    table.add_column("speaker", no_wrap=True)
    for expert in shown:
        name, style = Text(llm.expert_names[expert]), terminal.speaker_style(expert)
        table.add_column(name, justify="right", style=style, no_wrap=True)
    if fewer := len(shown) < len(llm.expert_names):
        table.add_column("others", justify="right")
    columns_TC = torch.cat((shares_TE[:, shown], others_T[:, None]), 1) if fewer else shares_TE
    for token, speaker, shares_C in zip(answer.token_ids, answer.speakers or [], columns_TC, strict=True):
        styled = Text(llm.expert_names[speaker], style=terminal.speaker_style(speaker))
        table.add_row(_token(llm, token), styled, *_percent(shares_C))
    if len(columns_TC):
        table.add_row("all", "", *_percent(columns_TC.mean(0)), style="bold")
    return table


def expert_shares(answer: CompletionOutput, num_experts: int) -> torch.Tensor:
    """shares_TE: of each token's routing weight, summed over the layers; rows sum to 1."""
    assert answer.routed_experts is not None
    assert answer.routed_weights is not None
    shares_TE = torch.zeros(len(answer.token_ids), num_experts)
    index = (
        answer.routed_experts.long().clamp(min=0).flatten(1)
    )  # a layer without router: expert -1, weight 0
    shares_TE.scatter_add_(1, index, answer.routed_weights.flatten(1))
    return shares_TE / shares_TE.sum(-1, keepdim=True)


def logprob_table(answer: CompletionOutput) -> Table:
    """A row a token: its log-probability (natural logarithm) and rank, and the likeliest tokens at its place."""
    table = Table(box=None, pad_edge=False)
    table.add_column("token", no_wrap=True)
    table.add_column("logprob", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("likeliest", no_wrap=True)
    for place in answer.logprobs or []:
        top = "  ".join(f"{_shown(t.text)} {t.logprob:.3f}" for t in place.top)
        chosen = place.chosen
        table.add_row(Text(_shown(chosen.text)), f"{chosen.logprob:.3f}", str(chosen.rank), Text(top))
    return table


def _answer(llm: LLM, answer: CompletionOutput, routes: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": answer.text,
        "tokens": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.speakers:
        found["speakers"] = [llm.expert_names[speaker] for speaker in answer.speakers]
    if answer.logprobs is not None:
        found["logprobs"] = [_place(place) for place in answer.logprobs]
    if routes and answer.routed_experts is not None and answer.routed_weights is not None:
        found["routed_experts"] = answer.routed_experts.tolist()
        found["routed_weights"] = answer.routed_weights.tolist()
    return found


def _place(place: TokenLogprobs) -> dict[str, Any]:
    return _logprob(place.chosen) | {"top": [_logprob(token) for token in place.top]}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"text": token.text, "token": token.token_id, "logprob": token.logprob, "rank": token.rank}


def _token(llm: LLM, token: int) -> Text:
    return Text(_shown(llm.tokenizer.decode([token], skip_special_tokens=False)))


def _shown(text: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return visible(text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")).replace(" ", "␣")


def _percent(shares_C: torch.Tensor) -> list[str]:
    return [f"{100 * share:.0f}" if share >= 0.005 else "·" for share in shares_C.tolist()]
