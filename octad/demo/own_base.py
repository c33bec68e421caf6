"""octad demo --base MODEL: seven specialists of a dense model of the user's, and one mixture of them and the model.

    demonstrate(Wish("Qwen/Qwen2.5-Coder-0.5B-Instruct"), Path("demo-base"), judge="quick")

What `octad init` and `octad make` do, with what a demonstration needs: text that comes with octad, adapters that stay
small, steps that fill the minutes asked for, by a step that is measured first. The directory is one of `octad init`: its
files can be edited, and `octad make` goes on there. The same command goes on where it was stopped.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from octad.checkpoint.load import load_tokenizer, open_source
from octad.cli import evaluation as commands_evaluate
from octad.combine.conversations import bundled_questions
from octad.combine.family import mixture_config
from octad.demo.demo import heading, tell, write
from octad.demo.demo_cost import Costs, costs_of, rank_within, step_seconds, times_read
from octad.demo.demo_record import begun_before, is_fresh, note
from octad.demo.own_answers import LONGEST, answered
from octad.demo.specialist_texts import Texts, shipped, texts_in
from octad.dist import keep_freed_memory
from octad.errors import OctadError, OutputError, RecipeError, RequestError
from octad.figures import duration, human, listed
from octad.guard import parse_yaml
from octad.machine import available_memory
from octad.model.config import ModelConfig
from octad.project.begin import GENERAL, init
from octad.project.beside import seen_from
from octad.project.layout_text import DOMAINS, Expert, Project, branch_text, counted
from octad.project.road import MIXTURE, REPORT, make
from octad.project.stages import text_key
from octad.report import terminal
from octad.staging import space
from octad.text.documents import read_documents
from octad.text.tokenizer import Tokenizer
from octad.text.windows import encode_document
from octad.train.run_config import BranchConfig

MINUTES = 10.0
WINDOW = 256  # tokens of a step, in one window: short, so that a few minutes are some tens of steps
ROUTER_TOKENS, CONVERSATIONS = 4096, "generalist: 8"  # the base speaks in its conversations
JUDGED = {"quick": (320, 64), "full": (4096, 512), "none": (0, 0)}  # tokens of each kind of text, window
ROUNDED = "int8"  # the mixture is judged and asked so: half the memory, nearly as exact


@dataclass(frozen=True)
class Wish:
    """What somebody asks for: a base; a folder of text; minutes, or steps, for each specialist."""

    base: str
    text: Path | None = None
    minutes: float | None = None
    steps: int | None = None

    def check(self) -> None:
        """Raises RequestError for what no run can have."""
        if self.minutes is not None and self.steps is not None:
            raise RequestError("demo: --minutes and --steps are two ways to say the same; give one")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise RequestError(f"demo: --minutes {self.minutes:g}: give a time above 0")


def demonstrate(wish: Wish, output: Path, *, judge: str) -> bool:
    """Train, combine, judge, write; prints as it goes. False where it was asked to stop before the mixture was whole.
    Raises OctadError."""
    if judge not in JUDGED:
        raise RequestError(f"demo: --judge {judge}: found no such way; there are {', '.join(JUDGED)}")
    wish.check()
    keep_freed_memory(any_size=True)
    started = time.monotonic()
    facts = prepare(wish, output, JUDGED[judge][0])
    heading("1. The specialists, and one mixture out of all")
    made = make(output, judge=False, pace=facts["pace"], tell=terminal.tell)
    if not made.finished:
        terminal.tell("stopped and saved; the same command goes on")
        return False
    mixture = output / MIXTURE
    if judge != "none":
        verdict(mixture, output, *JUDGED[judge])
    write(mixture, ROUNDED)
    heading(f"Done in {duration(time.monotonic() - started)}. Three things to try")
    terminal.remark(
        f"  octad serve {mixture} --quantize {ROUNDED}\n"
        "      a chat page at http://127.0.0.1:8000, which shows who answers\n"
        f"  octad evaluate {mixture} --tasks octad-chat,octad-writing --members\n"
        "      beside the base and every specialist; humaneval, too, where its package is installed\n"
        f"  octad demo --base {wish.base} --text FOLDER -o mine\n"
        "      the same of text of your own: a file or folder for each specialist"
    )
    return True


def verdict(mixture: Path, output: Path, tokens: int, window: int) -> None:
    """The mixture beside its parts, on the terminal and as a page."""
    heading("2. Is it better than its parts?")
    tell(f"All read text that none has seen. Fewer bits a byte are better. {tokens:,} tokens of each kind.")
    outputs = commands_evaluate.Outputs(output / REPORT, brief=True)
    options = {"tokens": tokens, "window": window, "quantize": ROUNDED}
    commands_evaluate.evaluate(str(mixture), output / DOMAINS, outputs, **options)


# ---- before work ---------------------------------------------------------------------------------------------------


def prepare(wish: Wish, output: Path, judged: int) -> dict[str, Any]:
    """Everything there is before the first specialist: the directory's files, and how long a step takes. Raises
    OctadError, and leaves nothing behind then."""
    source = open_source(wish.base)
    if source.config.is_moe:
        raise RecipeError(f"{source.label}: is a mixture; give a dense model as --base")
    fresh, kept = is_fresh(output), output.exists()
    try:
        tokenizer = load_tokenizer(source)
        plain = tokenizer.chat_template is None
        texts = (
            shipped(output, plain=plain) if wish.text is None else texts_in(wish.text, output, plain=plain)
        )
        asked = {**asdict(wish), "text": text_key([f for files in texts.learnt.values() for f in files])}
        before = begun_before(output, asked)
        heading(f"octad demo: one mixture out of {Path(wish.base).name}")  # what was asked for can be
        if before is not None:
            return before
        note(output, {"asked": asked})
        found: dict[str, Any] = {"asked": asked}
        shape = ModelConfig.from_dict(
            mixture_config(source.config, len(texts.learnt), 2, "bfloat16", source.config.vocab_size)
        )
        measured = _measured(wish, output, (source.config, shape), texts, judged, found, tokenizer)
        init(output, texts.learnt, base=wish.base, overwrite=True, tell=terminal.tell, adjust=measured)
        note(output, found)
    except OctadError:
        if fresh:
            shutil.rmtree(output, ignore_errors=True)
            if kept:
                output.mkdir()
        raise
    return found


def _measured(
    wish: Wish,
    output: Path,
    shapes: tuple[ModelConfig, ModelConfig],
    texts: Texts,
    judged: int,
    found: dict[str, Any],
    tokenizer: Tokenizer,
) -> Callable[[Project], Project]:
    """What the demonstration makes of a layout: small adapters, and as many steps as fit. `shapes`: the base's and
    the mixture's; `found` gets what is noted."""
    config, mixture = shapes
    plain = tokenizer.chat_template is None

    def adjust(project: Project) -> Project:
        experts = [replace(e, held_out=_seen(output, texts, e)) for e in project.experts]
        project = replace(
            project,
            experts=experts,
            window=min(WINDOW, project.window),
            windows=1,
            rank=rank_within(config, len(project.specialists)),
            watched=False,
            router=f"tokens: {ROUTER_TOKENS}" + ("" if plain else f", {CONVERSATIONS}"),
        )
        with terminal.waiting("measuring a step of training"):
            pace = step_seconds(BranchConfig.from_dict(parse_yaml(branch_text(project)), output, "demo"))
        minutes = wish.minutes or MINUTES
        project = replace(project, steps=wish.steps or max(1, round(minutes * 60 / pace)))
        talk = 0 if plain else LONGEST * len(bundled_questions())
        costs = costs_of(project, config, mixture, pace, (ROUTER_TOKENS, judged, talk))
        if costs.disk > shutil.disk_usage(output).free:
            raise OutputError(
                f"{output}: too little room: {space(output, costs.disk)}; choose another --output"
            )
        announce(project, costs)
        if (free := available_memory()) is not None and costs.memory > free:
            terminal.tell(
                f"{human(free, 'B')} of memory are free: it will swap; close something, or take a smaller base"
            )
        for name, times in times_read(project, output).items():
            terminal.tell(
                f"{name}: its text is read about {times:.0f} times over; more of it makes a better specialist (--text)"
            )
        found.update(pace=pace, steps=project.steps)
        talks = None if plain else answered(wish.base, output, quantize=ROUNDED)
        return project if talks is None else with_answers(project, talks, tokenizer)

    return adjust


def with_answers(project: Project, file: Path, tokenizer: Tokenizer) -> Project:
    """The same where the generalist's text is also what the base says in conversation, and nobody unlearns that, if it
    makes a window at least."""
    experts = [replace(e, data=[file.name, *e.data]) if e.name == GENERAL else e for e in project.experts]
    tokens = sum(len(encode_document(document, tokenizer)) for document in read_documents(file))
    return replace(project, experts=experts, kept=file.name if tokens > project.window else "")


def _seen(output: Path, texts: Texts, expert: Expert) -> str:
    """The held-out text of an expert: of other sources where there is some, else what was split off."""
    found = texts.held_out.get(expert.name)
    return expert.held_out if found is None else seen_from(output, found)


def announce(project: Project, costs: Costs) -> None:
    """What will happen, how long it takes, and what room it needs."""
    names = [expert.name for expert in project.specialists]
    judging = f", judging {duration(costs.judging)}" if costs.judging else ""
    talking = (
        f" Before them the base answers questions, about {duration(costs.talking)}." if costs.talking else ""
    )
    tell(
        f"{listed(names)}: a specialist each, {counted(project.steps, 'step')} of {project.window * project.windows}"
        f" tokens, about {duration(costs.specialist)} each by a step that was measured ({duration(costs.step)})."
        f"{talking} Combining takes about {duration(costs.combining)}{judging}: about"
        f" {duration(costs.total)} in all."
    )
    tell(
        f"The mixture: {human(costs.parameters)} parameters, {human(costs.mixture_bytes, 'B')} in {project.mixture};"
        f" all adapters {human(costs.adapter_bytes, 'B')}. Room needed: {human(costs.disk, 'B')} on the disk,"
        f" {human(costs.memory, 'B')} in memory. Ctrl-C keeps what is done; the same command goes on."
    )
