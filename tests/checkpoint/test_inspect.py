"""inspect against transformers' counts; octad.json; the result as plain data and as text."""

import dataclasses
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from bundled import smollm2_path
from rich.console import Console
from tiny_models import FAMILIES, MOE, TinyCheckpoint
from upcycled import Recording, Upcycle, upcycled

from octad.checkpoint.gguf.reader import GGUFSource
from octad.checkpoint.hf import SafetensorsSource
from octad.checkpoint.inspect import inspect
from octad.checkpoint.names import router_name
from octad.cli.inspect_view import render
from octad.errors import CheckpointError
from octad.figures import digits, human, sparkline

E, L, D = 3, 2, 32


@pytest.fixture
def upcycle(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Upcycle:
    return functools.partial(upcycled, tiny_checkpoint, tmp_path)


# ---- facts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_those_of_transformers(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    found = inspect(SafetensorsSource(directory, "tiny"))
    assert (found.label, found.family) == ("tiny", family)
    assert found.parameters == theirs.num_parameters()
    assert found.bytes_on_disk == {"float32": 4 * found.parameters}
    assert (found.layers, found.hidden_size, found.vocabulary, found.context_length) == (L, D, 96, 128)
    assert found.tied_head == theirs.config.tie_word_embeddings
    cache = transformers.DynamicCache()
    with torch.no_grad():
        theirs(torch.arange(5)[None], past_key_values=cache)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert found.kv_bytes_per_token == 2 * kept // 5
    assert found.comparison is None
    assert found.provenance is None


@pytest.mark.parametrize("family", MOE)
def test_active_parameters_are_all_but_the_idle_experts(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    stacked = sum(p.numel() for name, p in theirs.named_parameters() if ".experts." in name)
    found = inspect(SafetensorsSource(directory))
    assert (found.experts, found.top_k) == (E, 2)
    assert found.active_parameters == theirs.num_parameters() - stacked // E
    assert found.flops_short_context == found.flops_full_context  # a context of 128 is short already
    assert found.short_context == 128


def test_flops_count_the_scores_of_the_context(tiny_checkpoint: TinyCheckpoint) -> None:
    found = inspect(SafetensorsSource(tiny_checkpoint("llama", max_position_embeddings=2048)))
    per_position = 2 * 2 * D * L  # a product with the key and one with the value, two FLOPs each
    assert found.flops_full_context - found.flops_short_context == per_position * (2048 - 512)


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("family", MOE)
def test_router_norms(family: str, layout: str, tiny_checkpoint: TinyCheckpoint) -> None:
    source = Recording(tiny_checkpoint(family, layout))
    found = inspect(source)
    sparse = [1] if family == "qwen3_moe" else [0, 1]
    assert [router.layer for router in found.routers] == sparse
    assert source.reads == [router_name(family, layer) for layer in sparse]  # a look costs nothing else
    for router in found.routers:
        weight = source.read(router_name(family, router.layer)).double()
        rows = [float(row.norm()) for row in weight]
        assert router.frobenius == pytest.approx(float(weight.norm()))
        assert router.rows == pytest.approx(rows)
        assert (router.smallest, router.largest) == pytest.approx((min(rows), max(rows)))


def test_a_dense_model_has_no_routers(tiny_checkpoint: TinyCheckpoint) -> None:
    found = inspect(SafetensorsSource(tiny_checkpoint("qwen2", dtype=torch.bfloat16)))
    assert (found.experts, found.top_k, found.routers) == (0, 0, ())
    assert found.active_parameters == found.parameters
    assert found.bytes_on_disk == {"bfloat16": 2 * found.parameters}


def test_bytes_of_a_gguf_are_those_in_the_file() -> None:
    path = smollm2_path()
    found = inspect(GGUFSource(path))
    expected: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.tensor_type.name
        expected[name] = expected.get(name, 0) + int(tensor.n_bytes)
    assert found.bytes_on_disk == expected


# ---- provenance ---------------------------------------------------------------------------------------------

MADE = {
    "format": 1,
    "recipe": {"base": "base", "router": {"method": "ridge"}, "shared": {"method": "mean"}, "experts": []},
    "base": {"kind": "safetensors"},
    "experts": [{"name": name} for name in ("general", "[bold]French", "code")],
    "edits": ["replaced code"],
}


def test_provenance(upcycle: Upcycle) -> None:
    mixture, _ = upcycle([0.0, 0.1, 0.2], octad=MADE)
    made = inspect(mixture).provenance
    assert made is not None
    assert made.experts == ("general", "[bold]French", "code")
    assert (made.base, made.router, made.shared, made.edits) == ("base", "ridge", "mean", ("replaced code",))
    assert made.recipe == MADE["recipe"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ({"recipe": {"base": "x"}, "experts": [{}]}, "damaged.*name"),
        (MADE | {"experts": [{"name": "a"}]}, "names 1 experts, the weights have 3"),
    ],
)
def test_damaged_provenance_is_refused(content: Any, message: str, upcycle: Upcycle) -> None:
    mixture, _ = upcycle([0.0, 0.1, 0.2], octad=content)
    with pytest.raises(CheckpointError, match=message) as caught:
        inspect(mixture)
    assert "\n" not in str(caught.value)


# ---- as data and as text ------------------------------------------------------------------------------------


def shown(found: Any, width: int = 110) -> str:
    console = Console(width=width, record=True, color_system=None, file=io.StringIO())
    console.print(render(found))
    return console.export_text()


def test_to_dict_is_plain_data_and_complete(upcycle: Upcycle) -> None:
    found = inspect(*upcycle([0.0, 0.0, 0.02], octad=MADE))
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain.keys() == {field.name for field in dataclasses.fields(found)}
    assert plain["comparison"]["near_copies"] == [{"first": 0, "second": 1, "distance": 0.0, "equal": True}]
    assert plain["provenance"]["experts"] == ["general", "[bold]French", "code"]
    assert len(plain["routers"][0]["rows"]) == E


def test_render(upcycle: Upcycle) -> None:
    text = shown(inspect(*upcycle([0.0, 0.0, 0.02], octad=MADE)))
    for expected in (
        "mixture · mixtral, 3 experts, top 2",
        "every expert is within 2 % of base: upcycled from it",
        "general, [bold]French, code on base",  # names are text, not markup
        "near-copies: 0 and 1 are equal",
        "other parts: embeddings 0, norms 0, attention 0",
    ):
        assert expected in text
    rows = [line.split() for line in text.splitlines()]
    assert ["2", "code", "0.020", "1.000", "██"] in rows  # the expert, and its row of the matrix
    assert ["2", "code", "0.020", "0.020", "·"] in rows


def test_a_mixture_beside_a_mixture_is_not_upcycled_from_it(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Experts are compared with those at their places, and nothing says which mixture was there first."""
    found = {}
    for name, noise in (("one", [0.0, 0.0, 0.02]), ("other", [0.0, 0.0, 0.04]), ("third", [0.0, 0.0, 3.0])):
        (tmp_path / name).mkdir()
        found[name], _ = upcycled(tiny_checkpoint, tmp_path / name, noise)
    said = {name: inspect(found["one"], other).comparison.verdict for name, other in found.items()}
    assert said["one"] == "every weight equals mixture's: a copy of it"
    assert (
        said["other"] == "every expert is within 2 % of the one at its place in mixture: both of one origin"
    )
    assert said["third"].startswith(
        "2 of 3 experts are within 0 % of the one at its place in mixture, the others at"
    )


def test_render_of_dense_and_of_many_experts(tiny_checkpoint: TinyCheckpoint, upcycle: Upcycle) -> None:
    dense = SafetensorsSource(tiny_checkpoint("qwen2"))
    assert "qwen2, dense" in shown(inspect(dense))
    assert "every weight equals" in shown(inspect(dense, dense))
    text = shown(inspect(*upcycle([0.01 * e for e in range(17)])))
    assert "experts beside each other: nearest 0 and 1 (0.010), farthest 15 and 16 (" in text


def test_numbers_in_few_characters() -> None:
    assert [digits(x) for x in (0, 0.03149, 1.414, 0.999, 12.3, 1e-9, math.nan)] == [
        "0",
        "0.031",
        "1.4",
        "1.0",
        "12",
        "1.0e-09",
        "?",
    ]
    assert [human(x) for x in (96, 999_999, 134_515_008)] == ["96", "1 M", "135 M"]
    assert human(2.5e9, "B") == "2.5 GB"
    assert sparkline([0, 0.5, 1.0], 1.0) == "▁▅█"
    assert sparkline([0.0, 0.0], 0.0) == "▁▁"
    assert len(sparkline([1.0] * 61, 1.0)) == 32


def test_damaged_weights_are_said_not_hidden(upcycle: Upcycle) -> None:
    mixture, base = upcycle([0.0, math.nan, 0.0])
    found = inspect(mixture, base)
    assert found.comparison is not None
    assert found.comparison.verdict.startswith("cannot be judged")
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["comparison"]["experts"][1]["mean"] is None
    assert "?" in shown(found)
