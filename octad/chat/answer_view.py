"""An answer with all that is known about it: as JSON, as a routing table, as log-probabilities.

    as_json(llm, output)                 # {"text": ..., "tokens": [...], "speakers": [...], ...}
    show(llm, output, console)           # what follows the streamed text: other answers, tables, legend

Shapes: T tokens of the answer, L layers, A experts a token, E experts, C columns of a table.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, RenderableType

from octad.chat.speakers import Word, legend, visible, write
from octad.report import terminal
from octad.report.table import Cell, Column, Table, busiest

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


def routing_table(llm: LLM, answer: CompletionOutput) -> RenderableType:
    """A row a token: its speaker, and each expert's share of the routing weight over all layers, in per cent.

    Of many experts the busiest have a column each, and the others one together."""
    names, shares_TE = llm.expert_names, expert_shares(answer, len(llm.expert_names))
    shown = busiest(shares_TE.sum(0).tolist())
    others_T = 1 - shares_TE[:, shown].sum(1)
    columns = [
        Column("token"),
        Column("speaker"),
        *(Column(names[e], numeric=True, speaker=e) for e in shown),
    ]
    if fewer := len(shown) < len(names):
        columns.append(Column("others", numeric=True))
    columns_TC = torch.cat((shares_TE[:, shown], others_T[:, None]), 1) if fewer else shares_TE
    rows = [
        [Cell(_token(llm, token)), Cell(names[speaker], speaker=speaker), *_percent(shares_C)]
        for token, speaker, shares_C in zip(answer.token_ids, answer.speakers or [], columns_TC, strict=True)
    ]
    marks = [""] * len(rows)
    if rows:
        rows, marks = [*rows, [Cell("all"), Cell(""), *_percent(columns_TC.mean(0))]], [*marks, "mean"]
    return terminal.table(Table("share of each token's routing, %", columns, rows, marks=marks))


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


def logprob_table(answer: CompletionOutput) -> RenderableType:
    """A row a token: its log-probability (natural logarithm) and rank, and the likeliest tokens at its place."""
    rows = []
    for place in answer.logprobs or []:
        top = "  ".join(f"{_shown(t.text)} {t.logprob:.3f}" for t in place.top)
        rows.append([_shown(place.chosen.text), f"{place.chosen.logprob:.3f}", str(place.chosen.rank), top])
    return terminal.table(Table.of("", ["token", ">logprob", ">rank", "likeliest"], rows))


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


def _token(llm: LLM, token: int) -> str:
    return _shown(llm.tokenizer.decode([token], skip_special_tokens=False))


def _shown(text: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return visible(text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")).replace(" ", "␣")


def _percent(shares_C: torch.Tensor) -> list[Cell]:
    return [Cell(f"{100 * share:.0f}" if share >= 0.005 else "·") for share in shares_C.tolist()]
