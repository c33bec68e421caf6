"""JSON beside the weights (config.json, adapter_config.json, an index, ...): one reader, one way to say what is wrong.

read_json(directory / "config.json")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octad.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where it cannot be read, is not JSON, or is not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: should hold one JSON object, found {type(found).__name__}")
    return found
