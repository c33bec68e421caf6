"""The verdict in a checkpoint's model card, between two markers: a later verdict takes the place of an earlier one.

    write_verdict(directory, report)            # README.md, replaced atomically
    may_write(source, tokens)                   # whether an evaluation that was not asked to should

Without being asked, only a card of a directory that octad made is changed, never a verdict made on more text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octad.checkpoint.provenance import PROVENANCE
from octad.checkpoint.source import TensorSource
from octad.errors import OutputError
from octad.report import markdown
from octad.report.page import quality
from octad.staging import explained, replace_file

CARD = "README.md"
BEGIN, END = "<!-- octad verdict: {tokens} tokens -->", "<!-- end of octad verdict -->"
_BLOCK = re.compile(r"\n*<!-- octad verdict: (\d+) tokens -->.*?<!-- end of octad verdict -->\n*", re.DOTALL)


def may_write(source: TensorSource, tokens: int) -> bool:
    """Whether a verdict on this many tokens belongs into the card without asking: octad made the directory, it can be
    written, and no verdict on more text is there."""
    directory = source.directory
    if directory is None or not (directory / PROVENANCE).is_file() or not os.access(directory, os.W_OK):
        return False
    try:
        found = _BLOCK.search(_read(directory / CARD))
    except (OSError, UnicodeDecodeError):
        return False
    return found is None or int(found[1]) <= tokens


def write_verdict(source: TensorSource, report: Mapping[str, Any]) -> Path:
    """Put the report's verdict into the card. Raises OutputError where there is no directory to write into."""
    directory = source.directory
    if directory is None or not directory.is_dir():
        raise OutputError(f"{source.label}: has no directory for a model card; leave out --card")
    path = directory / CARD
    with explained(path):
        try:
            before = _read(path)
        except UnicodeDecodeError:
            raise OutputError(f"{path}: is not UTF-8 text; leave out --card") from None
    replace_file(path, with_verdict(before, report))
    return path


def with_verdict(card: str, report: Mapping[str, Any]) -> str:
    """The card with this verdict, at its end or in the place of an earlier one."""
    tokens = sum(d["tokens"] for d in report["domains"])
    block = "\n".join([BEGIN.format(tokens=tokens), *_lines(report), END])
    found = _BLOCK.search(card)
    if found:
        return f"{card[: found.start()]}\n\n{block}\n\n{card[found.end() :]}".rstrip() + "\n"
    return f"{card.rstrip()}\n\n{block}\n"


def without_verdict(card: str) -> str:
    """The card of a model that has been changed since it was judged."""
    return _BLOCK.sub("\n\n", card)


def _lines(report: Mapping[str, Any]) -> list[str]:
    verdict = report["verdict"]
    advice = [f"- {line}" for line in verdict["advice"]]
    return [
        "## Verdict",
        "",
        f"**{verdict['headline']}**",
        "",
        *[f"- {sentence}" for sentence in verdict["sentences"]],
        "",
        *(
            f"{markdown.table(t)}\n"
            for t in (quality.standing(report), quality.bits(report))
            if t is not None
        ),
        *(["What to try next:", "", *advice, ""] if advice else []),
        f"Held-out text, `octad evaluate`. {quality.EXPLAINED[0].upper()}{quality.EXPLAINED[1:]}",
    ]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
