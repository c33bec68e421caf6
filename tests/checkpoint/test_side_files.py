"""JSON beside the weights: every accident is one line that names the file."""

from pathlib import Path

import pytest

from octad.checkpoint.side_files import read_json
from octad.errors import CheckpointError


def test_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "\u00e9t\u00e9", "n": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"name": "\u00e9t\u00e9", "n": [1, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"\xff": 1}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "should hold one JSON object, found list"),
        (b"null", "should hold one JSON object, found NoneType"),
    ],
)
def test_accidents(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
