"""Accelerators, and what of their peaks is reached: tables with sources, the package's and the user's own.

    device = find_device("h100x8")                  # a Cluster of one node with 8 devices
    Cluster(device, node=8, nodes=1024).devices
    table().efficiency("decode_moe")                # 0.45

Every figure says how far it was checked (seen, derived, unseen), and what is not known is None: whoever needs it says so.
Rates are in FLOP/s, bytes and bytes a second here; the files say TFLOP/s, GB and GB/s.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from octad.checkpoint.config_file import Section, read_mapping
from octad.errors import RecipeError, did_you_mean

GIGA, TERA = 1e9, 1e12
LARGEST_NODE = 4096  # devices
How = Literal["seen", "derived", "unseen", "given"]


class Figure(Section):
    """A number, how far it was checked, and where it is from."""

    value: Annotated[float, Field(gt=0)]
    how: How = "given"
    source: str = ""


class Range(Section):
    """Two numbers, low and high, of what was seen."""

    value: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
    how: How = "given"
    source: str = ""


def _figure(value: Any) -> Any:
    return value if isinstance(value, Mapping) or value is None else {"value": value}


def _range(value: Any) -> Any:
    return _figure([value, value] if isinstance(value, (int, float)) else value)


Number = Annotated[Figure | None, BeforeValidator(_figure)]
Needed = Annotated[Figure, BeforeValidator(_figure)]


class Device(Section):
    """One accelerator, as the file says it."""

    title: str = ""
    tflops: Number = None
    memory: Needed
    bandwidth: Needed
    link: Number = None
    network: Number = None
    host: Number = None
    node: Annotated[int, Field(ge=1, le=4096)] = 1
    watts: Number = None
    dollars: Annotated[Range | None, BeforeValidator(_range)] = None
    unified: bool = False  # its memory is the host's: a CPU, or Apple's machines

    @property
    def flops(self) -> float | None:
        """Dense bfloat16 products, FLOP/s."""
        return None if self.tflops is None else self.tflops.value * TERA

    @property
    def bytes(self) -> float:
        """Memory."""
        return self.memory.value * GIGA

    @property
    def bytes_per_second(self) -> float:
        """Memory bandwidth."""
        return self.bandwidth.value * GIGA

    def unchecked(self) -> list[str]:
        """Names of the figures that nobody saw in a source, and of those that are missing."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        figures = {k: v for k, v in named.items() if isinstance(v, (Figure, Range))}
        wanted = ("tflops", "link", "network", "watts", "dollars")
        missing = [f"{name} (unknown)" for name in wanted if named[name] is None]
        return [name for name, figure in figures.items() if figure.how == "unseen"] + missing


@dataclass(frozen=True)
class Cluster:
    """`nodes` times `node` devices of one kind."""

    name: str
    device: Device
    node: int
    nodes: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.node * self.nodes

    def rate(self, group: int) -> float | None:
        """Bytes a second each way between devices of a group: the node's link, or the network where it is larger than a
        node; None where that is not known."""
        figure = self.device.link if group <= self.node else self.device.network
        return None if figure is None else figure.value * GIGA


class _Assumption(Section):
    value: float
    why: str


@functools.cache
def assumptions() -> Mapping[str, _Assumption]:
    """What of each peak is reached, and why that is believed."""
    raw = yaml.safe_load((files("octad.plan") / "efficiencies.yaml").read_text(encoding="utf-8"))
    return {name: _Assumption(**values) for name, values in raw.items()}


def reached(name: str) -> float:
    """One of the assumptions."""
    return assumptions()[name].value


@functools.cache
def packaged_devices() -> Mapping[str, Device]:
    """The devices that octad knows."""
    raw = yaml.safe_load((files("octad.plan") / "hardware.yaml").read_text(encoding="utf-8"))
    return _devices(raw, "hardware.yaml")


def known_devices(own: Path | None = None) -> Mapping[str, Device]:
    """Octad's devices, and the user's file's on top. Raises RecipeError."""
    if own is None:
        return packaged_devices()
    label = f"hardware file {own}"
    return {**packaged_devices(), **_devices(read_mapping(own, label, "devices"), label)}


def _devices(raw: Mapping[str, Any], label: str) -> dict[str, Device]:
    listed = raw.get("devices")
    if not isinstance(listed, Mapping) or not all(isinstance(v, Mapping) for v in listed.values()):
        raise RecipeError(
            f"{label}: expected devices, each with a name and figures such as memory and bandwidth"
        )
    return {str(name).lower(): Device.checked(v, f"{label}: device {name}") for name, v in listed.items()}


def find_cluster(name: str, nodes: int = 1, own: Path | None = None) -> Cluster:
    """A device's name, with the number of devices of a node behind an x (h100x8) or its usual one. Raises RecipeError."""
    devices = known_devices(own)
    wanted = name.lower()
    kind, _, count = wanted.rpartition("x")
    if wanted in devices:
        return Cluster(wanted, devices[wanted], devices[wanted].node, nodes)
    if kind in devices and count.isdecimal():
        if len(count) > 9 or not 1 <= int(count) <= LARGEST_NODE:
            raise RecipeError(
                f"hardware {name!r}: a node has 1 to {LARGEST_NODE} devices; more are so many --nodes"
            )
        return Cluster(wanted, devices[kind], int(count), nodes)
    hint = did_you_mean(kind or wanted, devices) or "give figures of your own with --hardware-file"
    raise RecipeError(f"hardware {name!r} is not known; {hint} (known: {', '.join(devices)})")
