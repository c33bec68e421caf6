"""Numbers as people read them."""

from octad.report.figures import duration


def test_durations_have_the_unit_that_keeps_them_short() -> None:
    seconds = (0.2, 45, 99, 100, 720, 5940, 6000, 12_240, 200_000)
    told = "0 s, 45 s, 99 s, 2 min, 12 min, 99 min, 1.7 h, 3.4 h, 2.3 days"
    assert ", ".join(map(duration, seconds)) == told
