"""The picture of a run: drawn from the log, the same bytes from the same log, a line where it cannot be drawn."""

import json
from pathlib import Path
from xml.etree import ElementTree

from octad.dist import World
from octad.train.routing_plot import PICTURE, draw_run, read_log
from octad.train.telemetry import Telemetry


def layer(*share: float, dead: tuple[int, ...] = ()) -> dict[str, object]:
    return {"share": share, "max_violation": max(share) * 2 - 1, "entropy": 0.5, "dead": dead, "dropped": 0.1}


def log(run: Path) -> Path:
    rows = [
        {"step": 0, "held_out": {"french": 2.0}, "held_out_mean": 2.0},
        {"step": 5, "bits_per_byte": {"french": 1.9}, "layers": [layer(0.5, 0.5), layer(0.9, 0.1)]},
        {"step": 10, "bits_per_byte": {"french": 9.9}, "layers": [layer(0.5, 0.5), layer(0.9, 0.1)]},
        {
            "step": 10,
            "bits_per_byte": {"french": 1.5},
            "layers": [layer(0.6, 0.4), layer(1.0, 0.0, dead=(1,))],
        },
        {"step": 10, "held_out": {"french": 1.6}, "held_out_mean": 1.6},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_step_taken_again_counts_once(tmp_path: Path) -> None:
    records = read_log(log(tmp_path) / "log.jsonl")
    assert [record["step"] for record in records] == [0, 5, 10, 10]
    assert records[2]["bits_per_byte"] == {"french": 1.5}


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path: Path) -> None:
    file = log(tmp_path) / "log.jsonl"
    whole = read_log(file)
    file.write_text(file.read_text() + '{"step": 11, "bits_per')
    assert read_log(file) == whole
    Telemetry(tmp_path, [1], print, 1.0, 1.0, World())._put({"step": 12, "bits_per_byte": {}})
    assert read_log(file) == [*whole, {"step": 12, "bits_per_byte": {}}]


def test_the_picture_says_what_the_log_says_and_is_reproducible(tmp_path: Path) -> None:
    assert draw_run(log(tmp_path)) == f"drew {tmp_path / PICTURE}"
    first = (tmp_path / PICTURE).read_bytes()
    assert ElementTree.fromstring(first).tag.endswith("svg")
    words = "".join(ElementTree.fromstring(first).itertext())
    for word in (
        "share of the choices at step 10",
        "dead: expert 1 of layer 1",
        "dropped, share of choices",
        "french",
    ):
        assert word in words
    draw_run(tmp_path)
    assert (tmp_path / PICTURE).read_bytes() == first


def test_without_routing_it_says_why(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "bits_per_byte": {}, "layers": []}\n')
    assert draw_run(tmp_path).startswith("no routing to draw")
    assert not (tmp_path / PICTURE).exists()
