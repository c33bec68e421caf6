"""What a run tells while it trains: one record an interval, to the console, a JSONL file and TensorBoard alike.

    telemetry = Telemetry(run, model, echo=print)
    telemetry.count(batch, losses); telemetry.write(step, facts)

Bits per byte by domain (comparable between tokenizers), tokens a second, MFU (the share of the machine's measured matrix
product rate that the run's arithmetic comes to), the gradient's length, and for each layer the experts' real load, its
worst excess (MaxVio), the router's entropy and experts that nobody uses.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from octad import portable
from octad.dist import World
from octad.errors import OutputError
from octad.figures import duration, percent
from octad.model import cost
from octad.model.balance import LoadStatistics
from octad.model.config import ModelConfig
from octad.train.data import IGNORED, Batch

LOG = "log.jsonl"


class Telemetry:
    """Adds up what happens between two records, from `step` on. `echo` gets one line a record; `lengths_V` are the
    tokens' bytes. Of many ranks, rank 0 writes, for all."""

    def __init__(
        self,
        run: Path,
        lengths: Sequence[int],
        echo: Callable[[str], None],
        flops_per_token: float,
        peak: float,
        world: World,
        step: int = 0,
    ) -> None:
        self.echo, self.flops_per_token, self.peak = echo, flops_per_token, peak
        self.lengths = torch.tensor(lengths)
        self.world = world
        self.log = (run / LOG if world.leads else Path(os.devnull)).open("a", encoding="utf-8")
        if world.leads:
            _alone(self.log, run)
            _end_line(self.log)
        self.board = _tensorboard(run) if world.leads else None
        self.step = step
        self._clear()

    def count(self, batch: Batch, losses_N: torch.Tensor) -> None:
        """One micro-batch: tokens, and nats and bytes by source."""
        losses, targets = losses_N.detach().cpu().view(batch.targets.shape), batch.targets.cpu()
        learnt = targets != IGNORED
        sizes = self.lengths[targets.clamp(min=0)] * learnt
        self.tokens += batch.tokens.numel() * self.world.size
        for row, (name, _) in enumerate(batch.windows):
            self.nats[name] += float(losses[row].sum())
            self.bytes[name] += int(sizes[row].sum())

    def routed(self, layers: Sequence[LoadStatistics]) -> None:
        """What the routers of all layers did in one step."""
        self.routing.append(layers)

    def write(self, step: int, steps: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The record of the interval; it is returned, and the sums begin anew. Every rank has to call this."""
        took = max(1e-9, time.perf_counter() - self.since)
        rate, self.pace, self.step = self.tokens / took, took / max(1, step - self.step), step
        told = self.world.gather((self.nats, self.bytes))
        nats = {n: sum(part[n] for part, _ in told) for n in sorted({n for part, _ in told for n in part})}
        bits = {n: x / math.log(2) / max(1, sum(sizes[n] for _, sizes in told)) for n, x in nats.items()}
        record: dict[str, Any] = dict(facts) | {"step": step, "tokens_per_second": rate}
        record |= {"mfu": rate * self.flops_per_token / self.peak, "bits_per_byte": bits}
        layers = [LoadStatistics.over(layer) for layer in zip(*self.routing, strict=True)]
        record["layers"] = [dict(layer.__dict__) for layer in layers]
        left = f"  {duration((steps - step) * self.pace)} left" if step < steps else ""
        self.echo(console_line(record, steps) + left)
        self._put(record)
        self._clear()
        return record

    def evaluated(self, step: int, bits: Mapping[str, float]) -> None:
        """Held-out bits per byte by domain."""
        mean = sum(bits.values()) / len(bits)
        told = "  ".join(f"{name} {value:.4f}" for name, value in bits.items())
        self.echo(f"held-out bits per byte at step {step}: mean {mean:.4f}  {told}")
        self._put({"step": step, "held_out": dict(bits), "held_out_mean": mean})
        self.since = time.perf_counter()

    def close(self) -> None:
        """Finish the files."""
        self.log.close()
        if self.board is not None:
            self.board.close()

    def _put(self, record: Mapping[str, Any]) -> None:
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()
        if self.board is not None:
            for name, value in flat(record):
                self.board.add_scalar(name, value, record["step"])

    def _clear(self) -> None:
        self.tokens, self.since = 0, time.perf_counter()
        self.routing: list[Sequence[LoadStatistics]] = []
        self.nats: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)


def console_line(record: Mapping[str, Any], steps: int) -> str:
    """One record as a line of text."""
    bits = record["bits_per_byte"].values()
    parts = [
        f"step {record['step']}/{steps}  loss {record['loss']:.4f}  bits/byte {sum(bits) / max(1, len(bits)):.4f}",
        f"{record['tokens_per_second']:,.0f} tok/s  mfu {percent(record['mfu'])}  |g| {record['gradient_norm']:.3f}",
    ]
    if layers := record["layers"]:
        worst = max(range(len(layers)), key=lambda n: layers[n]["max_violation"])
        entropy = sum(layer["entropy"] for layer in layers) / len(layers)
        parts.append(f"MaxVio {layers[worst]['max_violation']:.2f} (layer {worst})  entropy {entropy:.2f}")
        if dead := sum(len(layer["dead"]) for layer in layers):
            parts.append(f"DEAD EXPERTS: {dead}")
        if any(layer["dropped"] for layer in layers):
            parts.append(f"dropped {percent(sum(layer['dropped'] for layer in layers) / len(layers), 1)}")
    return "  ".join(parts)


def flat(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Every number of a record under a path of names."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += [(f"{key}/{name}", number) for name, number in flat(value)]
        elif key == "layers":
            found += [(f"layer{n}/{name}", x) for n, layer in enumerate(value) for name, x in flat(layer)]
        elif isinstance(value, (int, float)) and key != "step":
            found.append((key, value))
    return found


def training_flops(config: ModelConfig, trainable: Mapping[str, nn.Parameter], window: int) -> float:
    """FLOPs of a token's forward and backward pass, where these parameters learn: norms and biases count for nothing."""
    return cost.training_flops(config, {n: p.numel() for n, p in trainable.items() if p.dim() >= 2}, window)


def _tensorboard(run: Path) -> Any:
    """A SummaryWriter, or None where TensorBoard is not installed: the JSONL file has it all."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"))


def _alone(log: IO[str], run: Path) -> None:
    """Raises OutputError where another process trains in this directory; the lock goes with the log or the process."""
    try:
        portable.lock(log.fileno())
    except BlockingIOError:
        log.close()
        raise OutputError(f"{run}: another process trains here; wait for it, or choose another -o") from None
    except OSError:  # a file system without locks
        pass


def _end_line(log: IO[str]) -> None:
    """A line that a kill cut short is left as it is, and the next one does not go on from it."""
    with open(log.name, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size and portable.read_at(file.fileno(), 1, size - 1) != b"\n":
            log.write("\n")
