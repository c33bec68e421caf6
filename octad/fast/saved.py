"""Quantised checkpoints: rounding a model on disk to 8 or 4 bits, tensor by tensor (held.py loads the result).

    save_quantized(source, "mixture-int4", "int4")        # any source; memory holds one weight at a time

The layers' products (attention, feed-forward nets, experts) and an untied head are rounded, each kind to the bits that
quantize.py gives it; embeddings, routers, norms and biases are copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from octad.checkpoint.hf import open_weights
from octad.checkpoint.hub_card import front_matter, hub_facts
from octad.checkpoint.load import load_tokenizer
from octad.checkpoint.names import (
    EMBEDDING,
    HEAD,
    is_attention,
    is_linear,
    tensor_plan,
)
from octad.checkpoint.provenance import PROVENANCE
from octad.checkpoint.quantized import pack_int32, quantization_config, stored
from octad.checkpoint.record_file import RecordWriter
from octad.checkpoint.schemes import Scheme, Schemes
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.writer import CheckpointWriter
from octad.errors import RequestError
from octad.fast.calibrated import Rounded, calibrated
from octad.fast.precision import Precision
from octad.fast.record_plan import HEAD_SCHEME, record_layout
from octad.fast.records import FILE, LAYOUT
from octad.fast.uncalibrated import uncalibrated
from octad.kernels.packing import quick_pack, quick_pack_raw, quick_quantize
from octad.kernels.panels import GROUPS
from octad.model.config import ModelConfig
from octad.staging import StagedDirectory, refuse_inputs
from octad.telling import Progress, quiet
from octad.text.windows import Window

CARD, COPIED = "README.md", (PROVENANCE, "generation_config.json")
SMALLEST_GROUP = 8
Bits = Mapping[str, tuple[float, float]]  # domain -> bits per byte before and after


# ---- writing -------------------------------------------------------------------------------------------------


def save_quantized(
    source: TensorSource,
    directory: str | os.PathLike[str],
    name: str,
    *,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
    progress: Progress = quiet,
    judge: Callable[[Path], Bits] | None = None,
    records: bool = True,
    windows: Sequence[Window] = (),
) -> Path:
    """Write the model with weights rounded to `name` ("int8", "int4": all of a feed-forward net); returns the directory,
    which appears whole or not at all. Feed-forward nets are rounded for the text of `windows`, where there are any
    (calibrated.py); else at 4 bits by what random ids make of their inputs (uncalibrated.py). `judge` gets the directory
    before that, complete but for the card, and says what rounding costs. `records`: write weights as the kernels read
    them, too (records.py).

    Raises RequestError for an unknown name or sizes that no group divides, OutputError as CheckpointWriter, and where the
    source would be replaced."""
    refuse_inputs(directory, [source.directory, Path(source.label)])
    schemes = plan_schemes(source.config, Precision.of(name), source.label)
    tokenizer = load_tokenizer(source)
    plan = _plan(source, schemes)
    with CheckpointWriter(directory, plan, max_shard_bytes=max_shard_bytes, overwrite=overwrite) as writer:
        beside = (
            RecordWriter(writer, FILE, record_layout(source.config, schemes), LAYOUT) if records else None
        )
        _write_weights(source, schemes, windows, _Rounded(writer, beside), progress)
        said = {"quantization_config": quantization_config(schemes)}
        writer.add_json("config.json", {**source.config.raw, **said})
        tokenizer.save(writer)
        for file in COPIED:
            if source.directory is not None and (source.directory / file).is_file():
                writer.copy_in(source.directory / file)
        made = writer.finish()
        if beside is not None:
            beside.finish(open_weights(made)[0])
        bits = judge(made) if judge is not None else None
        writer.add_text(CARD, card(source, name, schemes, bits, tokens=sum(len(w.ids) for w in windows)))
        return writer.commit()


def check_quantized(
    source: TensorSource, directory: str | os.PathLike[str], name: str, *, overwrite: bool = False
) -> None:
    """Raises what save_quantized would, before anything is read or written."""
    refuse_inputs(directory, [source.directory, Path(source.label)])
    schemes = plan_schemes(source.config, Precision.of(name), source.label)
    StagedDirectory(directory, overwrite=overwrite).check()
    CheckpointWriter(directory, _plan(source, schemes)).check_space()


def _write_weights(
    source: TensorSource, schemes: Schemes, windows: Sequence[Window], into: _Rounded, progress: Progress
) -> None:
    """Every tensor, those that are fitted to their inputs first."""
    fitted: Iterable[Rounded] = ()
    begins = "rounding" if windows or schemes.ffn.bits == 4 else "quantising"
    progress(begins, 0.0)  # nothing is left to refuse
    if windows:
        fitted = calibrated(source, schemes, windows, partial(progress, "rounding"))
    elif schemes.ffn.bits == 4:
        fitted = uncalibrated(source, schemes, partial(progress, "rounding"))
    done = set[str]()
    for tensor, raw, scales in fitted:
        into.put(tensor, raw, scales, schemes.ffn)
        done.add(tensor)
    names = [tensor for tensor in tensor_plan(source.config) if tensor not in done]
    for number, tensor in enumerate(names, 1):
        into.write(source, tensor, schemes.of(tensor))
        progress("quantising", number / len(names))


def plan_schemes(config: ModelConfig, precision: Precision, label: str) -> Schemes:
    """How the weights are rounded. Raises RequestError where the layout cannot hold one."""
    shapes = tensor_plan(config)
    attention = {n: shape for n, shape in shapes.items() if is_attention(n)}
    ffn = {n: shape for n, shape in shapes.items() if is_linear(n) and n not in attention}
    head = {n: shape for n, shape in shapes.items() if n == HEAD}
    return Schemes(
        _scheme(precision.ffn, ffn, label),
        _scheme(precision.attention, attention, label),
        _scheme(precision.head, head, label) if head else None,
    )


def _scheme(bits: int, shapes: Mapping[str, tuple[int, ...]], label: str) -> Scheme:
    """With the usual group, or the largest half, quarter, ... of it that divides the inputs of all these weights."""
    group = GROUPS[bits]
    while group >= SMALLEST_GROUP:
        if all(inputs % group == 0 for _, inputs in shapes.values()):
            return Scheme(bits, group)
        group //= 2
    name, inputs = next((n, shape[1]) for n, shape in shapes.items() if shape[1] % SMALLEST_GROUP)
    raise RequestError(
        f"{label}: {name} has {inputs} inputs, no multiple of {SMALLEST_GROUP}: the layout cannot hold it in groups;"
        " run the model with --quantize instead"
    )


def _plan(source: TensorSource, schemes: Schemes) -> dict[str, TensorInfo]:
    plan: dict[str, TensorInfo] = {}
    for name, shape in tensor_plan(source.config).items():
        if scheme := schemes.of(name):
            plan |= {name + suffix: info for suffix, info in stored(scheme, shape).items()}
        else:
            plan[name] = source.info(name)
    return plan


@dataclass(frozen=True)
class _Rounded:
    """Where rounded weights go: into the checkpoint, and as the kernels read them beside it."""

    writer: CheckpointWriter
    records: RecordWriter | None

    def write(self, source: TensorSource, name: str, scheme: Scheme | None) -> None:
        """A tensor, rounded to the nearest or as it is."""
        if scheme is not None:
            self.put(name, *quick_quantize(source.read(name), scheme.bits, scheme.group), scheme)
            return
        self.writer.copy(name, source)
        if self.records is not None and name == EMBEDDING and source.config.tie_word_embeddings:
            # the head, as loading would round it
            head = quick_pack(source.read(name), HEAD_SCHEME.bits, HEAD_SCHEME.group)
            self.records.put(HEAD, head.panels)

    def put(self, name: str, raw: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> None:
        """Integers and scales."""
        self.writer.write(f"{name}_packed", pack_int32(raw, scheme.bits))
        self.writer.write(f"{name}_scale", scales)
        self.writer.write(f"{name}_shape", torch.tensor(raw.shape))
        if self.records is not None:
            self.records.put(name, quick_pack_raw(raw, scales, scheme.bits, raw.shape[1]).panels)


# ---- the model card ------------------------------------------------------------------------------------------


def card(source: TensorSource, name: str, schemes: Schemes, bits: Bits | None = None, tokens: int = 0) -> str:
    """README.md: what the source's says, and how this one differs; with `bits`, what that costs. `tokens`: of the text
    that feed-forward nets were rounded for."""
    old = source.directory / CARD if source.directory is not None else None
    before = old.read_text("utf-8", "replace") if old is not None and old.is_file() else _front_matter(source)
    return f"""{before.rstrip()}

## Rounded to {schemes.ffn.bits} bits

Made from `{Path(source.label).name}` with `octad quantize --to {name}`: feed-forward nets and experts in
{schemes.ffn.bits}-bit integers, one bfloat16 scale for each {schemes.ffn.group} inputs; attention in
{schemes.attention.bits} bits, one for each {schemes.attention.group}; a head of its own in 8; embeddings, routers and
norms as they were.{_fitted(tokens)}
The layout is compressed-tensors' `pack-quantized` (symmetric; scales may be negative), which octad
runs as it is. To change an expert or fit a router, change the model that this one was made from.
{_table(bits) if bits else ""}"""


def _fitted(tokens: int) -> str:
    return f" Feed-forward nets were rounded for {tokens:,} tokens of text (GPTQ)." if tokens else ""


def _front_matter(source: TensorSource) -> str:
    facts = hub_facts(source)
    head = front_matter(
        ["octad", "compressed-tensors"],
        base=facts.get("hub", ""),
        relation="quantized",
        license=facts.get("license", ""),
    )
    return f"{head}# {Path(source.label).name}\n"


def _table(bits: Bits) -> str:
    rows = [f"| {domain} | {before:.4f} | {after:.4f} |" for domain, (before, after) in bits.items()]
    means = (sum(pair[side] for pair in bits.values()) / len(bits) for side in (0, 1))
    rows.append("| **mean** | {:.4f} | {:.4f} |".format(*means))
    head = ["Bits per byte of held-out text:", "", "| text | before | rounded |", "|---|---|---|"]
    return "\n" + "\n".join([*head, *rows]) + "\n"
