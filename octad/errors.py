"""The errors that a user can cause. The message is shown as it is, on one line: what, where, found, the fix.

The command line turns every OctadError into one line on stderr and exit code 2; anything else is a bug and
keeps its traceback.
"""

import difflib
from collections.abc import Iterable

LONGEST = 1500  # characters of a message; files can hold names of any length


class OctadError(Exception):
    """Base of all errors whose message is meant for the user. It is one line, whatever a file had in it that is named."""

    def __str__(self) -> str:
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__()
        )
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


class ConfigError(OctadError):
    """A model's config.json asks for something that octad cannot represent exactly."""


class CheckpointError(OctadError):
    """Weights, tokenizer or adapter on disk are missing, damaged, unsafe or do not fit together."""


class RecipeError(OctadError):
    """A recipe (YAML) has an unknown key, a bad value, or members that cannot be combined."""


class DataError(OctadError):
    """Text to calibrate or judge on is missing, empty, or not what its format promises."""


class OutputError(OctadError):
    """The result cannot be written: the directory exists, the disk is full, no permission."""


class RequestError(OctadError):
    """A request to the engine cannot be served: an empty or too long prompt, a bad sampling parameter or schema."""


class SandboxError(OctadError):
    """Programs that a model wrote cannot be confined on this machine."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Of the known names, the one that comes nearest to a misspelt one; None where none is so alike (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The end of a message on a name that there is not; None where no known name comes near."""
    near = nearest(name, known)
    return None if near is None else f"did you mean {near!r}?"
