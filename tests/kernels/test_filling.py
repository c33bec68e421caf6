"""Weights packed straight from their files: the bits of packed.py's pack, whatever threads do it, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from octad.kernels.compile import isa, load
from octad.kernels.filling import Filling, Impossible, Rows
from octad.kernels.packed import pack
from octad.kernels.panels import GROUPS, panel_bytes

pytestmark = pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
SHAPES = ((48, 64), (33, 40), (16, 100), (5, 4), (700, 96))


def on_disk(path: Path, weights: list[torch.Tensor]) -> list[Rows]:
    """The weights behind each other in a file, seven bytes from its beginning."""
    data, rows = b"seven..", list[Rows]()
    for weight in weights:
        rows.append(Rows(path, len(data), weight.dtype == torch.bfloat16, *weight.shape))
        data += weight.view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    return rows


def filled(
    weights: list[torch.Tensor], rows: list[Rows], bits: int, threads: int
) -> tuple[Filling, list[torch.Tensor]]:
    """The panels of each weight; one ends where the next begins, but for 128 bytes."""
    group, starts = GROUPS[bits], [0]
    sizes = [panel_bytes(bits, group, weight.shape[1]) for weight in weights]
    for weight, size in zip(weights, sizes, strict=True):
        starts.append(starts[-1] + -(-len(weight) // 16) * size + 128)
    filling = Filling(starts[-1])
    for number, (own, start, size) in enumerate(zip(rows, starts, sizes, strict=False)):
        filling.add(str(number), own, bits=bits, group=group, start=start, step=size)
    filling.begin(threads)
    filling.finish()
    memory = torch.frombuffer(filling.memory, dtype=torch.uint8)
    for start in starts[1:]:
        assert not memory[start - 128 : start].any()
    ends = [start - 128 for start in starts[1:]]
    return filling, [
        memory[start:end].view(-1, size) for start, end, size in zip(starts, ends, sizes, strict=False)
    ]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [0, 3])
def test_panels_are_those_of_pack(tmp_path: Path, bits: int, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(bits)
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    filling, found = filled(weights, on_disk(tmp_path / "weights", weights), bits, threads)
    for weight, panels in zip(weights, found, strict=True):
        assert torch.equal(panels, pack(weight, bits).panels)
    assert filling.missed == []
    assert filling.unchanged()
    filling.stop()


def test_a_weight_with_nan_is_named(tmp_path: Path) -> None:
    weights = [torch.randn(20, 64), torch.full((20, 64), float("nan")), torch.randn(20, 64)]
    filling, found = filled(weights, on_disk(tmp_path / "weights", weights), 8, 1)
    assert filling.missed == ["1"]
    assert torch.equal(found[2], pack(weights[2], 8).panels)
    filling.stop()


def test_what_cannot_be_read_is_impossible(tmp_path: Path) -> None:
    with pytest.raises(Impossible):
        Filling(4096).add("a", Rows(tmp_path / "none", 0, True, 16, 64), bits=8, group=64, start=0, step=1088)
    short = tmp_path / "short"
    short.write_bytes(bytes(1000))
    filling = Filling(4096)
    filling.add("a", Rows(short, 0, True, 16, 64), bits=8, group=64, start=0, step=1088)
    filling.begin(1)
    with pytest.raises(Impossible):
        filling.finish()
    filling.stop()


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    rows = on_disk(tmp_path / "weights", [torch.zeros(16, 64)])
    filling = Filling(4096)
    filling.add("a", rows[0], bits=8, group=64, start=0, step=1088)
    assert filling.unchanged()
    on_disk(tmp_path / "other", [torch.zeros(16, 64)])
    (tmp_path / "other").replace(tmp_path / "weights")
    assert not filling.unchanged()
    filling.stop()


def test_two_threads_that_need_the_library_build_it_once(tmp_path: Path) -> None:
    """One fills memory while the other loads the model: neither may find that the library cannot be had."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: load(tmp_path, ["-O0"], isa="portable").isa, range(2)))
    assert found == ["portable", "portable"]
