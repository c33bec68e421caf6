"""A model in another form: rounded weights, or what other programs load. Behind `octad.export` and `octad.quantize`.

octad.export("mixture", "mixture.gguf", "gguf", quantize="q8_0")
octad.quantize("mixture", "mixture-int8", "int8")
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octad.api.bars import Progress, Report, Tell, bars, teller
from octad.api.outcomes import Written
from octad.api.verbs import WORTH_SAYING, Place, shard_bytes
from octad.errors import RequestError
from octad.figures import duration, human, share
from octad.model import cost

if TYPE_CHECKING:
    from octad.checkpoint.source import TensorSource
    from octad.export.hub import Changes
    from octad.text.windows import Window

FORMS = ("hf", "gguf", "compressed-tensors")
ENGINES = ("sglang",)  # which does not tie the head of mixtures
FAST_GROUPS = (32, 64, 128)
MARLIN_WIDTH = 128  # vLLM 0.32: check_moe_marlin_supports_config
ROUND_TOKENS, ROUND_WINDOW = 1024, 512  # of each kind of text that 4 bits are rounded for
# weights a second, about, on two cores with AVX2: copied, rounded to the nearest, by the gguf package, for text (GPTQ)
WRITTEN, ROUNDED, PACKED, FITTED = 200e6, 100e6, 30e6, 6e6


def export(
    model: Place,
    output: Place,
    to: str = "hf",
    *,
    quantize: str | None = None,
    dtype: str | None = None,
    untie: bool = False,
    top_k: int | None = None,
    member: str | None = None,
    engine: str | None = None,
    overwrite: bool = False,
    shard_size: float | None = None,
    progress: Progress = True,
    tell: Tell = None,
) -> Written:
    """Write a model for other engines: "hf", Hugging Face's layout in another shape; "gguf" for llama.cpp, Ollama and LM
    Studio; "compressed-tensors" for vLLM and SGLang. `member`: this expert alone, as a dense model; `engine`: "sglang",
    for what it needs. What the user should know is in `facts["notes"]`. Raises OctadError.

    >>> octad.export("mixture", "one-alone", member="one").facts["to"]
    'hf'
    """
    from octad.checkpoint.load import open_source
    from octad.dist import keep_freed_memory
    from octad.export.hub import Changes, member_source

    given: dict[str, Any] = {"quantize": quantize, "dtype": dtype, "untie": untie, "top_k": top_k}
    _refuse(to, given | {"engine": engine, "shard_size": shard_size})
    untie = untie or engine == "sglang"
    limit = shard_bytes(5.0 if shard_size is None else shard_size)
    keep_freed_memory()
    started, source, place = time.monotonic(), open_source(fspath(model)), Path(output)
    if member is not None:
        if top_k is not None:
            raise RequestError(
                "--top-k has no effect with --member: one expert is a dense model; leave it out"
            )
        source = member_source(source, member)
    rate = {"hf": WRITTEN, "gguf": PACKED}.get(to, ROUNDED)
    seconds = cost.parameters(source.config) / rate
    with bars(progress) as shown:
        bar = _announcing(source, seconds, teller(tell), shown)
        if to == "gguf":
            notes = _gguf(source, place, (quantize or "bf16").lower(), overwrite, bar)
        elif to == "compressed-tensors":
            notes = _compressed(source, place, quantize or "int8", overwrite, limit, bar)
        else:
            notes = _hub(source, place, Changes(dtype, untie, top_k), overwrite, limit, bar)
    return Written(place, time.monotonic() - started, to=to, notes=notes)


def quantize(
    model: Place,
    output: Place,
    to: str = "int8",
    *,
    data: Place | Mapping[str, Any] | None = None,
    tokens: int = 4096,
    window: int = 512,
    overwrite: bool = False,
    shard_size: float = 5.0,
    records: bool = True,
    calibrate: Place | Mapping[str, Any] | None = None,
    progress: Progress = True,
    tell: Tell = None,
) -> Written:
    """Write a checkpoint with its weights rounded to 8 or 4 bits ("int8", "int4"). `records`: write packed.octad, too,
    which octad maps in place of packing weights. 4 bits are rounded for the text that the mixture's routers were fitted
    on, where it brings that along, or for that of `calibrate`, a file of domains or {name: files}. With `data`, likewise
    one or the other, what rounding costs is in `facts["bits_per_byte"]`: before and after, by domain. Raises OctadError.

    >>> rounded = octad.quantize("mixture", "mixture-int8", data={"one": "one.jsonl"}, tokens=64, window=32)
    >>> before, after = rounded.facts["bits_per_byte"]["one"]
    >>> abs(after / before - 1) < 0.1
    True
    """
    from octad.checkpoint.load import open_source
    from octad.dist import keep_freed_memory
    from octad.evaluate.domains import domains_of
    from octad.evaluate.heldout import read_texts
    from octad.evaluate.rounding import quantize_and_judge
    from octad.fast.saved import check_quantized

    keep_freed_memory()
    limit = shard_bytes(shard_size)
    started, source, texts = time.monotonic(), open_source(fspath(model)), {}
    check_quantized(source, output, to, overwrite=overwrite)  # before text is read
    if data is not None:
        domains = domains_of(data if isinstance(data, Mapping) else fspath(data))
        texts = dict(read_texts(source, domains, tokens=tokens, window=window).domains)
    options: dict[str, Any] = {"overwrite": overwrite, "max_shard_bytes": limit}
    windows = _text_to_round_for(source, to, calibrate)
    options |= {"records": records, "windows": windows}
    judged = sum(len(w.ids) for part in texts.values() for w in part)
    seconds = _seconds(source, windows, judged)
    with bars(progress) as shown:
        bar = _announcing(source, seconds, teller(tell), shown)
        path, bits = quantize_and_judge(source, Path(output), to, texts, progress=bar, **options)
    return Written(path, time.monotonic() - started, to=to, bits_per_byte=bits)


def _seconds(source: TensorSource, windows: Sequence[Window], judged: int) -> float:
    """About how long rounding takes, and judging so many tokens before and after."""
    from octad.dist import compute_dtype, product_rate
    from octad.evaluate.estimate import USUAL

    weights = cost.parameters(source.config)
    reading = 2 * judged * cost.flops_per_token(source.config)
    seconds = weights / (FITTED if windows else ROUNDED)
    return seconds + (reading / (USUAL * product_rate(compute_dtype(), seconds=0.1)) if judged else 0.0)


def _announcing(source: TensorSource, seconds: float, say: Callable[[str], None], progress: Report) -> Report:
    """`progress` that says what takes long before the first stage: only then nothing is left to be refused."""
    waits = seconds > WORTH_SAYING

    def report(stage: str, done: float) -> None:
        """As `progress`."""
        nonlocal waits
        if waits:
            waits = False
            say(f"{source.label}: {human(cost.parameters(source.config))} weights: about {duration(seconds)}")
        progress(stage, done)

    return report


def _text_to_round_for(
    source: TensorSource, to: str, given: Place | Mapping[str, Any] | None
) -> list[Window]:
    """Of `given`, or for 4 bits what a mixture of octad's brings along, ROUND_TOKENS of each kind of text."""
    from octad.combine.sidecars import STATISTICS, load_statistics
    from octad.evaluate.domains import domains_of
    from octad.evaluate.heldout import read_texts

    if given is not None:
        domains = domains_of(given if isinstance(given, Mapping) else fspath(given))
        return read_texts(source, domains, tokens=ROUND_TOKENS, window=ROUND_WINDOW).windows
    directory = source.directory
    if to != "int4" or directory is None or not (directory / STATISTICS).is_file():
        return []
    chosen: list[Window] = []
    for calibration in load_statistics(directory, source.config.num_experts)[0]:
        left = ROUND_TOKENS
        for window in calibration.windows:
            if left > 0:
                chosen.append(window)
                left -= len(window.ids)
    return chosen


def _refuse(to: str, given: Mapping[str, Any]) -> None:
    """Raises RequestError for a form or an engine that there is not, and for an option that the form has no use for."""
    if to not in FORMS:
        raise RequestError(f"--to: found {to!r}, allowed: {', '.join(FORMS)}")
    if (engine := given["engine"]) is not None and engine not in ENGINES:
        raise RequestError(f"--for: found {engine!r}, known: {', '.join(ENGINES)}")
    used = {
        "hf": ("dtype", "untie", "top_k", "engine", "shard_size"),
        "gguf": ("quantize",),
        "compressed-tensors": ("quantize", "shard_size"),
    }[to]
    for name, value in given.items():
        if value is not None and value is not False and name not in used:
            option = "for" if name == "engine" else name.replace("_", "-")
            raise RequestError(f"--{option} has no effect with --to {to}; leave it out")


def _gguf(source: TensorSource, output: Path, kind: str, overwrite: bool, progress: Report) -> list[str]:
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
    return [f"wrote {beside}: ollama create NAME -f {shlex.quote(str(beside))}{left_out}"]


def _compressed(
    source: TensorSource, output: Path, name: str, overwrite: bool, limit: float, progress: Report
) -> list[str]:
    from octad.fast.precision import Precision
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
    if source.config.is_moe and (width := source.config.hidden_size) % MARLIN_WIDTH:
        return [
            f"vLLM's Marlin kernel runs experts whose width is a multiple of {MARLIN_WIDTH}; with {width} vLLM takes its"
            " slower Triton kernel"
        ]
    return []


def _hub(
    source: TensorSource,
    output: Path,
    changes: Changes,
    overwrite: bool,
    limit: float,
    progress: Report,
) -> list[str]:
    from octad.export.hub import export_hub

    rounding = export_hub(
        source, output, changes, overwrite=overwrite, max_shard_bytes=limit, progress=progress
    )
    if not rounding.changed:
        return []
    gone = f"; {rounding.gone:,} are too small for it, and 0 now" if rounding.gone else ""
    return [
        f"rounding to {changes.dtype} changed {share(rounding.changed / rounding.weights)} of the weights, by at"
        f" most {share(rounding.largest)} of each{gone}"
    ]
