"""The comparison against transformers: every contestant is built a second time, out of whole models."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import World, their_nats, theirs
from members import edit_config, make_recipe, save_tokenizer
from peft import PeftModel
from tiny_models import TinyCheckpoint

from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.combine import build
from octad.combine.preflight import preflight
from octad.errors import CheckpointError, DataError
from octad.evaluate import judge as room
from octad.evaluate.compare import Comparison, Settings, compare, read_domains
from octad.evaluate.contestants import Member, Soup, TopK, contestant, counted_load, moe_layers
from octad.evaluate.lineup import members_of
from octad.evaluate.verdict import make_verdict
from octad.model.moe import Router
from octad.text.windows import Window, read_windows

TOKENS, WINDOW = 150, 48
SETTINGS = Settings(TOKENS, WINDOW, resamples=200)


@pytest.fixture(scope="module", autouse=True)
def _exact() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (build, room):
            patch.setattr(module, "compute_dtype", lambda device="cpu": torch.float32)
        yield


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def result(world: World) -> Comparison:
    return compare(open_source(world.mixture), world.domains, SETTINGS)


def texts(world: World) -> dict[str, list[Window]]:
    tokenizer = load_tokenizer(open_source(world.mixture))
    return {d: read_windows(f, tokenizer, tokens=TOKENS, window=WINDOW) for d, f in world.domains.items()}


def agree(result: Comparison, name: str, model: Any, world: World) -> None:
    """A row of the table is what the model of transformers gives."""
    for domain, windows in texts(world).items():
        nats = sum(their_nats(model, windows))
        tokens = sum(len(w.ids) - 1 for w in windows)
        assert result.nats[name][domain] == pytest.approx(nats / tokens, rel=1e-4)
        # one token a byte
        assert result.bits[name][domain] == pytest.approx(nats / tokens / math.log(2), rel=1e-4)


def copied_ffn(target: Any, source: Any) -> Any:
    """`target` with the feed-forward nets of `source`."""
    for ours, other in zip(target.model.layers, source.model.layers, strict=True):
        ours.mlp.load_state_dict(other.mlp.state_dict())
    return target


def test_members_named_like_the_contestants_are_kept_apart(
    world: World, result: Comparison, tmp_path: Path
) -> None:
    """The same weights under names that octad refuses today, and one name twice: all figures stay whose they were."""
    mixture = shutil.copytree(world.mixture, tmp_path / "mixture")
    record = json.loads((mixture / "octad.json").read_text())
    for entry, name in zip(record["experts"], ["oracle", "soup", "twice", "twice"], strict=True):
        entry["name"] = name
    (mixture / "octad.json").write_text(json.dumps(record))
    found = compare(open_source(mixture), world.domains, SETTINGS)
    assert found.members == ["member oracle", "member soup", "twice", "twice (2)"]
    assert list(found.lineup.lost) == ["twice (2)"]
    assert found.lineup.bases == ["member oracle"]
    assert len(found.bits) == len(result.bits)
    for ours, theirs_was in zip(found.bits, result.bits, strict=True):
        assert found.bits[ours] == pytest.approx(result.bits[theirs_was])


def test_who_takes_part(result: Comparison) -> None:
    members = ["general", "lora", "full", "far"]
    assert result.members == members
    assert result.mixtures == ["mixture top-1", "mixture top-2", "mixture top-4"]
    rows = [*members, "soup", "ensemble", "oracle", *result.mixtures]
    assert list(result.bits) == rows == list(result.nats)
    assert list(result.lineup.lost) == ["far"]
    assert all(100 < count <= TOKENS for count in result.texts.tokens.values())


def test_with_its_own_number_of_experts_alone(world: World, result: Comparison) -> None:
    """What the others are costs most of the time; what is judged is judged the same."""
    found = compare(open_source(world.mixture), world.domains, replace(SETTINGS, other_k=False))
    assert [name for name in result.rows if name not in found.rows] == ["mixture top-1", "mixture top-4"]
    assert [name for name in result.rows if name in found.rows] == list(found.rows)
    assert all(found.bits[name] == result.bits[name] for name in found.rows)
    assert all(made["answer"] for made in make_verdict(found)["questions"])


def test_members_are_themselves(world: World, result: Comparison) -> None:
    agree(result, "general", theirs(world.base), world)
    agree(result, "full", theirs(world.models["full"]), world)
    lora = PeftModel.from_pretrained(theirs(world.base), world.models["lora"]).eval()
    agree(result, "lora", lora, world)


def test_an_inexact_member_is_judged_as_it_was(world: World, result: Comparison) -> None:
    agree(result, "far", theirs(world.models["far"]), world)
    assert result.lineup.as_held == {}


def test_what_a_mixture_says_that_it_lacks_is_told(world: World, result: Comparison, tmp_path: Path) -> None:
    """octad.json's own figures where it has them; files of earlier versions say only that something is not exact."""
    assert list(result.lineup.lost) == ["far"]
    mixture = Path(shutil.copytree(world.mixture, tmp_path / "m"))
    raw = json.loads((mixture / "octad.json").read_text())
    raw["experts"][3]["held"] = {
        "exact": False,
        "lost": {"attention": 0.1234, "norms": 0.002},
        "sentence": "",
    }
    (mixture / "octad.json").write_text(json.dumps(raw))
    lost = members_of(open_source(mixture)).lost
    assert lost == {"far": "attention 0.12 from the base, norms 0.0020 from the base"}
    raw["experts"][3].pop("held")
    (mixture / "octad.json").write_text(json.dumps(raw))
    assert members_of(open_source(mixture)).lost == {"far": "attention, norms or embeddings"}


@pytest.mark.parametrize(
    ("accident", "reason"),
    [("moved", "no such file"), ("changed", "changed since"), ("unknown", "does not say")],
)
def test_an_original_that_is_gone(
    world: World, result: Comparison, tmp_path: Path, accident: str, reason: str
) -> None:
    """Then the member is judged as the mixture holds it, with the base's attention, and the result says why."""
    mixture = Path(shutil.copytree(world.mixture, tmp_path / "m"))
    raw = json.loads((mixture / "octad.json").read_text())
    place = shutil.copytree(world.models["far"], tmp_path / "far")
    raw["experts"][3]["path"] = str(tmp_path / "nowhere") if accident == "moved" else str(place)
    if accident == "changed":
        (place / "config.json").write_text((place / "config.json").read_text() + " ")
    if accident == "unknown":
        del raw["experts"][3]["path"]
    (mixture / "octad.json").write_text(json.dumps(raw))
    found = compare(open_source(mixture), world.domains, SETTINGS)
    agree(found, "far", copied_ffn(theirs(world.base), theirs(world.models["far"])), world)
    assert found.nats["far"]["one"] != pytest.approx(result.nats["far"]["one"], rel=1e-4)
    assert list(found.lineup.as_held) == list(found.lineup.lost) == ["far"]
    assert reason in found.lineup.as_held["far"]
    touched = ("far", "oracle", "ensemble", "soup")  # all that the original has a part in
    assert {n: row for n, row in found.bits.items() if n not in touched} == {
        n: row for n, row in result.bits.items() if n not in touched
    }


def test_originals_of_averaged_attention(world: World, tmp_path: Path) -> None:
    """With shared: mean no member is held exactly, the base and adapters neither: all are judged as they were."""
    entries = [
        {"name": name, "model": "base" if name == "general" else str(model)}
        for name, model in world.models.items()
    ]
    recipe = make_recipe(world.base, entries, shared="mean", router={"method": "random"})
    mixture = build.combine(preflight(recipe), tmp_path / "mean")
    found = compare(open_source(mixture), world.domains, SETTINGS)
    assert (list(found.lineup.lost), found.lineup.as_held) == (list(world.models), {})
    for name in ("general", "full", "far"):
        agree(found, name, theirs(world.models[name]), world)
    agree(found, "lora", PeftModel.from_pretrained(theirs(world.base), world.models["lora"]).eval(), world)
    agree(found, "mixture top-2", theirs(mixture), world)
    states = [theirs(world.models[n]).state_dict() for n in ("full", "far")]
    states.append(
        PeftModel.from_pretrained(theirs(world.base), world.models["lora"]).merge_and_unload().state_dict()
    )
    soup = theirs(world.base)
    soup.load_state_dict({k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]})
    agree(found, "soup", soup, world)


def test_the_soup_is_a_model_of_mean_weights(world: World, result: Comparison) -> None:
    """Of all weights, the attention of the member that has one of its own included."""
    lora = PeftModel.from_pretrained(theirs(world.base), world.models["lora"]).merge_and_unload()
    parts = [lora, theirs(world.models["full"]), theirs(world.models["far"])]
    soup = theirs(world.base)
    states = [part.state_dict() for part in parts]
    soup.load_state_dict({k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]})
    agree(result, "soup", soup, world)
    assert "attention included" in str(result.rows["soup"].note)


def test_a_soup_of_a_member_that_is_gone_says_what_it_is(world: World, tmp_path: Path) -> None:
    mixture = Path(shutil.copytree(world.mixture, tmp_path / "m"))
    raw = json.loads((mixture / "octad.json").read_text())
    raw["experts"][3]["path"] = str(tmp_path / "nowhere")
    (mixture / "octad.json").write_text(json.dumps(raw))
    found = compare(open_source(mixture), world.domains, SETTINGS)
    lora = PeftModel.from_pretrained(theirs(world.base), world.models["lora"]).merge_and_unload()
    parts = [lora, theirs(world.models["full"]), theirs(world.models["far"])]
    soup = theirs(world.base)
    for place, layer in enumerate(soup.model.layers):
        states = [p.model.layers[place].mlp.state_dict() for p in parts]
        layer.mlp.load_state_dict({k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]})
    agree(found, "soup", soup, world)
    assert "with the mixture's attention (far:" in str(found.rows["soup"].note)
    assert "nowhere" in str(found.rows["soup"].note)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_mixture_at_each_k(world: World, result: Comparison, k: int, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world.mixture, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": k}))
    agree(result, f"mixture top-{k}", theirs(copy), world)


def test_the_oracle_is_the_minimum(result: Comparison) -> None:
    for table in (result.bits, result.nats):
        for domain in result.domains:
            assert table["oracle"][domain] == min(table[m][domain] for m in result.members)
    assert result.mean("oracle") == pytest.approx(sum(result.bits["oracle"].values()) / 2)


def test_load_shares(world: World, result: Comparison) -> None:
    """They sum to one, and are those of the experts that transformers picks."""
    for domain in ("one", "two"):
        assert sum(result.shares(domain) or []) == pytest.approx(1.0, abs=1e-6)
    model = theirs(world.mixture)
    counts = torch.zeros(2, 4)
    for window in texts(world)["one"]:
        with torch.no_grad():
            logits = model(torch.tensor([window.ids]), output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            counts[layer] += torch.bincount(scores.topk(2).indices.flatten(), minlength=4)
    expected = (counts / counts.sum(1, keepdim=True)).mean(0)
    assert result.shares("one") == pytest.approx(expected.tolist(), abs=1e-4)


# ---- contestants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_the_model_is_itself_again(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_model(open_source(tiny_checkpoint(family)), torch.float32)
    tokens = torch.arange(40).view(2, 20)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return model.head(model.model(tokens))

    before = logits()
    for who in (Member(1), Soup((0, 2)), TopK(1), TopK(3)):
        with contestant(model, who):
            assert not torch.equal(logits(), before)
        with pytest.raises(KeyError), contestant(model, who):
            raise KeyError
        assert torch.equal(logits(), before)
        assert [m.gate.top_k for _, m in moe_layers(model) if isinstance(m.gate, Router)] == [2] * len(
            moe_layers(model)
        )


def test_counting_ends_with_the_block(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load_model(open_source(tiny_checkpoint("mixtral")), torch.float32)
    with torch.inference_mode():
        with counted_load(model) as load:
            model.model(torch.arange(10)[None])
        assert [int(c.sum()) for c in load.counts] == [20, 20]
        model.model(torch.arange(10)[None])
    assert [int(c.sum()) for c in load.counts] == [20, 20]


# ---- models that octad did not make ---------------------------------------------------------------------------


def test_a_dense_model(world: World) -> None:
    result = compare(open_source(world.base), world.domains, SETTINGS)
    assert list(result.bits) == ["model"]
    assert (result.members, result.mixtures, result.load, result.differences) == ([], [], None, [])
    agree(result, "model", theirs(world.base), world)


def foreign(directory: Path, **changes: Any) -> Path:
    save_tokenizer(directory)
    edit_config(directory, **changes)
    return directory


def test_a_mixture_without_octad_json(tiny_checkpoint: TinyCheckpoint, world: World, tmp_path: Path) -> None:
    """Its experts as routes through one of them, where a single one has the weight that it was trained with."""
    copy = foreign(Path(shutil.copytree(tiny_checkpoint("mixtral", vocab_size=257), tmp_path / "m")))
    result = compare(open_source(copy), world.domains, SETTINGS)
    assert result.members == ["expert 0", "expert 1", "expert 2"]
    agree(result, "mixture top-2", theirs(copy), world)
    assert any("octad did not make" in line for line in result.lineup.missing)


def test_experts_that_are_no_models(tiny_checkpoint: TinyCheckpoint, world: World, tmp_path: Path) -> None:
    """Without renormalised weights nothing is known of an expert alone: only the mixture is judged."""
    copy = foreign(Path(shutil.copytree(tiny_checkpoint("qwen3_moe", vocab_size=257), tmp_path / "m")))
    result = compare(open_source(copy), world.domains, SETTINGS)
    assert list(result.rows) == ["mixture top-1", "mixture top-2", "mixture top-3"]
    agree(result, "mixture top-2", theirs(copy), world)
    assert any("one by one" in line for line in result.lineup.missing)
    assert {d.against for d in result.differences if d.of == "mixture top-2"} == {
        "mixture top-1",
        "mixture top-3",
    }


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"experts": [{"name": "x"}]}', '{"experts": []}'])
def test_a_damaged_octad_json(world: World, tmp_path: Path, content: str) -> None:
    copy = Path(shutil.copytree(world.mixture, tmp_path / "copy"))
    (copy / "octad.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"octad\.json"):
        compare(open_source(copy), world.domains, SETTINGS)


def test_a_window_is_no_longer_than_the_context(world: World, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("abcdefgh " * 100)
    domains = {"long": [tmp_path / "long.txt"]}
    result = compare(open_source(world.base), domains, Settings(400, 4096, resamples=50))
    assert result.texts.tokens["long"] == 400 - 4  # windows of 128, 128, 128 and 16


def test_domains(tmp_path: Path) -> None:
    path = tmp_path / "domains.yaml"
    path.write_text("domains: {a: x.txt, b: [y.txt, /z.txt]}")
    assert read_domains(path) == {"a": [tmp_path / "x.txt"], "b": [tmp_path / "y.txt", Path("/z.txt")]}
    path.write_text("domains: {}")
    with pytest.raises(DataError, match="expected 'domains:'"):
        read_domains(path)
    path.write_text("domains: {a: x.txt, a: y.txt}")
    with pytest.raises(DataError, match="key 'a' occurs twice"):
        read_domains(path)


def test_progress_ends_at_one(world: World) -> None:
    seen: list[float] = []
    compare(
        open_source(world.mixture),
        world.domains,
        SETTINGS,
        progress=lambda stage, done: seen.append(done),
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
