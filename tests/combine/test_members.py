"""What a mixture will not hold of a member is said before work, with its size; the base all over again is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from members import ATTENTION, FFN, adapter, full_member, make_base, make_recipe, text_file
from safetensors.torch import load_file, save_file
from tiny_models import Octad

from octad.combine.build import combine
from octad.combine.edit import add_expert
from octad.combine.preflight import Plan, preflight
from octad.combine.recipe import ExpertSpec
from octad.errors import RecipeError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("members") / "base")


def plan_of(base: Path, *models: Path | str, **changes: Any) -> Plan:
    entries = [{"name": f"m{e}", "model": str(model)} for e, model in enumerate(models)]
    return preflight(make_recipe(base, entries, router={"method": "random"}, **changes))


def relative(base: Path, member: Path, part: str) -> float:
    """||member - base|| / ||base|| of the tensors whose names hold `part`, mean over layers."""
    ours, theirs = (load_file(d / "model.safetensors") for d in (member, base))
    found = []
    for layer in range(2):
        names = [n for n in theirs if part in n and n.startswith(f"model.layers.{layer}.")]
        change = sum(float((ours[n] - theirs[n]).square().sum()) for n in names)
        found.append((change / sum(float(theirs[n].square().sum()) for n in names)) ** 0.5)
    return sum(found) / len(found)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ATTENTION])
def test_attention_alone_would_be_the_base_again(base: Path, tmp_path: Path, targets: list[str]) -> None:
    models = [adapter(base, tmp_path / str(seed), seed, targets) for seed in (1, 2)]
    for given in (["base", *models], models):
        with pytest.raises(RecipeError, match="every expert would be the base again") as caught:
            plan_of(base, *given)
        assert "attention 0." in str(caught.value)
        assert "shared: linear" in str(caught.value)
        assert "\n" not in str(caught.value)
    alike = plan_of(base, *models, shared="linear")
    assert any("all experts are equal" in note for note in alike.notes)
    assert "merged with the others'" in alike.reports[0].sentence
    assert "adds nothing" in alike.reports[0].sentence


def test_attention_alone_beside_others(base: Path, tmp_path: Path) -> None:
    """Not refused, the others being something; but said in one sentence, on the terminal and in octad.json."""
    lost = adapter(base, tmp_path / "lost", 1, ATTENTION)
    kept = adapter(base, tmp_path / "kept", 2, FFN)
    plan = plan_of(base, "base", lost, kept)
    report = plan.reports[1]
    assert list(report.lost) == ["attention"]
    assert "that is all it learnt: as an expert it is the base again" in report.sentence
    assert any("'m0', 'm1' are equal to the base" in note for note in plan.notes)
    assert plan.reports[2].held == {"exact": True, "lost": {}, "sentence": "held exactly"}
    mixture = combine(plan, tmp_path / "mixture")
    held = [entry["held"] for entry in json.loads((mixture / "octad.json").read_text())["experts"]]
    assert held[1] == report.held
    assert report.sentence in (mixture / "README.md").read_text()


def test_what_is_lost_and_how_much(base: Path, tmp_path: Path) -> None:
    full = full_member(base, tmp_path / "full", 3)
    report = plan_of(base, "base", full).reports[1]
    assert set(report.lost) == {"attention", "norms", "embeddings", "head"}
    assert report.lost["attention"] == pytest.approx(relative(base, full, ".self_attn."), rel=1e-4)
    ours, theirs = (load_file(d / "model.safetensors") for d in (full, base))
    changes = {n: float((ours[n] - theirs[n]).square().sum()) for n in theirs}
    share = sum(v for n, v in changes.items() if ".mlp." not in n) / sum(changes.values())
    assert f"{100 * share:.0f} % of its change" in report.sentence
    head = ours["lm_head.weight"] - theirs["lm_head.weight"]
    assert report.lost["head"] == pytest.approx(
        float(head.norm() / theirs["lm_head.weight"].norm()), rel=1e-4
    )


def test_a_head_of_its_own_on_a_tied_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    member = full_member(base, tmp_path / "member", 1, only=".mlp.")
    tensors = load_file(member / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, member / "model.safetensors", {"format": "pt"})
    raw = json.loads((member / "config.json").read_text())
    (member / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    report = plan_of(base, "base", member).reports[1]
    assert report.lost == {"head": pytest.approx(0.5, rel=1e-5)}
    assert report.exact is False


def zeroed(directory: Path, part: str) -> Path:
    weights = directory / "adapter_model.safetensors"
    save_file({k: v * 0 if part in k else v for k, v in load_file(weights).items()}, weights)
    return directory


def test_an_adapter_that_adds_nothing(base: Path, tmp_path: Path) -> None:
    untrained = zeroed(adapter(base, tmp_path / "a", 1, FFN), "lora_B")
    plan = plan_of(base, "base", untrained, adapter(base, tmp_path / "b", 2, FFN))
    assert "does not differ from the base at all" in plan.reports[1].sentence
    assert any("'m0', 'm1' are equal to the base" in note for note in plan.notes)


def test_members_that_are_equal(base: Path, tmp_path: Path) -> None:
    one, two = (full_member(base, tmp_path / n, 1, only=".mlp.") for n in ("one", "two"))
    other = full_member(base, tmp_path / "other", 2, only=".mlp.")
    notes = plan_of(base, "base", one, other, two).notes
    assert any("experts 'm1', 'm3' are equal: a router cannot tell them apart" in note for note in notes)
    assert plan_of(base, "base", one, other).notes == ()


def test_an_adapter_of_another_base_by_its_own_word(base: Path, tmp_path: Path) -> None:
    member = adapter(base, tmp_path / "a", 1, FFN)
    assert plan_of(base, "base", member).reports[1].notes == ()
    raw = json.loads((member / "adapter_config.json").read_text())
    for said, noted in (("meta-llama/Llama-3.2-1B", True), ("org/Base", False), (None, False)):
        (member / "adapter_config.json").write_text(json.dumps(raw | {"base_model_name_or_path": said}))
        notes = plan_of(base, "base", member).reports[1].notes
        assert any(f"was trained on {said!r}" in note for note in notes) == noted


def test_the_command_says_it(base: Path, tmp_path: Path, octad: Octad) -> None:
    lost, kept = adapter(base, tmp_path / "lost", 1, ATTENTION), adapter(base, tmp_path / "kept", 2, FFN)
    entries = [{"name": p.name, "model": str(p)} for p in (lost, kept)]
    raw = {"base": str(base), "experts": entries, "router": {"method": "random"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    code, out, _ = octad("combine", tmp_path / "recipe.yaml", "--dry-run")
    assert code == 0
    said = " ".join(out.split())
    assert "lost: what it changed outside its feed-forward nets is lost (attention 0." in said


@pytest.mark.parametrize("generalist", [True, False])
def test_a_newcomer_is_measured_from_what_is_there(base: Path, tmp_path: Path, generalist: bool) -> None:
    models = ["base" if generalist else str(full_member(base, tmp_path / "a", 1, only=".mlp.")),
              str(full_member(base, tmp_path / "b", 2, only=".mlp."))]  # fmt: skip
    mixture = combine(plan_of(base, *models), tmp_path / "mixture")
    new = full_member(base, tmp_path / "new", 3, only=".mlp.")
    told: list[str] = []
    spec = ExpertSpec(name="new", model=str(new), data=(str(text_file(tmp_path, 1)),))
    add_expert(mixture, spec, tmp_path / "out", tell=told.append)
    beside = base if generalist else Path(models[0])
    distance = relative(beside, new, ".mlp.")
    words = "the base" if generalist else "expert 'm0' (the base is no expert here)"
    assert f"expert 'new': checkpoint, {distance:.4f} from {words}; held exactly" in told
    assert torch.isfinite(torch.tensor(distance))
