"""The routing table of an answer where there are more experts than a terminal has room for."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from octad.chat.answer_view import routing_table
from octad.report.table import MOST_EXPERTS


def shown(experts: int, chosen: list[list[int]]) -> list[list[str]]:
    """The printed table's lines, in words. One layer, two experts a token, with weights 0.75 and 0.25."""
    llm: Any = SimpleNamespace(
        expert_names=[f"e{e}" if e else "[red]e" for e in range(experts)],
        tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: f"t{ids[0]}"),
    )
    answer: Any = SimpleNamespace(
        token_ids=list(range(len(chosen))),
        speakers=[first for first, _ in chosen],
        routed_experts=torch.tensor(chosen)[:, None],
        routed_weights=torch.tensor([0.75, 0.25]).expand(len(chosen), 1, 2),
    )
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(routing_table(llm, answer))
    lines = [line.split() for line in console.export_text().splitlines()]
    return lines[next(i for i, line in enumerate(lines) if line[0] == "token") :]


def test_few_experts_have_a_column_each() -> None:
    assert shown(3, [[0, 2], [2, 1]]) == [
        ["token", "speaker", "[red]e", "e1", "e2"],
        ["t0", "[red]e", "75", "·", "25"],
        ["t1", "e2", "·", "25", "75"],
        ["all", "38", "12", "50"],
    ]


@pytest.mark.parametrize("experts", [MOST_EXPERTS + 1, 64])
def test_of_many_the_busiest_have(experts: int) -> None:
    """Every expert but the last is the first choice of one token; the last but one, of two; the last is second always."""
    last = experts - 1
    header, *rows = shown(experts, [[e, last] for e in (*range(last), last - 1)])
    assert len(header) == 2 + MOST_EXPERTS + 1
    assert header[-3:] == [f"e{last - 1}", f"e{last}", "others"]
    assert header[2:-3] == ["[red]e", *(f"e{e}" for e in range(1, MOST_EXPERTS - 2))]  # of equals, the first
    assert rows[0] == ["t0", "[red]e", "75", *["·"] * (MOST_EXPERTS - 2), "25", "·"]
    assert rows[last - 2][-2:] == ["25", "75"]  # said by one without a column
    assert rows[-1][-1] == f"{75 * (last - MOST_EXPERTS + 1) / experts:.0f}"
