"""octad export: a model in the form that other programs load."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octad.cli.options import Model, Overwrite, shard_bytes
from octad.errors import OutputError, RequestError
from octad.report import terminal

if TYPE_CHECKING:
    from collections.abc import Callable

    from octad.checkpoint.source import TensorSource
    from octad.export.hub import Changes

    Progress = Callable[[str, float], None]

FORMS = ("hf", "gguf", "compressed-tensors")
ENGINES = ("sglang",)  # which does not tie the head of mixtures
FAST_GROUPS = (32, 64, 128)


def export(
    model: Model,
    to: Annotated[str, typer.Option(help="hf, gguf or compressed-tensors.")] = "hf",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; gguf: file.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="gguf: f32, f16, bf16, q8_0, q4_0, ...; compressed-tensors: int8 or int4."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="hf: float32, bfloat16 or float16.")] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="hf: a head of its own beside the embeddings.")
    ] = False,
    top_k: Annotated[int | None, typer.Option(help="hf: experts a token.")] = None,
    member: Annotated[str | None, typer.Option(help="This expert alone, as a dense model.")] = None,
    engine: Annotated[str | None, typer.Option("--for", help="An engine's own needs: sglang.")] = None,
    overwrite: Overwrite = False,
    shard_size: Annotated[
        float | None, typer.Option(help="Largest weight file, in GB.", show_default="5.0")
    ] = None,
) -> None:
    """Write a model for other engines: GGUF for llama.cpp, Ollama and LM Studio; Hugging Face's layout in another shape;
    rounded weights for vLLM and SGLang; or one expert as a dense model."""
    from octad.checkpoint.load import open_source
    from octad.dist import keep_freed_memory
    from octad.export.hub import Changes, member_source

    if output is None:
        raise OutputError(f"{model}: no output given; add -o PATH")
    if to not in FORMS:
        raise RequestError(f"--to: found {to!r}, allowed: {', '.join(FORMS)}")
    if engine is not None and engine not in ENGINES:
        raise RequestError(f"--for: found {engine!r}, known: {', '.join(ENGINES)}")
    _refuse_unused(
        to, quantize=quantize, dtype=dtype, untie=untie, top_k=top_k, engine=engine, shard_size=shard_size
    )
    untie = untie or engine == "sglang"
    limit = shard_bytes(5.0 if shard_size is None else shard_size)
    keep_freed_memory()
    started, source = time.monotonic(), open_source(model)
    if member is not None:
        source = member_source(source, member)
    with terminal.progress_bar() as progress:
        if to == "gguf":
            notes = _gguf(source, output, quantize or "bf16", overwrite, progress)
        elif to == "compressed-tensors":
            notes = _compressed(source, output, quantize or "int8", overwrite, limit, progress)
        else:
            changes = Changes(dtype, untie, top_k)
            notes = _hub(source, output, changes, overwrite, limit, progress)
    for note in notes:
        terminal.say(note)
    terminal.say(f"wrote {output} in {time.monotonic() - started:.1f} s")


def _refuse_unused(to: str, **given: object) -> None:
    """What this form has no use for is refused. Raises RequestError."""
    used = {
        "hf": ("dtype", "untie", "top_k", "engine", "shard_size"),
        "gguf": ("quantize",),
        "compressed-tensors": ("quantize", "shard_size"),
    }[to]
    for name, value in given.items():
        if value is not None and value is not False and name not in used:
            option = "for" if name == "engine" else name.replace("_", "-")
            raise RequestError(f"--{option} has no effect with --to {to}; leave it out")


def _gguf(source: TensorSource, output: Path, kind: str, overwrite: bool, progress: Progress) -> list[str]:
    from octad.checkpoint.load import load_tokenizer
    from octad.export.gguf_file import write_gguf
    from octad.export.modelfile import modelfile
    from octad.staging import replace_file

    write_gguf(source, output, kind, overwrite=overwrite, progress=progress)
    text, has_template = modelfile(load_tokenizer(source), output.name)
    beside = output.with_name("Modelfile")
    if beside.exists() and not overwrite:
        return [f"{beside}: exists and was left alone; for Ollama it needs the line FROM ./{output.name}"]
    replace_file(beside, text)
    left_out = "" if has_template else "; it leaves the chat template to Ollama, which reads the file's"
    return [f"wrote {beside}: ollama create NAME -f {beside}{left_out}"]


def _compressed(
    source: TensorSource, output: Path, name: str, overwrite: bool, limit: float, progress: Progress
) -> list[str]:
    from octad.fast.quantize import Precision
    from octad.fast.saved import plan_schemes, save_quantized

    schemes = plan_schemes(source.config, Precision.of(name), source.label)
    for scheme in (schemes.ffn, schemes.attention, *([schemes.head] if schemes.head else [])):
        if scheme.group not in FAST_GROUPS:
            raise RequestError(
                f"{source.label}: its sizes ask for groups of {scheme.group}, the fast kernels of vLLM and SGLang take"
                f" {', '.join(map(str, FAST_GROUPS))}; octad itself runs it: octad quantize"
            )
    save_quantized(  # whoever it is for has no use for records
        source, output, name, overwrite=overwrite, max_shard_bytes=limit, progress=progress, records=False
    )
    return []


def _hub(
    source: TensorSource,
    output: Path,
    changes: Changes,
    overwrite: bool,
    limit: float,
    progress: Progress,
) -> list[str]:
    from octad.export.hub import export_hub

    rounding = export_hub(
        source, output, changes, overwrite=overwrite, max_shard_bytes=limit, progress=progress
    )
    if not rounding.changed:
        return []
    return [
        f"rounding to {changes.dtype} changed {rounding.changed / rounding.weights:.1%} of the weights, the most by"
        f" {rounding.largest:.1e} of itself"
    ]
