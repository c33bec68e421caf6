"""Types: what a conversion changes is measured and said, what it would destroy refused, what can be exact is."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import gguf_of
from members import FFN, adapter, full_member, make_base, make_recipe
from safetensors.torch import load_file, save_file

from octad.combine.build import combine
from octad.combine.conversion import converted, holds_all
from octad.combine.edit import add_expert
from octad.combine.preflight import Plan, preflight
from octad.combine.recipe import ExpertSpec
from octad.errors import RecipeError

Q = gguf.GGMLQuantizationType


def plan_of(base: Path | str, *models: Path | str, **changes: Any) -> Plan:
    entries = [{"name": f"m{e}", "model": str(model)} for e, model in enumerate(models)]
    return preflight(make_recipe(base, entries, router={"method": "random"}, **changes))


def changed(directory: Path, name: str, place: tuple[int, int], value: float) -> Path:
    tensors = load_file(directory / "model.safetensors")
    tensors[name][place] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight",
                                  "model.layers.1.mlp.down_proj.weight"])  # fmt: skip
def test_a_weight_that_float16_cannot_hold(tmp_path: Path, name: str) -> None:
    """Wherever it lies, sampled before work or met while writing; nothing is left behind."""
    base = make_base(tmp_path / "base")
    member = changed(full_member(base, tmp_path / "big", 1, only=".mlp."), name, (3, 2), 1e5)
    with pytest.raises(
        RecipeError, match=r"a weight of 100000 does not fit float16 \(at most 65504\)"
    ) as caught:
        combine(plan_of(member, "base", "base", dtype="float16"), tmp_path / "out")
    assert "dtype: bfloat16 or float32" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "big"]
    found = combine(plan_of(member, "base", "base", dtype="bfloat16"), tmp_path / "out")
    assert all(t.isfinite().all() for t in load_file(found / "model.safetensors").values())


def test_what_holds_what() -> None:
    for given, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32)):
        values = torch.randn(999).to(given)
        assert holds_all(kept, given)
        assert torch.equal(values.to(kept).to(given), values)
        assert not holds_all(given, kept)
    assert not holds_all(torch.float16, torch.bfloat16)
    assert not holds_all(torch.bfloat16, torch.float16)
    kept = converted(torch.tensor([6e4, float("inf")]), torch.float16, "x")
    assert kept.tolist() == [
        60000.0,
        float("inf"),
    ]  # what is infinite already is another fault, found elsewhere


def test_rounding_is_measured(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (note,) = plan_of(base, "base", "base", dtype="bfloat16").notes[-1:]
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))]
    values = torch.cat([load_file(base / "model.safetensors")[n].flatten() for n in names]).double()
    rounded = values.bfloat16().double()
    share = float((rounded != values).double().mean())
    size = float((rounded - values).norm() / values.norm())
    assert note.startswith(
        f"base: {100 * share:.1f} % of its weights change on the way to bfloat16, by {100 * size:.2f} % of their"
    )
    for dtype in ("float32", None):
        assert not any("change on the way" in n for n in plan_of(base, "base", "base", dtype=dtype).notes)


def test_a_change_too_small_for_the_type(tmp_path: Path) -> None:
    """An adapter whose sum with a bfloat16 base rounds most of it away; float32 holds it to the last bit."""
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    small = adapter(base, tmp_path / "small", 1, FFN)
    weights = small / "adapter_model.safetensors"
    save_file({k: v * (1e-3 if "lora_B" in k else 1) for k, v in load_file(weights).items()}, weights)
    (note,) = plan_of(base, "base", small).reports[1].notes
    assert "what it adds to the base is so small that rounding to bfloat16 changes it by" in note
    plan = plan_of(base, "base", small, dtype="float32")
    assert plan.reports[1].notes == ()
    found = load_file(combine(plan, tmp_path / "out") / "model.safetensors")
    factors, name = load_file(weights), "model.layers.0.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    expected = load_file(base / "model.safetensors")[f"{name}.weight"].float() + 2 * b @ a
    torch.testing.assert_close(
        found["model.layers.0.block_sparse_moe.experts.1.w3.weight"], expected, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("generalist", [True, False])
def test_a_newcomer_on_a_quantised_base(tmp_path: Path, generalist: bool, dtype: str | None) -> None:
    """Added later or combined at once: the same sums, rounded once."""
    model = make_base(tmp_path / "base", intermediate_size=64)
    base = tmp_path / "base.gguf"
    gguf_of(model, base, Q.Q8_0)
    first, second, third = (adapter(model, tmp_path / str(n), n, FFN) for n in (1, 2, 3))
    models = ["base" if generalist else first, second]
    mixture = combine(plan_of(base, *models, dtype=dtype), tmp_path / "m")
    added = add_expert(mixture, ExpertSpec(name="m2", model=str(third)), tmp_path / "added")
    fresh = combine(plan_of(base, *models, third, dtype=dtype), tmp_path / "fresh")
    ours, theirs = (load_file(d / "model.safetensors") for d in (added, fresh))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if generalist:
        base.unlink()  # then from what the mixture holds
        add_expert(mixture, ExpertSpec(name="m2", model=str(third)), tmp_path / "again")


@pytest.mark.parametrize("kind", [Q.F16, Q.F32, Q.Q8_0])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_gguf_members_are_not_rounded_on_the_way(tmp_path: Path, kind: Q, dtype: str | None) -> None:
    base = make_base(tmp_path / "base", intermediate_size=64, num_key_value_heads=2)
    values = gguf_of(base, tmp_path / "base.gguf", kind)
    plan = plan_of(tmp_path / "base.gguf", "base", "base", dtype=dtype)
    own = {Q.F16: torch.float16, Q.F32: torch.float32, Q.Q8_0: torch.bfloat16}[kind]
    assert plan.dtype == (torch.float32 if dtype else own)
    rounded = [note for note in plan.notes if "of its weights change" in note]
    assert bool(rounded) == (kind == Q.Q8_0 and dtype is None)
    found = load_file(combine(plan, tmp_path / "out") / "model.safetensors")
    ours = found["model.layers.0.block_sparse_moe.experts.0.w2.weight"]
    expected = torch.from_numpy(np.array(values["blk.0.ffn_down.weight"]))
    assert torch.equal(ours, expected.to(plan.dtype))
    assert torch.equal(ours.float(), expected) == (not rounded)
