"""Processes of torchrun make the mixture that one makes, to the byte; a large expert, matrix by matrix, the same."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from members import adapter, full_member, make_base, make_recipe, text_file
from safetensors.torch import load_file, save_file

from octad.checkpoint.writer import CheckpointWriter
from octad.combine import calibrate, layer_parts, statistics
from octad.combine.build import combine
from octad.combine.calibrate import Run, gate_inputs
from octad.combine.preflight import preflight
from octad.combine.recipe import Recipe
from octad.text.windows import Window


def recipe(directory: Path, **changes: object) -> Path:
    base = make_base(directory / "base", "llama")
    models = {
        "general": "base",
        "full": str(full_member(base, directory / "full", 1, only=".mlp.")),
        "adapter": str(adapter(base, directory / "adapter", 3)),
    }
    experts = [
        {"name": name, "model": model, "data": str(text_file(directory, seed))}
        for seed, (name, model) in enumerate(models.items())
    ]
    raw = {"base": str(base), "experts": experts, "router": {"tokens": 400, "window": 64}} | changes
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def launch(ranks: int, file: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "octad", "combine", str(file), "-o", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def same(out: Path, twin: Path) -> None:
    files = {path.name: path.read_bytes() for path in twin.iterdir()}
    assert {path.name for path in out.iterdir()} == set(files)
    for name, data in files.items():
        assert (out / name).read_bytes() == data, name


def alone(file: Path, out: Path) -> Path:
    torch.set_num_threads(1)
    return combine(preflight(Recipe.load(file)), out, max_shard_bytes=20_000)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_several_processes_write_what_one_does(tmp_path: Path, ranks: int) -> None:
    """Of four, one has no member to take through."""
    file = recipe(tmp_path)
    done = launch(ranks, file, tmp_path / "several", "--shard-size", "0.00002")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") + done.stderr.count("wrote ") == 1
    same(tmp_path / "several", alone(file, tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ridge", "logistic", "random"])
@pytest.mark.parametrize("share", ["base", "mean"])
def test_three_processes_and_every_way_to_fit(tmp_path: Path, method: str, share: str) -> None:
    router = {"method": method, "tokens": 400, "window": 64}
    file = recipe(tmp_path, router=router, shared={"method": share})
    done = launch(3, file, tmp_path / "three", "--shard-size", "0.00002")
    assert done.returncode == 0, done.stderr
    same(tmp_path / "three", alone(file, tmp_path / "one"))


@pytest.mark.slow
def test_what_one_process_finds_wrong_all_say_and_nothing_is_left(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    weights = tmp_path / "full" / "model.safetensors"
    tensors = load_file(weights)
    for part in ("gate", "up", "down"):  # finite, and so are their squares: what they make of the text is not
        tensors[f"model.layers.0.mlp.{part}_proj.weight"][:] = 1e15
    save_file(tensors, weights, {"format": "pt"})
    before = set(tmp_path.iterdir())
    done = launch(2, file, tmp_path / "two")
    assert done.returncode != 0
    assert "NaN or infinite values" in done.stderr
    assert set(tmp_path.iterdir()) == before


def test_matrix_by_matrix_a_large_expert_makes_the_same_inputs(tmp_path: Path, monkeypatch) -> None:
    base = make_base(tmp_path / "base", "llama")
    member = full_member(base, tmp_path / "member", 1, only=".mlp.")
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": str(member)}]
    source = preflight(make_recipe(base, entries, router={"method": "random"})).source()
    torch.manual_seed(0)
    windows = [Window(tuple(torch.randint(256, (n,)).tolist()), 0, n) for n in (50, 7, 33)]
    runs = [Run(0, 0, windows), Run(1, 1, windows), Run(1, 0, windows, 3.0)]

    def seen(names: list[str]) -> list[tuple[int, int, torch.Tensor]]:
        return list(gate_inputs(source, runs, torch.float32, lambda name, tensor: names.append(name)))

    whole, single = list[str](), list[str]()
    want = seen(whole)
    monkeypatch.setattr(calibrate, "SINGLY", 0)
    got = seen(single)
    assert sorted(single) == sorted(whole)  # each once
    for (layer, number, x), (their_layer, their_number, y) in zip(got, want, strict=True):
        assert (layer, number) == (their_layer, their_number)
        assert torch.equal(x, y)


def test_blocks_of_an_expert_whose_adapter_changes_some_of_its_matrices(tmp_path: Path, monkeypatch) -> None:
    """What an adapter changes has to be made whole; the gates lie on the disk."""
    base = make_base(tmp_path / "base", "llama")
    member = adapter(base, tmp_path / "member", 1, ["up_proj"])
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": str(member)}]
    source = preflight(make_recipe(base, entries, router={"method": "random"})).source()
    runs = [Run(e, e, [Window((1, 2, 3, 4, 5), 0, 0)]) for e in range(2)]

    def seen() -> list[torch.Tensor]:
        return [x for _, _, x in gate_inputs(source, runs, torch.float32, calibrate.forget)]

    want = seen()
    monkeypatch.setattr(calibrate, "SINGLY", 0)
    monkeypatch.setattr(layer_parts, "BLOCK_BYTES", 1000)
    for got, expected in zip(seen(), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_by_blocks_of_rows_a_large_expert_makes_the_same_mixture(tmp_path: Path, monkeypatch) -> None:
    """The bytes of every weight but the routers, whose products were cut another way: within rounding."""
    file = recipe(tmp_path)
    whole = load_all(alone(file, tmp_path / "whole"))
    monkeypatch.setattr(calibrate, "SINGLY", 0)
    monkeypatch.setattr(layer_parts, "BLOCK_BYTES", 1000)
    seen: Counter[str] = Counter()
    real = CheckpointWriter.write_rows

    def write_rows(self: CheckpointWriter, name: str, first: int, tensor: torch.Tensor) -> None:
        assert first == seen[name]
        seen[name] += len(tensor)
        real(self, name, first, tensor)

    monkeypatch.setattr(CheckpointWriter, "write_rows", write_rows)
    found = load_all(alone(file, tmp_path / "blocks"))
    assert seen  # and all of it, or the mixture were not complete
    for name, tensor in whole.items():
        router = "gate.weight" in name
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-4 * float(tensor.abs().max()) if router else 0
        )


def load_all(mixture: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in mixture.glob("*.safetensors") for n, t in load_file(path).items()}


def test_sums_that_are_many_lie_in_a_file_and_are_the_same(tmp_path: Path, monkeypatch) -> None:
    file = recipe(tmp_path)
    want = alone(file, tmp_path / "memory")
    monkeypatch.setattr(statistics, "IN_MEMORY", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = set(tmp_path.iterdir())
    same(alone(file, tmp_path / "file"), want)
    assert set(tmp_path.iterdir()) == before | {tmp_path / "file"}
    grams = torch.randn(2, 5, 5)
    grams = grams + grams.mT
    assert torch.equal(statistics.unpack(statistics.pack(grams), 5), grams)
