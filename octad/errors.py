"""The errors that a user can cause. The message is shown as it is, on one line: what, where, found, the fix.

The command line turns every OctadError into one line on stderr and exit code 2; anything else is a bug and
keeps its traceback.
"""

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
