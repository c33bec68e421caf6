"""Specialists: adapters that peft loads and computes the same with, networks alone, failures that stay alone."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from small import checkpoint, jsonl, texts

from octad.checkpoint.load import load_model, open_member, open_source
from octad.dist import World
from octad.errors import DataError, RecipeError
from octad.train.branch import branch, branch_learner
from octad.train.forecast import check_text
from octad.train.run_config import BranchConfig, load_branch
from octad.train.trainer import Outcome, Trainer, TrainingStopped, open_stream


@pytest.fixture
def base(tiny_checkpoint, tmp_path: Path) -> Path:
    return checkpoint(tiny_checkpoint("llama"), tmp_path / "base")


def config(directory: Path, base: Path, **changes: object) -> BranchConfig:
    for n, name in enumerate(("one", "two")):
        jsonl(directory / f"{name}.jsonl", texts(60, n))
    raw = {
        "base": str(base),
        "steps": 6,
        "dtype": "float32",
        "schedule": {"warmup": 1},
        "optimizer": {"lr": 0.01},
        "low_rank": {"rank": 4, "alpha": 8},
        "batch": {"windows": 2, "micro": 2},
        "data": {"window": 32, "cache": str(directory / "cache")},
        "experts": [{"name": n, "data": f"{n}.jsonl"} for n in ("one", "two")],
    }
    (directory / "branch.yaml").write_text(yaml.safe_dump(raw | changes))
    return load_branch(directory / "branch.yaml")


@pytest.mark.parametrize("mode", ["ffn-adapter", "adapter"])
def test_adapters_compute_the_same_in_peft(base, tmp_path, mode) -> None:
    spec = config(tmp_path, base, mode=mode)
    learner = branch_learner(spec, spec.experts[0])
    Trainer(learner, tmp_path / "out").fit()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.randint(0, 95, (2, 20))
    with torch.no_grad():
        before = theirs(tokens).logits
        after = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()(tokens).logits
        mine = learner.model.eval()(tokens)
        merged = load_model(open_member(tmp_path / "out", open_source(base)))(tokens)
    torch.testing.assert_close(mine, after)
    torch.testing.assert_close(merged, after)
    assert not torch.allclose(before, after, atol=1e-3)
    touched = {name.split(".")[-3] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"} if mode == "adapter" else set()
    assert touched == {"gate_proj", "up_proj", "down_proj"} | attention


@pytest.mark.parametrize("mode", ["ffn", "full"])
def test_full_modes_change_what_they_name(base, tmp_path, mode) -> None:
    branch(config(tmp_path, base, mode=mode), tmp_path / "out", echo=lambda line: None, only="two")
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out" / "two"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if mode == "full" or ".mlp." in name}
    assert not (tmp_path / "out" / "one").exists()


def test_finished_ones_are_left_alone_and_a_failure_stays_alone(base, tmp_path) -> None:
    told: list[str] = []
    (tmp_path / "out").mkdir()
    spec = config(tmp_path, base)
    (tmp_path / "one.jsonl").write_text('{"text": ')
    with pytest.raises(TrainingStopped, match=r"1 specialist failed \(one\).*one.jsonl line 1"):
        branch(spec, tmp_path / "out", echo=told.append)
    assert (tmp_path / "out" / "two" / "adapter_config.json").is_file()
    spec = config(tmp_path, base)
    assert branch(spec, tmp_path / "out", echo=told.append) is Outcome.FINISHED
    assert "two: finished earlier (6 steps)" in told
    assert (tmp_path / "out" / "one" / "adapter_config.json").is_file()
    with pytest.raises(RecipeError, match="--only three: no such specialist"):
        branch(spec, tmp_path / "out", echo=told.append, only="three")


def test_a_diverging_specialist_is_tried_again_from_its_state(base, tmp_path) -> None:
    told: list[str] = []
    spec = config(tmp_path, base, spike=1e-9, save={"every": 1}, retries=2)
    with pytest.raises(TrainingStopped, match="2 specialists failed"):
        branch(spec, tmp_path / "out", echo=told.append)
    assert sum("one: step 2: loss" in line and "trying again" in line for line in told) == 2
    assert sum(line.startswith("one: resuming") for line in told) == 2


def test_going_on_from_an_adapter_of_peft(base, tmp_path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["gate_proj", "up_proj", "down_proj"])
    adapted = peft.get_peft_model(theirs, lora).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "started")
    start = {"name": "one", "data": "one.jsonl", "start": str(tmp_path / "started")}
    spec = config(tmp_path, base, experts=[start])  # alpha / rank is 2 here, 1 there
    learner = branch_learner(spec, spec.experts[0])
    tokens = torch.randint(0, 95, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(learner.bring_weights().eval()(tokens), adapted(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "full"}, "mode 'full' has none"),
        ({"low_rank": {"rank": 8}}, "has rank 4, low_rank.rank is 8"),
    ],
)
def test_a_start_that_does_not_fit(base, tmp_path, changes, said) -> None:
    branch(config(tmp_path, base), tmp_path / "out", echo=lambda line: None, only="one")
    start = {"name": "one", "data": "one.jsonl", "start": str(tmp_path / "out" / "one")}
    spec = config(tmp_path, base, experts=[start], **changes)
    with pytest.raises(RecipeError, match=said):
        branch_learner(spec, spec.experts[0])


def test_a_start_that_changes_more_than_learns_here(base, tmp_path) -> None:
    branch(config(tmp_path, base, mode="adapter"), tmp_path / "out", echo=lambda line: None, only="one")
    start = {"name": "one", "data": "one.jsonl", "start": str(tmp_path / "out" / "one")}
    spec = config(tmp_path, base, experts=[start])
    with pytest.raises(RecipeError, match=r"self_attn.* which this mode does not train"):
        branch_learner(spec, spec.experts[0])


def test_what_is_kept_is_every_fourth_window(base, tmp_path) -> None:
    jsonl(tmp_path / "kept.jsonl", texts(60, 7))
    spec = config(tmp_path, base, keep={"data": "kept.jsonl"})
    stream = open_stream(branch_learner(spec, spec.experts[1]), World.join())
    names = [name for name, _ in stream.next(40).windows]
    assert {name: names.count(name) for name in names} == {"two": 30, "two: kept": 10}
    (tmp_path / "kept.jsonl").unlink()
    with pytest.raises(DataError, match=r"keep: .*kept\.jsonl"):
        check_text(spec, spec.experts)
