"""Parts of parameters against the whole ones, and tensors that several writers fill row by row against safetensors."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octad.checkpoint.load import load_model, open_source
from octad.checkpoint.row_writer import RowWriter
from octad.checkpoint.spans import Parts, read_rows
from octad.checkpoint.writer import CheckpointWriter
from octad.errors import CheckpointError, OutputError

FAMILIES = ("llama", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_that_of_the_whole(tiny_checkpoint, family: str, layout: str) -> None:
    source = open_source(tiny_checkpoint(family, layout=layout))
    parts = Parts(source.config)
    for name, parameter in load_model(source).named_parameters():
        whole = parameter.detach()
        cuts = [(0, size // 3, size) for size in whole.shape[: max(1, whole.dim() - 1)]]
        for edges in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
            part = whole[tuple(slice(*edge) for edge in edges)]
            starts = [*(first for first, _ in edges), 0]
            mine = torch.full_like(part, torch.nan)
            for span in parts.spans(name, starts, part.shape):
                rows = read_rows(source, span)
                assert len(rows) == span.count
                span.of(mine).copy_(rows)
            assert torch.equal(mine, part), name


def test_two_writers_fill_what_one_makes(tiny_checkpoint, tmp_path: Path) -> None:
    """Each half of the rows of everything; in shards; one tensor is copied whole."""
    source = open_source(tiny_checkpoint("mixtral"))
    plan = {name: source.info(name) for name in source.names()}
    first, *others = plan
    with CheckpointWriter(tmp_path / "out", plan, max_shard_bytes=20_000) as writer:
        counts = dict.fromkeys(plan, 0)
        for turn in range(2):
            with RowWriter(writer.stage, plan, 20_000) as rows:
                for name in others:
                    half = len(source.read(name)) // 2
                    rows.write(
                        name, turn * half, source.read(name)[half:] if turn else source.read(name)[:half]
                    )
                if turn:
                    rows.copy_all([first], source)
            for name, count in rows.rows.items():
                counts[name] += count
        writer.written_elsewhere(counts)
        writer.add_text("config.json", "{}")
        writer.commit()
    found = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    assert found.keys() == plan.keys()
    for name, value in found.items():
        assert torch.equal(value, source.read(name))


def test_what_is_missing_or_not_planned_is_said(tiny_checkpoint, tmp_path: Path) -> None:
    source = open_source(tiny_checkpoint("llama"))
    name = "model.norm.weight"
    plan = {name: source.info(name)}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        with RowWriter(writer.stage, plan) as rows:
            rows.write(name, 0, source.read(name)[:4])
            with pytest.raises(
                CheckpointError, match=r"rows \[5\] of model.norm.weight from 30 on are not planned"
            ):
                rows.write(name, 30, source.read(name)[:5])
        with pytest.raises(CheckpointError, match=r"4 rows of model\.norm\.weight were written"):
            writer.written_elsewhere(rows.rows)
    assert not (tmp_path / "out").exists()
    with (
        RowWriter(tmp_path / "gone", plan) as rows,
        pytest.raises(OutputError, match="have to see the directory"),
    ):
        rows.write(name, 0, source.read(name))
