"""What can be planned, and on what: names, files, recipes, devices; and one line for everything else."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_models import TinyCheckpoint, TinyModel

from octad.errors import OctadError
from octad.model import cost
from octad.plan.hardware import Figure, assumptions, find_cluster, known_devices, packaged_devices
from octad.plan.shapes import readings

GPT3 = {  # in Llama's form a feed-forward net has three matrices: 2/3 of GPT-3's four widths makes the same size
    "model_type": "llama",
    "num_hidden_layers": 96,
    "hidden_size": 12288,
    "intermediate_size": 32768,
    "num_attention_heads": 96,
    "num_key_value_heads": 96,
    "vocab_size": 50257,
    "tie_word_embeddings": True,
}
BILLIONS = {
    "8x7b": (46.703, 12.880),
    "mixtral-8x22b": (140.630, 39.161),
    "qwen3-30b-a3b": (30.532, 3.353),
    "qwen3-235b-a22b": (235.094, 22.191),
    "olmoe-1b-7b": (6.919, 1.282),
    "llama-3.1-405b": (405.853, 405.853),
    "8x70b": (465.159, 126.930),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_models_by_name(name: str) -> None:
    (found,) = readings(name)
    assert found.parameters / 1e9 == pytest.approx(BILLIONS[name][0], abs=6e-4)
    assert found.active / 1e9 == pytest.approx(BILLIONS[name][1], abs=6e-4)


def test_gpt3_by_its_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT3))
    (found,) = readings(str(tmp_path / "config.json"))
    assert found.parameters / 1e9 == pytest.approx(175, rel=0.01)  # arXiv 2005.14165, table 2.1


def test_both_readings_of_8x220b() -> None:
    apart, shared = readings("8x220b")
    assert apart.parameters / 1e12 == pytest.approx(1.76, rel=0.005)
    assert apart.active / 1e9 == pytest.approx(440, rel=0.005)
    assert cost.parameters(apart.config) / 1e9 == pytest.approx(220, rel=0.005)
    assert shared.parameters < apart.parameters
    saved = 7 * (
        apart.parameters // 8 - 3 * 64 * 16384 * 57344
    )  # all but the feed-forward nets is there once
    routers = 64 * 8 * 16384
    assert apart.parameters - shared.parameters == saved - routers


def test_a_checkpoint_and_its_directory(tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel) -> None:
    directory = tiny_checkpoint("qwen2_moe")
    found = [readings(str(path))[0].parameters for path in (directory, directory / "config.json")]
    assert found == [tiny_model("qwen2_moe").num_parameters()] * 2


def test_a_recipe_and_experts_of_a_dense_model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint("llama")
    recipe = tmp_path / "recipe.yaml"
    members = "".join(f"  - {{name: e{n}, model: base, data: x}}\n" for n in range(4))
    recipe.write_text(f"base: {base}\ntop_k: 1\nexperts:\n{members}")
    (found,) = readings(str(recipe))
    assert (found.config.model_type, found.config.num_experts, found.config.num_experts_per_tok) == (
        "mixtral",
        4,
        1,
    )
    (same,) = readings(str(base), experts=4, top_k=1)
    dense = readings(str(base))[0].parameters
    ffn, routers = 2 * 3 * 32 * 48, 2 * 4 * 32
    assert found.parameters == same.parameters == dense + 3 * ffn + routers


def test_only_the_config_comes_from_the_hub(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return str(tiny_checkpoint("qwen3") / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert readings("some/model")[0].config.model_type == "qwen3"
    assert asked == [("some/model", "config.json")]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, file: str) -> str:
        raise LocalEntryNotFoundError("not in the cache\nand no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OctadError, match=r"some/model: no config\.json from the hub: not in the cache$"):
        readings("some/model")


def test_what_a_checkpoints_reader_alone_understands() -> None:
    config = readings("llama-3.1-8b")[0].config
    assert readings("weights/of.gguf", opened=lambda name: config)[0].parameters == cost.parameters(config)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral-8x7", {}, "did you mean 'mixtral-8x7b'?"),
    ("./nowhere", {}, "is no file"),
    ("model.gguf", {}, "is no file"),
    ("8x7b", {"experts": 4}, "is a mixture already"),
    ("8x7b", {"top_k": 9}, "top-9 is not possible with 8 experts"),
    ("olmoe-1b-7b", {"experts": 2}, "is a mixture already"),
]


@pytest.mark.parametrize(("target", "options", "words"), WRONG)
def test_what_cannot_be_planned_is_said(target: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OctadError) as caught:
        readings(target, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "{", '{"model_type": "llama", "hidden_size": 1e999}', "[" * 100_000])
def test_damaged_files_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OctadError, match=str(tmp_path)):
        readings(str(tmp_path))


def test_devices_by_name_and_number() -> None:
    assert find_cluster("h100x8", nodes=1024).devices == 8192
    assert find_cluster("H100x4").node == 4
    assert find_cluster("h100").node == 8
    assert find_cluster("rtx4090").devices == 1


@pytest.mark.parametrize(
    ("name", "words"), [("h10x8", "did you mean 'h100'?"), ("?", "not known"), ("h100x0", "h100")]
)
def test_unknown_devices_are_said(name: str, words: str) -> None:
    with pytest.raises(OctadError) as caught:
        find_cluster(name)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", packaged_devices())
def test_every_figure_says_how_far_it_was_checked(name: str) -> None:
    device = packaged_devices()[name]
    names = ("tflops", "memory", "bandwidth", "link", "network", "host", "watts")
    for figure in (getattr(device, name) for name in names):
        assert figure is None or (isinstance(figure, Figure) and figure.how != "given" and figure.source)
    assert all(found.why for found in assumptions().values())


def test_dense_figures_only() -> None:
    """An H100 has 1,979 TFLOP/s with sparsity, and 989.4 without."""
    assert packaged_devices()["h100"].tflops == Figure(value=989.4, how="seen", source="hmc-tech.com")


def test_a_hardware_file_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("devices:\n  mine: {memory: 48, bandwidth: 900, tflops: 100, dollars: 2}\n")
    device = find_cluster("mine", own=own).device
    assert (device.bytes, device.bytes_per_second, device.flops) == (48e9, 900e9, 100e12)
    assert "link (unknown)" in device.unchecked()
    assert "h100" in known_devices(own)
    own.write_text("devices:\n  mine: {memory: 48, bandwith: 900}\n")
    with pytest.raises(OctadError, match="bandwidth"):
        find_cluster("mine", own=own)
