"""Builds of the kernels that tests compare with the slow twins: as built for this machine, as plain C for others, without
threads, and those of instruction sets that this processor need not have, run on emulated instructions
(tests/kernels/emulated.h).

    from kernel_builds import kernels, one_thread    # fixtures: every build in turn; one thread and a seed for each test
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octad.kernels.compile import Library, load, runnable
from octad.kernels.native import NativeKernels

HEADER = Path(__file__).parents[1] / "kernels" / "emulated.h"
EMULATED = {
    "avxvnni": 1,
    "avx512": 2,
    "avx512vnni": 3,
    "avx512bf16": 4,
    "amx": 5,
}  # as the header counts them


def emulated(isa: str) -> Library:
    """Compiled for AVX2 with this instruction set's code and emulated instructions; once a run, in its own cache."""
    return load(flags=["-O1", "-include", str(HEADER), f"-DEMULATED={EMULATED[isa]}"], isa="avx2")


def emulations() -> list[object]:
    """Test parameters, "emulated amx" and so on: the quickest by default, the others among the slow tests."""
    if "avx2" not in runnable():
        return []
    first, *others = [f"emulated {isa}" for isa in EMULATED]
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


BUILDS = [*runnable(), "one thread", *emulations()]


def library_of(build: str) -> Library:
    """The library of an entry of BUILDS."""
    if build == "one thread":
        return load(flags=["-O1"], openmp=False)
    return emulated(build.split()[1]) if build.startswith("emulated ") else load(isa=build)


def kernels_of(build: str) -> NativeKernels:
    """The kernels of an entry of BUILDS, which are what their name says."""
    made = NativeKernels(library_of(build))
    assert made.isa == build or " " in build
    assert (made.features & 3 == 0) == (build == "portable")
    assert bool(made.features & 4) == (build != "one thread")
    assert bool(made.features & 8) == build.endswith("amx")
    return made


@pytest.fixture(scope="module", params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    """Every build in turn."""
    return kernels_of(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread of PyTorch and a seed, for each test of a module that imports this."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
