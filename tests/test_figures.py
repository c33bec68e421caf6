"""Numbers as people read them."""

import re
from pathlib import Path

import octad
from octad.figures import duration, percent


def test_durations_have_the_unit_that_keeps_them_short() -> None:
    seconds = (0.2, 45, 99, 100, 720, 5940, 6000, 12_240, 200_000)
    told = "0 s, 45 s, 99 s, 2 min, 12 min, 99 min, 1.7 h, 3.4 h, 2.3 days"
    assert ", ".join(map(duration, seconds)) == told


def test_a_share_is_written_in_one_way() -> None:
    """A number, a blank, the sign, as `percent` has it, in every sentence; a chat's lines are short of room."""
    package = Path(octad.__file__).parent
    sources = [p for p in package.rglob("*.py") if "chat" not in p.relative_to(package).parts]
    found = [str(p) for p in sources if re.search(r":\+?\.\d%\}", p.read_text("utf-8"))]
    assert len(sources) > 200
    assert found == []
    assert percent(0.125, 1) == "12.5 %"
