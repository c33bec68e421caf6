"""octad evaluate: tell the verdict, write it where it belongs, and say by the exit code what does not hold."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octad.cli import tasks as commands_tasks
from octad.errors import RequestError
from octad.report import terminal


@dataclass(frozen=True)
class Outputs:
    """Where results go. `card`: whether the verdict goes into the model card; None: where octad made the model and no
    verdict on more text is in it. `brief`: what the report says, too, is not told at length."""

    report: Path | None = None
    card: bool | None = None
    as_json: bool = False
    brief: bool = False


def evaluate(model: str, data: Path | None, outputs: Outputs, **options: Any) -> dict[str, Any]:
    """The comparison (`options` as in octad.evaluate) and all that follows from it; ends with exit code 1 where a
    requirement does not hold."""
    from octad.api.verdicts import evaluate as judge
    from octad.evaluate.card import may_write
    from octad.report.verdict_blocks import render
    from octad.staging import refuse_unwritable

    if data is None and options["tasks"] is not None and (outputs.report is not None or outputs.card):
        option = "--card" if outputs.report is None else "--report"
        raise RequestError(f"{option} is for a verdict on held-out text; give --data, too")
    if outputs.report is not None:
        refuse_unwritable(outputs.report)  # before minutes of judging
    command = shlex.join(["octad", *(Path(part).name for part in sys.argv[1:])])  # nobody's directories
    routing = outputs.report is not None
    verdict = judge(model, data, routing=routing, command=command, tell=terminal.tell, **options)
    made = verdict.to_dict()
    if data is None:
        commands_tasks.tell(made["tasks"], as_json=outputs.as_json)
        return made
    if outputs.as_json:
        print(json.dumps(made, indent=2))
    else:
        for part in render(made, brief=outputs.brief):
            terminal.out.print(part)
        commands_tasks.show(made["tasks"])
    tell = terminal.tell if outputs.as_json else terminal.remark
    if outputs.report is not None:
        tell(f"wrote {verdict.save(outputs.report)}")
    tokens = sum(domain["tokens"] for domain in made["domains"])
    if outputs.card or (outputs.card is None and may_write(verdict.source, tokens)):
        tell(f"wrote the verdict into {verdict.write_card()}")
    if not verdict.holds:
        raise SystemExit(1)
    return made
