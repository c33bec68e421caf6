"""Members that are nearly right: what is left out of them is said, and what would come out wrong is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from members import adapter, full_member, make_base, make_recipe, text_file
from safetensors.torch import load_file, save_file

from octad.checkpoint.hf import open_weights
from octad.combine.build import combine
from octad.combine.conversion import converted
from octad.combine.preflight import Plan, preflight
from octad.errors import CheckpointError, RecipeError

Tensors = dict[str, torch.Tensor]
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("odd") / "base", num_hidden_layers=1)


def changed(base: Path, directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The base with other feed-forward weights and this change."""
    member = full_member(base, directory, 1, only=".mlp.")
    save_file(change(load_file(member / "model.safetensors")), member / "model.safetensors", {"format": "pt"})
    return member


def plan_of(base: Path, member: Path, **changes: object) -> Plan:
    data = str(text_file(member.parent, 1))
    experts = [
        {"name": "one", "model": "base", "data": data},
        {"name": "two", "model": str(member), "data": data},
    ]
    return preflight(make_recipe(base, experts, **changes))


def test_a_tensor_that_config_has_no_place_for_is_named(base: Path, tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    member = changed(base, tmp_path / "m", lambda t: t | buffer | {Q_BIAS: torch.ones(32)})
    notes = plan_of(base, member).reports[1].notes
    assert notes == (
        f"its config.json has no place for {Q_BIAS}: left out, as transformers leaves it out; if it belongs to the model,"
        " config.json is another model's",
    )
    plan = plan_of(member, base)
    assert plan.notes[0].startswith(f"the base, {member}: its config.json has no place for {Q_BIAS}")


def test_rounding_is_not_called_knowledge(base: Path, tmp_path: Path) -> None:
    member = changed(base, tmp_path / "m", lambda t: {n: v.to(torch.bfloat16) for n, v in t.items()})
    report = plan_of(base, member).reports[1]
    assert not report.exact
    assert report.sentence.startswith(
        "outside its feed-forward nets it differs from the base by no more than rounding"
    )


def test_an_adapter_in_whole_numbers_is_refused(base: Path, tmp_path: Path) -> None:
    path = adapter(base, tmp_path / "lora", 1) / "adapter_model.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(path).items()}, path)
    with pytest.raises(
        RecipeError, match="holds int8, which is rounded in a way that the file does not tell"
    ):
        plan_of(base, path.parent)


def test_a_scale_that_is_no_number_is_refused(base: Path, tmp_path: Path) -> None:
    path = adapter(base, tmp_path / "lora", 1) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": float("nan")}))
    with pytest.raises(RecipeError, match=r"bad rank or alpha for .*: alpha is nan"):
        plan_of(base, path.parent)


@pytest.mark.parametrize("template", ["{% for %}", "{% for a in range(10**9) %}{% endfor %}"])
def test_a_broken_chat_template_is_not_taken_over(base: Path, tmp_path: Path, template: str) -> None:
    member = changed(base, tmp_path / "m", lambda t: t)
    path = member / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    plan = plan_of(base, member)
    assert plan.tokenizer.chat_template is None
    assert [
        note for note in plan.reports[1].notes if "the chat template" in note and note.endswith(": left out")
    ]
    with pytest.raises(RecipeError, match=r"chat_template: expert 'two': .*the chat template"):
        plan_of(base, member, chat_template="two")


def test_weights_that_a_type_has_no_numbers_for_are_refused(base: Path, tmp_path: Path) -> None:
    tiny = changed(
        base, tmp_path / "m", lambda t: {n: v * 1e-9 if "up_proj" in n else v for n, v in t.items()}
    )
    with pytest.raises(
        RecipeError, match=r"expert 'two': 100 % of its weights are so small that float16 has 0 for them"
    ):
        plan_of(base, tiny, dtype="float16")
    gates = changed(
        base, tmp_path / "g", lambda t: {n: v * 1e-9 if "gate_proj" in n else v for n, v in t.items()}
    )
    plan = plan_of(base, gates, dtype="float16")  # not among the samples: found on writing
    with pytest.raises(RecipeError, match="are so small that float16 has 0 for them"):
        combine(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    some = torch.tensor([1.0, 1e-9, 2.0, 0.0] + [1.0] * 20)
    assert converted(some, torch.float16, "x")[1] == 0  # one of many: as rounding does


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"says a is in two.safetensors, but one.safetensors holds one, too"
    ):
        open_weights(tmp_path)
