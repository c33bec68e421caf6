"""Line plots and documents: well-formed XML, points where arithmetic puts them, gaps where nothing can be drawn."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

from octad.report.plot import Line, document, lines
from octad.report.svg import heat

SVG = "{http://www.w3.org/2000/svg}"


def paths(drawn: str) -> list[list[tuple[str, float, float]]]:
    """Of each curve its commands with their places, in a box of 100 by 100."""
    found = re.findall(r' d="(M[^"]*)"', drawn)
    return [
        [(c, float(x), float(y)) for c, x, y in re.findall(r"([ML])([\d.e-]+) ([\d.e-]+)", path)]
        for path in found
        if " " in path and "A" not in path
    ]


def test_points_of_a_line_lie_where_the_scale_puts_them() -> None:
    (curve,) = paths(str(lines([Line("a", [0, 50, 100], [0.0, 1.0, 2.0])], "a")))
    assert [c for c, _, _ in curve] == ["M", "L", "L"]
    xs, ys = [x for _, x, _ in curve], [y for _, _, y in curve]
    assert xs[2] == 100
    assert math.isclose(xs[1] - xs[0], xs[2] - xs[1], rel_tol=1e-5)
    assert math.isclose(ys[0] - ys[1], ys[1] - ys[2], rel_tol=1e-5)  # y runs downwards
    assert ys[0] > ys[2] > 0


def test_logarithmic_axes_space_powers_evenly_and_leave_out_what_has_no_logarithm() -> None:
    drawn = str(lines([Line("a", [0, 1, 10, 100], [5, 1, 10, 100])], "a", log_x=True, log_y=True))
    (curve,) = paths(drawn)
    assert len(curve) == 3
    gaps = [(b[1] - a[1], b[2] - a[2]) for a, b in pairwise(curve)]
    assert math.isclose(gaps[0][0], gaps[1][0], rel_tol=1e-4)
    assert math.isclose(gaps[0][1], gaps[1][1], rel_tol=1e-4)


def test_what_is_not_finite_parts_the_line() -> None:
    (curve,) = paths(str(lines([Line("a", [1, 2, 3, 4], [1.0, math.nan, 2.0, math.inf])], "a")))
    assert [c for c, _, _ in curve] == ["M", "M"]


def test_a_document_is_one_file_of_well_formed_xml() -> None:
    loss = lines(
        [Line("<script>", [1, 2], [1, 2], dots=True), Line("b", [1, 2], [2, 1], dashed=True, thin=True)],
        "loss & more",
        x_title="step",
    )
    load = heat([[0.25, 0.75], [1.0, 0.0]], ["a", "b"], [3, 4], "load", 1.0, named=True)
    text = document([("bits", loss), ("load", load), ("again", loss)])
    root = ET.fromstring(text)
    said = [element.text for element in root.iter(f"{SVG}text")]
    assert {"bits", "load", "again", "<script>", "step", "layer 3", "layer 4"} <= set(said)
    assert not list(root.iter(f"{SVG}script"))
    assert len(list(root.iter(f"{SVG}rect"))) == 1 + 4  # the paper and the map's fields
    assert text == document([("bits", loss), ("load", load), ("again", loss)])
    assert document([]).startswith("<svg")


def test_a_plot_of_nothing_is_drawn_all_the_same() -> None:
    ET.fromstring(
        document([("empty", lines([], "nothing")), ("one", lines([Line("a", [], [])], "a", log_y=True))])
    )
