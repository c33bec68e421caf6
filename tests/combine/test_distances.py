"""Distances of large tensors from a sample, and what must not be left to a sample: that the shared part is the same."""

from pathlib import Path

import pytest
import torch
from members import ATTENTION, FFN, adapter, edit_config, full_member, make_base, make_recipe
from safetensors.torch import load_file, save_file

from octad.checkpoint.load import open_member, open_source
from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import View
from octad.combine import distances
from octad.combine.distances import BLOCK, BLOCKS, Distances, measure
from octad.combine.preflight import preflight

EMBEDDING, GATE = "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"


class Quantised(View):
    """A source whose bytes on disk are not its tensors."""

    def extent(self, name: str) -> None:
        """Nowhere."""


class Shifted(Quantised):
    """A source with something added to one tensor."""

    def __init__(self, source: TensorSource, name: str, delta: torch.Tensor) -> None:
        super().__init__(source)
        self.name, self.delta = name, delta

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(name).float() + self.delta if name == self.name else self.source.read(name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding and feed-forward tensors have twice as many values as are looked at."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "vocab_size": 2048, "num_hidden_layers": 1}
    made = make_base(tmp_path_factory.mktemp("wide") / "base", dtype=torch.bfloat16, **sizes)
    assert all(
        load_file(made / "model.safetensors")[n].numel() == 2 * BLOCKS * BLOCK for n in (EMBEDDING, GATE)
    )
    return made


def changed(base: Path, directory: Path, change: dict[str, torch.Tensor]) -> Path:
    """The base with something added to some tensors."""
    full_member(base, directory, 0, only="none of them")
    tensors = load_file(base / "model.safetensors")
    for name, delta in change.items():
        tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def measured(base: Path, *members: Path) -> list[Distances]:
    source = open_source(base)
    return measure(source, [open_member(member, source) for member in members])


def by_hand(base: Path, member: Path, part: str) -> float:
    ours, theirs = (load_file(d / "model.safetensors") for d in (base, member))
    names = [name for name in ours if part in name]
    squares = sum((theirs[n].float() - ours[n].float()).double().square().sum() for n in names)
    return float((squares / sum(ours[n].double().square().sum() for n in names)).sqrt())


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_margin_holds_the_whole_distance(base: Path, tmp_path: Path, spread: float) -> None:
    """Even where some rows changed much more than others."""
    torch.manual_seed(1)
    rows = torch.exp(spread * torch.randn(2048, 1))
    member = changed(base, tmp_path / "m", {GATE: 0.05 * rows * torch.randn(2048, 256)})
    (found,) = measured(base, member)
    expected = by_hand(base, member, ".mlp.")
    assert found.groups["ffn"] == [pytest.approx(expected, rel=1.5 * found.margin)]
    assert found.groups["ffn"] != [pytest.approx(expected, rel=1e-9)]  # it was sampled
    assert 0.0001 < found.margin < (0.005 if spread == 0 else 0.3)
    assert found.same_shared_part is True


def test_the_margin_is_as_wide_as_draws_differ(base: Path) -> None:
    """Over many members, the distance is beyond the margin about as often as it should be."""
    source, beyond = open_source(base), 0
    whole = {n: source.read(n).double().square().sum() for n in source.names() if ".mlp." in n}
    for seed in range(12):
        torch.manual_seed(seed)
        delta = 0.05 * torch.randn(2048, 256) * torch.exp(torch.randn(2048, 1))
        (found,) = measure(source, [Shifted(source, GATE, delta)])
        expected = float((delta.double().square().sum() / sum(whole.values())).sqrt())
        beyond += abs(found.groups["ffn"][0] / expected - 1) > found.margin
    assert beyond <= 3  # one in twenty is expected; four or more: about one time in 450


@pytest.mark.parametrize("place", [10_000, 2048 * 256 - BLOCK - 1])
def test_one_bit_between_the_samples(base: Path, tmp_path: Path, place: int) -> None:
    delta = torch.zeros(2048 * 256)
    delta[place] = 1.0
    one = changed(base, tmp_path / "one", {EMBEDDING: delta.view(2048, 256)})
    same = changed(base, tmp_path / "same", {})
    ours, theirs = measured(base, one, same)
    assert ours.groups["embeddings"] == [0.0]  # no sample saw it
    assert ours.same_shared_part is False
    assert (theirs.same_shared_part, theirs.margin) == (True, 0.0)


def test_members_that_are_not_on_disk_as_they_are(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    member = changed(base, tmp_path / "m", {GATE: 0.1 * torch.randn(2048, 256)})
    source, other = open_source(base), open_source(member)
    plain, *rest = (
        measure(b, [m])[0] for b in (source, Quantised(source)) for m in (other, Quantised(other))
    )
    assert all(found == plain for found in rest)
    assert plain.same_shared_part is True


def test_what_must_be_read_whole_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    source, member = open_source(base), open_source(full_member(base, tmp_path / "m", 1, only=".mlp."))
    monkeypatch.setattr(distances, "WHOLE_BYTES", 1)
    on_disk, whole, itself = measure(source, [member, Quantised(member), source])
    assert [len(found.groups["ffn"]) for found in (on_disk, whole, itself)] == [1, 1, 1]
    assert [found.same_shared_part for found in (on_disk, whole, itself)] == [None, None, True]
    (on_disk,) = measure(source, [member])
    assert (len(on_disk.groups["ffn"]), on_disk.same_shared_part) == (2, True)


def test_adapters(base: Path, tmp_path: Path) -> None:
    """By their factors: the distance of peft's merged weights."""
    ffn, all_ = (adapter(base, tmp_path / n, 3, t) for n, t in (("ffn", FFN), ("all", FFN + ATTENTION)))
    for found, same in zip(measured(base, ffn, all_), (True, False), strict=True):
        assert found.same_shared_part is same
    source = open_source(base)
    ours, merged = (load_file(base / "model.safetensors"), open_member(ffn, source))
    names = [name for name in ours if ".mlp." in name]
    squares = sum((merged.read(n).float() - ours[n].float()).double().square().sum() for n in names)
    expected = float((squares / sum(ours[n].double().square().sum() for n in names)).sqrt())
    assert measured(base, ffn)[0].groups["ffn"] == [pytest.approx(expected, rel=0.02)]


def test_other_positions_or_another_head_are_not_held_exactly(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    rope = full_member(base, tmp_path / "rope", 1, only=".mlp.")
    edit_config(rope, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    same = full_member(base, tmp_path / "same", 1, only=".mlp.")
    entries = [{"name": path.name, "model": str(path)} for path in (rope, same)]
    plan = preflight(make_recipe(base, entries, router={"method": "random"}))
    assert {report.name: report.exact for report in plan.reports} == {"rope": False, "same": True}
