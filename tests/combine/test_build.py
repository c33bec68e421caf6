"""Whole combinations of tiny models: transformers loads them, the arithmetic is the members', accidents leave nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from members import (
    ATTENTION,
    DENSE,
    FFN,
    VOCABULARY,
    adapter,
    edit_config,
    exact,
    extended,
    full_member,
    make_base,
    make_recipe,
    save_tokenizer,
    text_file,
)
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import make_model

from octad.checkpoint.load import load_model, load_tokenizer, open_member, open_source
from octad.combine import build
from octad.combine.build import combine
from octad.combine.preflight import Plan, preflight
from octad.errors import CheckpointError, OctadError, OutputError, RecipeError
from octad.model.moe import FixedRouter

CLASSES = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}
TOKENS = torch.arange(40).view(2, 20) * 6 % VOCABULARY


_exact = exact(build)


class World:
    """A base, members of every kind that differ in feed-forward nets alone or in everything, and text."""

    def __init__(self, directory: Path, family: str) -> None:
        self.base = make_base(directory / "base", family)
        self.models = {
            "general": "base",
            "full-ffn": str(full_member(self.base, directory / "full-ffn", 1, only=".mlp.")),
            "full": str(full_member(self.base, directory / "full", 2)),
            "lora-ffn": str(adapter(self.base, directory / "lora-ffn", 3, FFN)),
            "lora": str(adapter(self.base, directory / "lora", 4, FFN + ATTENTION)),
        }
        self.entries = [
            {"name": name, "model": model, "data": str(text_file(directory, seed))}
            for seed, (name, model) in enumerate(self.models.items())
        ]
        self.plan = preflight(make_recipe(self.base, self.entries))
        self.mixture = combine(self.plan, directory / "mixture")


@pytest.fixture(scope="module", params=DENSE)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama"), "llama")


def theirs(directory: Path | str) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


def member_logits(world: World, name: str) -> torch.Tensor:
    """A member's logits by transformers and peft alone."""
    if name == "general":
        return logits(theirs(world.base))
    if name.startswith("lora"):
        return logits(PeftModel.from_pretrained(theirs(world.base), world.models[name]).eval())
    return logits(theirs(world.models[name]))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- what comes out ------------------------------------------------------------------------------------------


def test_transformers_loads_it_and_agrees(world: World) -> None:
    model = theirs(world.mixture)
    assert type(model).__name__ == f"{CLASSES[open_source(world.base).config.model_type]}ForCausalLM"
    assert "auto_map" not in json.loads((world.mixture / "config.json").read_text())
    close(logits(load_model(open_source(world.mixture))), logits(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.mixture)
    text = "Bytes, été, <|end|>"
    assert tokenizer(text)["input_ids"] == load_tokenizer(open_source(world.mixture)).encode(text)


@pytest.mark.parametrize("name", ["general", "full-ffn", "lora-ffn"])
def test_one_expert_alone_is_the_member(world: World, name: str) -> None:
    """For those that differ from the base in feed-forward nets alone, shared: base is exact."""
    model = load_model(open_source(world.mixture))
    for layer in model.model.layers:
        layer.mlp.gate = FixedRouter([list(world.models).index(name)])
    close(logits(model), member_logits(world, name))


def test_reports_tell_what_is_exact(world: World) -> None:
    exact = {report.name: report.exact for report in world.plan.reports}
    expected = {"general": True, "full-ffn": True, "full": False, "lora-ffn": True, "lora": False}
    assert exact == expected
    kinds = [report.kind for report in world.plan.reports]
    assert kinds == ["base", "checkpoint", "checkpoint", "adapter", "adapter"]
    distances = world.plan.reports[1].distances
    assert len(distances["ffn"]) == 2
    assert min(distances["ffn"]) > 0
    assert max(distances["attention"]) == 0


def test_distances_by_hand(llama: World) -> None:
    ours, base = (load_file(Path(d) / "model.safetensors") for d in (llama.models["full"], llama.base))
    names = [n for n in base if n.startswith("model.layers.1.mlp.")]
    ffn = sum((ours[n] - base[n]).square().sum() for n in names) / sum(base[n].square().sum() for n in names)
    found = llama.plan.reports[2].distances["ffn"][1]
    assert found == pytest.approx(float(ffn.sqrt()), rel=1e-5)


def test_every_tensor_is_where_it_belongs(llama: World) -> None:
    base = open_source(llama.base)
    members = [open_member(model, base) for model in llama.models.values()]
    mixture = load_file(llama.mixture / "model.safetensors")
    parts = {"w1": "gate", "w3": "up", "w2": "down"}
    for name, tensor in mixture.items():
        if ".experts." in name:
            at, _, rest = name.partition("block_sparse_moe.experts.")
            e, part, _ = rest.split(".")
            assert torch.equal(tensor, members[int(e)].read(f"{at}mlp.{parts[part]}_proj.weight"))
        elif not name.endswith("gate.weight"):
            assert torch.equal(tensor, base.read(name))


def test_the_card_and_the_provenance(llama: World) -> None:
    raw = json.loads((llama.mixture / "octad.json").read_text())
    assert [e["name"] for e in raw["experts"]] == list(llama.models)
    assert raw["base"]["files"][0]["sha256"]
    assert all(e["tokens"] > 100 for e in raw["experts"])
    card = (llama.mixture / "README.md").read_text()
    parameters = sum(p.numel() for p in theirs(llama.mixture).parameters())
    assert f"{parameters:,} parameters" in card
    for name in llama.models:
        assert f"| {name} |" in card


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("top_k", [1, 2])
def test_eight_copies_are_the_parent(tmp_path: Path, family: str, top_k: int) -> None:
    base = make_base(tmp_path / "base", family)
    entries = [{"name": f"copy {e}", "model": "base"} for e in range(8)]
    recipe = make_recipe(base, entries, router={"method": "random"}, top_k=top_k)
    mixture = combine(preflight(recipe), tmp_path / "mixture")
    parent = logits(theirs(base))
    close(logits(load_model(open_source(mixture))), parent)
    close(logits(theirs(mixture)), parent)


@pytest.mark.parametrize("method", ["logistic", "prompts", "random"])
def test_other_routers(llama: World, tmp_path: Path, method: str) -> None:
    prompts = [e | {"positive_prompts": e["name"]} for e in llama.entries]
    plan = preflight(make_recipe(llama.base, prompts, router={"method": method, "tokens": 200}))
    mixture = combine(plan, tmp_path / "m")
    close(logits(load_model(open_source(mixture))), logits(theirs(mixture)))


@pytest.mark.parametrize("method", ["mean", "linear", "ties", "dare"])
def test_shared_methods_touch_the_shared_part_alone(llama: World, tmp_path: Path, method: str) -> None:
    plan = preflight(make_recipe(llama.base, llama.entries, shared=method))
    found, exact = (
        load_file(d / "model.safetensors") for d in (combine(plan, tmp_path / "m"), llama.mixture)
    )
    changed = {n for n in exact if not torch.equal(found[n], exact[n])}
    assert not any(".experts." in n for n in changed)
    assert any("self_attn" in n for n in changed)
    members = [open_member(model, plan.base) for model in llama.models.values()]
    name = "model.layers.0.self_attn.q_proj.weight"
    if method in ("mean", "linear"):
        torch.testing.assert_close(found[name], torch.stack([m.read(name) for m in members]).mean(0))


def test_dtype_of_the_recipe(llama: World, tmp_path: Path) -> None:
    plan = preflight(make_recipe(llama.base, llama.entries, dtype="bfloat16"))
    found, exact = (
        load_file(d / "model.safetensors") for d in (combine(plan, tmp_path / "m"), llama.mixture)
    )
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if "gate.weight" not in name:
            assert torch.equal(tensor, exact[name].bfloat16())


def test_shards(llama: World, tmp_path: Path) -> None:
    output = combine(
        preflight(make_recipe(llama.base, llama.entries)), tmp_path / "m", max_shard_bytes=60_000
    )
    assert len(list(output.glob("*.safetensors"))) > 3
    assert torch.equal(logits(theirs(output)), logits(theirs(llama.mixture)))


# ---- accidents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["calibrating", "writing"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_nothing(
    llama: World, tmp_path: Path, stage: str, kind: type[BaseException]
) -> None:
    def stop(now: str, done: float) -> None:
        if now == stage and done > 0.5:
            raise kind("stopped")

    with pytest.raises(kind):
        combine(llama.plan, tmp_path / "m", progress=stop)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from octad.combine.build import combine
from octad.combine.preflight import preflight
from octad.combine.recipe import Recipe

torch.set_num_threads(1)

def die(stage, done):
    if stage == "writing" and done > 0.9:
        os.kill(os.getpid(), signal.SIGKILL)

combine(preflight(Recipe.load(sys.argv[1])), Path(sys.argv[2]), progress=die)
"""


def test_a_kill_leaves_nothing_that_loads(llama: World, tmp_path: Path) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "m"
    raw = {"base": str(llama.base), "experts": llama.entries, "router": {"tokens": 100}}
    recipe.write_text(json.dumps(raw))  # JSON is YAML
    command = [sys.executable, "-c", KILLED, str(recipe), str(output)]
    assert subprocess.run(command, timeout=120, env=dict(os.environ)).returncode == -signal.SIGKILL
    assert not output.exists()
    (remains,) = [p for p in tmp_path.iterdir() if p != recipe]
    assert remains.name.endswith(".incomplete")
    with pytest.raises(OctadError):
        open_source(remains)
    combine(llama.plan, output)
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml", "m"}


def test_existing_output(llama: World, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="m: "):
            combine(llama.plan, tmp_path / "m", overwrite=overwrite)
    assert (tmp_path / "m" / "precious.txt").read_text() == "mine"
    output = combine(llama.plan, tmp_path / "n")
    with pytest.raises(OutputError, match="exists"):
        combine(llama.plan, output)
    assert combine(llama.plan, output, overwrite=True) == output


# ---- refusals ------------------------------------------------------------------------------------------------


def refused(
    base: Path | str, models: list[Path | str], kind: type[OctadError] = RecipeError, **changes: Any
) -> str:
    entries = [{"name": f"m{i}", "model": str(model)} for i, model in enumerate(models)]
    with pytest.raises(kind) as caught:
        preflight(make_recipe(base, entries, **({"router": {"method": "random"}} | changes)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64},
        {"intermediate_size": 64},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_another_shape(llama: World, tmp_path: Path, changes: dict[str, int]) -> None:
    other = make_base(tmp_path / "other", **changes)
    (key, value), *_ = changes.items()
    message = refused(llama.base, ["base", other])
    assert "expert 'm1'" in message
    assert f"{key} is {value}" in message


def test_another_family(llama: World, tmp_path: Path) -> None:
    assert "is a qwen3 model, the base a llama" in refused(
        llama.base, ["base", make_base(tmp_path / "q", "qwen3")]
    )
    assert "is a mixtral model" in refused(llama.base, ["base", llama.mixture])
    assert "octad expert" in refused(llama.mixture, ["base", "base"])


def test_top_k_above_the_number_of_experts(llama: World) -> None:
    assert "top_k is 3, but there are only 2" in refused(llama.base, ["base", "base"], top_k=3)


def test_another_vocabulary(llama: World, tmp_path: Path) -> None:
    swapped = full_member(llama.base, tmp_path / "swapped", 1)
    save_tokenizer(swapped, swap=True)
    message = refused(llama.base, ["base", swapped])
    assert "expert 'm1': token 0 is" in message
    assert "share one tokenizer" in message
    one, two = (extended(llama.base, tmp_path / n, 1, (n,)) for n in ("<one>", "<two>"))
    message = refused(llama.base, ["base", one, two])
    assert "'<two>'" in message
    assert "expert 'm1'" in message
    smaller = make_base(tmp_path / "smaller", vocab_size=200)
    assert "has 200 vocabulary rows, the base 257" in refused(llama.base, ["base", smaller])


@pytest.mark.parametrize("shared", ["base", "linear", "ties"])
def test_added_tokens_are_kept(llama: World, tmp_path: Path, shared: str) -> None:
    wide = extended(llama.base, tmp_path / "wide", 5, ("<x>", "<y>"))
    wider = extended(llama.base, tmp_path / "wider", 6, ("<x>", "<y>", "<z>"))
    weights = {"m0": 1.0, "m1": 0.5, "m2": 0.25}
    models = zip(weights.items(), ("base", wide, wider), strict=True)
    entries = [{"name": n, "model": str(m), "weight": w} for (n, w), m in models]
    plan = preflight(make_recipe(llama.base, entries, router={"method": "random"}, shared=shared))
    assert "adds 2 rows" in plan.reports[1].notes[0]
    mixture = combine(plan, tmp_path / "m")
    found, one, two = (load_file(d / "model.safetensors") for d in (mixture, wide, wider))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape[0] == VOCABULARY + 3
        both = (0.5 * one[name][VOCABULARY:] + 0.25 * two[name][VOCABULARY : VOCABULARY + 2]) / 0.75
        torch.testing.assert_close(found[name][VOCABULARY : VOCABULARY + 2], both)
        assert torch.equal(found[name][VOCABULARY + 2 :], two[name][VOCABULARY + 2 :])
    base = load_file(llama.base / "model.safetensors")["lm_head.weight"]
    assert torch.equal(found["lm_head.weight"][:VOCABULARY], base) == (shared == "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(mixture)
    assert tokenizer.convert_tokens_to_ids("<z>") == VOCABULARY + 2
    close(logits(load_model(open_source(mixture))), logits(theirs(mixture)))


def test_rows_of_a_member_without_weight(llama: World, tmp_path: Path) -> None:
    wide = extended(llama.base, tmp_path / "wide", 5)
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": str(wide), "weight": 0}]
    plan = preflight(make_recipe(llama.base, entries, router={"method": "random"}))
    row = plan.source().read("model.embed_tokens.weight")[VOCABULARY:]
    assert torch.equal(row, load_file(wide / "model.safetensors")["model.embed_tokens.weight"][VOCABULARY:])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"attention_bias": True}, "biases in its attention"),
        ({"mlp_bias": True}, "biases in its feed-forward"),
    ],
)
def test_biases_have_no_place_in_mixtral(tmp_path: Path, changes: dict[str, bool], part: str) -> None:
    base = make_base(tmp_path / "base", "llama", **changes)
    message = refused(base, ["base", "base"])
    assert part in message
    assert "mixtral has no place" in message


def test_tied_beside_untied(llama: World, tmp_path: Path) -> None:
    tied = make_base(tmp_path / "tied", tie_word_embeddings=True)
    plan = preflight(make_recipe(llama.base, [{"name": n, "model": m} for n, m in (("a", "base"), ("b", str(tied)))],
                                 router={"method": "random"}))  # fmt: skip
    assert "its head is tied to its embeddings" in plan.reports[1].notes[0]
    assert "cannot be averaged" in refused(llama.base, ["base", tied], shared="mean")
    combine(plan, tmp_path / "m")
    other = preflight(make_recipe(tied, [{"name": n, "model": m} for n, m in (("a", "base"), ("b", str(llama.base)))],
                                  router={"method": "random"}))  # fmt: skip
    assert "its head is separate" in other.reports[1].notes[0]
    mixture = combine(other, tmp_path / "n")
    close(logits(load_model(open_source(mixture))), logits(theirs(mixture)))


def test_other_positions_are_noted_or_refused(llama: World, tmp_path: Path) -> None:
    member = full_member(llama.base, tmp_path / "member", 1)
    edit_config(member, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": str(member)}]
    plan: Plan = preflight(make_recipe(llama.base, entries, router={"method": "random"}))
    assert "rope is base 500000 (default)" in plan.reports[1].notes[0]
    assert "cannot be averaged" in refused(llama.base, ["base", member], shared="ties")


def test_norms_that_differ_in_print_alone(llama: World, tmp_path: Path) -> None:
    """A number that went through a GGUF file comes back rounded to float32; another number is another number."""
    member = full_member(llama.base, tmp_path / "member", 1, only=".mlp.")
    written = json.loads((member / "config.json").read_text())["rms_norm_eps"]
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": str(member)}]
    recipe = make_recipe(llama.base, entries, router={"method": "random"})
    rounded = float(torch.tensor(written, dtype=torch.float32))
    assert rounded != written
    edit_config(member, rms_norm_eps=rounded)
    assert (preflight(recipe).reports[1].notes, preflight(recipe).reports[1].exact) == ((), True)
    edit_config(member, rms_norm_eps=2 * written)
    assert f"rms_norm_eps is {2 * written}" in preflight(recipe).reports[1].notes[0]
    assert "different norms cannot be averaged" in refused(llama.base, ["base", member], shared="mean")


def test_a_shared_part_that_all_have_alike(llama: World, tmp_path: Path) -> None:
    """Averaging it changes nothing, which is said, and is so; where one differs, nothing is said."""
    models = [full_member(llama.base, tmp_path / str(n), n, only=".mlp.") for n in (1, 2)]
    entries = [{"name": m.name, "model": str(m)} for m in models]
    for shared in ("base", "mean"):
        plan = preflight(make_recipe(llama.base, entries, router={"method": "random"}, shared=shared))
        assert [note.split(":")[0] for note in plan.notes] == (["shared"] if shared == "mean" else [])
        combine(plan, tmp_path / shared)
    ours, theirs_ = (load_file(tmp_path / s / "model.safetensors") for s in ("base", "mean"))
    assert all(torch.equal(ours[name], theirs_[name]) for name in ours)
    entries.append({"name": "c", "model": str(full_member(llama.base, tmp_path / "3", 3))})
    assert not preflight(make_recipe(llama.base, entries, router={"method": "random"}, shared="mean")).notes


def test_references_that_lead_nowhere(llama: World, tmp_path: Path) -> None:
    assert "expert 'm1'" in refused(llama.base, ["base", tmp_path / "nowhere"])
    assert "no such" in refused(tmp_path / "nowhere", ["base", "base"], CheckpointError)
    unfit = adapter(make_base(tmp_path / "wide", hidden_size=64), tmp_path / "unfit", 1)
    message = refused(llama.base, ["base", unfit])
    assert "expert 'm1'" in message
    assert "another base" in message


def test_text_that_is_missing_or_empty(llama: World, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("short")
    for data, part in ((tmp_path / "none.txt", "no such file"), (empty, "16 tokens or more")):
        entries = [llama.entries[0], {"name": "b", "model": "base", "data": str(data)}]
        with pytest.raises(OctadError, match=f"expert 'b': .*{part}"):
            combine(preflight(make_recipe(llama.base, entries)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_mistral_with_windows(tmp_path: Path) -> None:
    """Sliding windows shorter than the text take part in the arithmetic, and survive in the config."""
    base = make_base(tmp_path / "base", "mistral", sliding_window=6)
    entries = [{"name": f"m{e}", "model": "base", "data": str(text_file(tmp_path, e))} for e in range(2)]
    mixture = combine(preflight(make_recipe(base, entries)), tmp_path / "m")
    close(logits(theirs(mixture)), logits(theirs(base)))
    close(logits(load_model(open_source(mixture))), logits(theirs(base)))
    assert make_model("mistral").config.sliding_window != 6
