"""What depends on the machine alone, on machines that are made up: their clocks, their instructions."""

from typing import Any

import pytest
import torch

from octad import dist

AVX2 = {"avx2": True, "avx512_bf16": False, "amx_bf16": False, "avx512_fp16": False, "amx_fp16": False}


class Machine:
    """Multiplies at a fixed rate, FLOP/s, by a clock of its own; `sides` are those that it was asked for."""

    def __init__(self, rate: float) -> None:
        self.rate, self.now, self.sides = rate, 0.0, list[int]()

    def full(self, shape: tuple[int, int], *_: Any, **__: Any) -> "Matrix":
        self.sides.append(shape[0])
        return Matrix(self, shape[0])


class Matrix:
    def __init__(self, machine: Machine, side: int) -> None:
        self.machine, self.side, self.T = machine, side, self

    def __matmul__(self, other: "Matrix") -> torch.Tensor:
        self.machine.now += 2 * self.side**3 / self.machine.rate
        return torch.zeros(1, 1)


@pytest.mark.parametrize(("rate", "side"), [(1e7, 64), (1e9, 256), (20e9, 512), (187e9, 1024), (1e15, 1024)])
def test_the_rate_of_products_takes_a_moment_on_any_machine(monkeypatch, rate: float, side: int) -> None:
    machine = Machine(rate)
    monkeypatch.setattr(dist.torch, "full", machine.full)
    monkeypatch.setattr(dist.time, "perf_counter", lambda: machine.now)
    assert dist.product_rate(torch.bfloat16) == pytest.approx(rate)
    assert machine.now < 0.2
    assert max(machine.sides) == side


def test_a_dtype_without_instructions_is_said_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(dist.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX2)
    assert "bfloat16 is emulated" in (dist.emulation(torch.bfloat16) or "")
    assert "float16 is emulated" in (dist.emulation(torch.float16) or "")
    assert dist.emulation(torch.float32) is None
    assert dist.emulation(torch.bfloat16, "cuda") is None
    assert dist.compute_dtype() == torch.float32

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX2 | {"amx_bf16": True})
    assert dist.emulation(torch.bfloat16) is None
    assert dist.compute_dtype() == torch.bfloat16

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(dist.platform, "machine", lambda: "aarch64")
    assert dist.emulation(torch.bfloat16) is None


def test_a_world_of_one(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = dist.World.join()
    assert (world.rank, world.size, world.leads) == (0, 1, True)
    assert world.by_leader(lambda: {"a": 1}) == {"a": 1}
    assert world.largest(2.5) == 2.5
