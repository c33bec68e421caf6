"""The text that specialists of a base of one's own learn from: a folder of the user's, or what comes with octad.

    texts_in(Path("texts"))                     # texts/law.jsonl.gz, texts/sea/*.txt -> law, sea
    shipped(Path("demo-base"), plain=False)     # the seven kinds of octad/demo/data

Either has `general` among the names, whom the base itself answers for: octad's own English and Python, unless the folder
has a `general` of its own. What the base says in conversation joins it (own_answers.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from octad.combine.recipe import MAX_EXPERTS
from octad.errors import DataError
from octad.project.begin import GENERAL, without_turns
from octad.staging import explained, replace_file
from octad.text.documents import kind_of

DATA = Path(__file__).parent / "data"
KINDS = ("c", "sql", "french", "german", "spanish", "maths", "literature")
# of each kind, the files to learn from. Python is the base's own: what it can do of it, some minutes of plain text cost.
# Functions with examples in their docstring are among it, or routers take such for maths, whose text has the same form
GENERALS = ("general/calibrate.jsonl", "python/calibrate.jsonl", "python/functions.jsonl.gz")
CHATS = "general/chats.jsonl"  # for a base that cannot be asked
USUAL = ("calibrate.jsonl", "written.jsonl", "bible.jsonl", "more.jsonl.gz")


@dataclass(frozen=True)
class Texts:
    """name -> what it is read from; name -> text of other sources to judge on, where it need not be split off."""

    learnt: dict[str, list[str]]
    held_out: dict[str, str] = field(default_factory=dict)

    @property
    def specialists(self) -> list[str]:
        """Those that are to be trained."""
        return [name for name in self.learnt if name != GENERAL]


def texts_in(folder: Path, place: Path, *, plain: bool) -> Texts:
    """A file or a folder for each specialist, whose name it has. Raises DataError."""
    if not folder.is_dir():
        raise DataError(
            f"--text {folder}: is no folder; give one that holds a file or folder of text for each specialist"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        name = path.name if path.is_dir() else path.name[: -len("".join(kind_of(path))) or None]
        if name in found:
            raise DataError(
                f"--text {folder}: {found[name].name} and {path.name} are both for {name}; put them into one folder"
            )
        found[name] = path
    count = len(found.keys() - {GENERAL})
    if not 1 <= count < MAX_EXPERTS:
        raise DataError(
            f"--text {folder}: found text for {count} specialists, expected 1 to {MAX_EXPERTS - 1};"
            " give a file or folder for each, such as law.jsonl or law/"
        )
    own = {name: [str(path)] for name, path in found.items()}
    if GENERAL in own:
        return Texts(own)
    bundled = _bundled([GENERAL], place, plain=plain)
    return Texts(bundled.learnt | own, bundled.held_out)


def shipped(place: Path, *, plain: bool) -> Texts:
    """The seven kinds of text that come with octad, and English; `plain`: for a base without a chat template, with
    conversations as plain text in copies below `place`."""
    return _bundled([GENERAL, *KINDS], place, plain=plain)


def _bundled(names: Iterable[str], place: Path, *, plain: bool) -> Texts:
    learnt, held_out = {}, {}
    for name in names:
        usual = [f"{name}/{part}" for part in USUAL]
        parts = usual if name != GENERAL else [*([CHATS] if plain else []), *GENERALS]
        files, judged = [p for part in parts if (p := DATA / part).is_file()], DATA / name / "heldout.jsonl"
        if plain:
            copies = place / "shipped"
            files = [_flat(f, copies / f.parent.name / f.name.removesuffix(".gz")) for f in files]
            judged = _flat(judged, place / "shipped" / name / judged.name)
        learnt[name], held_out[name] = [str(file) for file in files], str(judged)
    return Texts(learnt, held_out)


def _flat(file: Path, copy: Path) -> Path:
    with explained(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
    replace_file(copy, without_turns(file))
    return copy
