"""The calibration pass reads what transformers' own routers would: outputs of post_attention_layernorm, no padding."""

from pathlib import Path

import pytest
import torch
import transformers
from members import DENSE, full_member, make_base, make_recipe

from octad.checkpoint.load import load_model, open_source
from octad.checkpoint.text import Window, batches
from octad.combine.calibrate import Run, gate_inputs
from octad.combine.fit import GENERALIST_WEIGHT, Calibration, runs_of
from octad.combine.preflight import preflight

LENGTHS = (50, 7, 33, 32, 20)


def windows(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[Window]:
    torch.manual_seed(seed)
    return [Window(tuple(torch.randint(256, (n,)).tolist()), 0, i) for i, n in enumerate(lengths)]


def in_order(run: Run) -> list[Window]:
    return [w for batch in batches(run.windows) for w in batch.windows]


def their_inputs(directory: Path, run: Run) -> list[torch.Tensor]:
    """x_ND of every layer from a hook in transformers, one unpadded window after the other."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, block in enumerate(model.model.layers):
        block.post_attention_layernorm.register_forward_hook(
            lambda module, args, out, layer=layer: seen[layer].append(out[0])
        )
    with torch.no_grad():
        for w in in_order(run):
            model(torch.tensor([w.ids]))
    return [torch.cat(pieces) for pieces in seen]


@pytest.mark.parametrize("family", DENSE)
def test_inputs_are_those_of_the_member_in_transformers(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = make_base(tmp_path / "base", family)
    member = full_member(base, tmp_path / "member", 1, only=".mlp.")
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": str(member)}]
    source = preflight(make_recipe(base, entries, router={"method": "random"})).source()
    runs = [Run(0, 0, windows(1)), Run(1, 1, windows(2)), Run(1, 0, windows(2), 3.0)]
    expected = [their_inputs(d, run) for d, run in zip((base, member, base), runs, strict=True)]
    visits = []
    for layer, number, x_ND, weight_N in gate_inputs(source, runs, torch.float32):
        visits.append((layer, number))
        assert x_ND.shape == (sum(LENGTHS), source.config.hidden_size)
        torch.testing.assert_close(x_ND, expected[number][layer], rtol=1e-4, atol=1e-5)
        early = [3.0 if i < 32 else 1.0 for w in in_order(runs[number]) for i in range(len(w.ids))]
        assert weight_N.tolist() == [w * runs[number].weight for w in early]
        assert float(weight_N.sum()) == runs[number].mass()
    assert sorted(visits) == [(layer, n) for layer in range(2) for n in range(3)]
    assert [layer for layer, _ in visits] == sorted(layer for layer, _ in visits)


def test_inputs_are_those_of_octads_own_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": "base"}]
    source = preflight(make_recipe(base, entries, router={"method": "random"}, top_k=1)).source()
    run = Run(0, 1, windows(3, (40, 9)))
    model, seen = load_model(open_source(base)), []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for w in in_order(run):
            model(torch.tensor([w.ids]))
    found = [x for _, _, x, _ in gate_inputs(source, [run], torch.float32)]
    for layer, x_ND in enumerate(found):
        expected = torch.cat(seen[layer::2])
        torch.testing.assert_close(x_ND, expected, rtol=1e-4, atol=1e-5)


def test_what_runs_through_whom() -> None:
    texts = [Calibration(windows(e), []) for e in range(3)]
    alone = runs_of(texts, None)
    assert [(r.label, r.path, len(r.windows)) for r in alone] == [(0, 0, 5), (1, 1, 5), (2, 2, 5)]
    runs = runs_of(texts, 1)
    assert [(r.label, r.path) for r in runs] == [(0, 0), (0, 1), (1, 1), (2, 2), (2, 1)]
    own, through = runs[0], runs[1]
    assert list(through.windows) == list(own.windows[::2])
    assert len(own.windows) == 3
    assert through.weight == GENERALIST_WEIGHT
    assert runs_of([Calibration([], []), texts[1]], 0)[0].label == 1
