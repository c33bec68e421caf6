"""The calibration pass reads what transformers' own routers would: outputs of post_attention_layernorm, no padding."""

from pathlib import Path

import pytest
import torch
import transformers
from members import DENSE, full_member, make_base, make_recipe

from octad.checkpoint.load import load_model, open_source
from octad.combine import fit
from octad.combine.calibrate import Run, gate_inputs
from octad.combine.fit import GENERALIST_WEIGHT, PIECE, Additive, Calibration, cut, runs_of
from octad.combine.preflight import preflight
from octad.combine.recipe import RouterSpec
from octad.combine.statistics import Statistics
from octad.text.windows import Window, batches

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
    for layer, number, x_ND in gate_inputs(source, runs, torch.float32):
        visits.append((layer, number))
        assert x_ND.shape == (sum(LENGTHS), source.config.hidden_size)
        torch.testing.assert_close(x_ND, expected[number][layer], rtol=1e-4, atol=1e-5)
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
    found = [x for _, _, x in gate_inputs(source, [run], torch.float32)]
    for layer, x_ND in enumerate(found):
        expected = torch.cat(seen[layer::2])
        torch.testing.assert_close(x_ND, expected, rtol=1e-4, atol=1e-5)


def test_statistics_weigh_every_expert_alike(tmp_path: Path) -> None:
    """Means and summed grams of weighted runs of unequal length, worked out from the inputs themselves."""
    base = make_base(tmp_path / "base")
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": "base"}]
    source = preflight(make_recipe(base, entries, router={"method": "random"})).source()
    runs = [Run(0, 0, windows(1, (40,))), Run(1, 1, windows(2)), Run(1, 0, windows(3, (9, 30)), 3.0)]
    statistics = Statistics.zeros(2, 2, source.config.hidden_size)
    fitter = Additive(RouterSpec(method="ridge"), statistics, runs)
    for step in gate_inputs(source, runs, torch.float32):
        fitter.see(*step)
    found = {(layer, number): x for layer, number, x in gate_inputs(source, runs, torch.float32)}
    assert len(found) == 6
    for layer in range(2):
        first, own, other = (found[layer, number].double() for number in range(3))
        mass = len(own) + 3 * len(other)
        mean = (own.sum(0) + 3 * other.sum(0)) / mass
        torch.testing.assert_close(statistics.means[layer, 0].double(), first.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.means[layer, 1].double(), mean, rtol=1e-4, atol=1e-5)
        gram = first.T @ first / len(first) + (own.T @ own + 3 * other.T @ other) / mass
        torch.testing.assert_close(statistics.grams[layer].double(), gram, rtol=1e-4, atol=1e-5)


def test_windows_are_cut_in_pieces() -> None:
    (window,) = windows(4, (2 * PIECE + 5,))
    pieces = cut(window)
    assert [len(p.ids) for p in pieces] == [PIECE, PIECE, 5]
    assert sum((p.ids for p in pieces), ()) == window.ids


def test_what_runs_through_whom() -> None:
    texts = [Calibration(windows(e), []) for e in range(3)]
    pieces = [[piece for w in text.windows for piece in cut(w)] for text in texts]
    alone = runs_of(texts, None)
    assert [(r.label, r.path, list(r.windows)) for r in alone] == [(e, e, pieces[e]) for e in range(3)]
    runs = runs_of(texts, 1)
    assert [(r.label, r.path) for r in runs] == [(0, 0), (0, 1), (1, 1), (2, 2), (2, 1)]
    own, through = list(runs[0].windows), list(runs[1].windows)
    assert sorted(own + through, key=pieces[0].index) == pieces[0]
    assert len(own) == round(len(pieces[0]) * 2 / 3)
    assert [r.weight for r in runs] == [1.0, GENERALIST_WEIGHT, 1.0, 1.0, GENERALIST_WEIGHT]
    short = runs_of([Calibration(windows(1, (20,)), []), texts[1]], 1)
    assert [len(r.windows) for r in short[:2]] == [1, 1]
    assert runs_of([Calibration([], []), texts[1]], 0)[0].label == 1


def test_conversations_stay_whole() -> None:
    """A window in which a turn ends is run as it is, through whomever; others are cut."""
    end = 7
    talk = Window((1, 2, end, *([3] * 2 * PIECE)), 0, 0)
    plain = Window(tuple([3] * 2 * PIECE), 0, 1)
    text = Calibration([talk, plain], [])
    (alone,) = runs_of([text], None, (end, 9))
    assert [len(w.ids) for w in alone.windows] == [2 * PIECE + 3, PIECE, PIECE]
    assert alone.windows[0] is talk
    (cut_all,) = runs_of([text], None)
    assert [len(w.ids) for w in cut_all.windows] == [PIECE, PIECE, 3, PIECE, PIECE]


def test_the_generalists_conversations_are_a_run_of_their_own() -> None:
    """They come first, so that the generalist is favoured on them; without any, on its text."""
    end = 7
    talk = Window((1, 2, end), 0, 0)
    plain = Window(tuple([3] * PIECE), 0, 1)
    mixed, dry = Calibration([plain, talk], []), Calibration([plain], [])
    runs = runs_of([mixed, mixed], 1, (end,))
    assert [(run.label, run.path) for run in runs] == [(0, 0), (0, 1), (1, 1), (1, 1)]
    assert [list(run.windows) for run in runs[2:]] == [[talk], [plain]]
    assert [list(run.windows) for run in runs_of([dry, dry], 1, (end,))[2:]] == [[plain]]


def test_the_logistic_sample() -> None:
    """A long run is thinned, always to the same rows, and no position of a piece is left out."""
    x = torch.arange(4096.0)[:, None]
    found = fit._sampled(x, 1000)
    assert torch.equal(found, fit._sampled(x, 1000))
    assert len(found.unique()) == 1000
    assert len((found[:, 0].long() % PIECE).unique()) == PIECE
    assert torch.equal(fit._sampled(x, 4096), x)


def test_the_logistic_sample_fits_in_memory() -> None:
    """65,536 tokens of a narrow model; of a wide one, 15 runs of 8,192 values in bfloat16, no more than 256 MiB."""
    assert fit._rows_per_run(15, 2 * 576) == 65536 // 15
    rows = fit._rows_per_run(15, 2 * 8192)
    assert rows * 15 * 2 * 8192 <= 2**28 < (rows + 1) * 15 * 2 * 8192
