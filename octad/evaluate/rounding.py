"""What rounding costs: bits per byte of each domain's text, of one model before and after.

    texts = read_texts(source, domains, tokens=4096, window=512).domains
    path, bits = quantize_and_judge(source, "mixture-int4", "int4", texts)      # bits["french"]: before, after

Before: the source's weights in the machine's usual precision. After: what was written, as the engine runs it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.evaluate.nats import bits_per_byte, window_nats
from octad.fast.loading import open_fast
from octad.fast.saved import check_quantized, save_quantized
from octad.model.transformer import Transformer
from octad.telling import Progress, Share, quiet
from octad.text.windows import Window

Texts = Mapping[str, list[Window]]
Bits = dict[str, tuple[float, float]]


def domain_bits(model: Transformer, texts: Texts, progress: Share = lambda done: None) -> dict[str, float]:
    """Bits per byte by domain; `progress` gets the share done."""
    bits: dict[str, float] = {}
    for done, (name, windows) in enumerate(texts.items(), 1):
        bits[name] = bits_per_byte(window_nats(model, windows), windows)
        progress(done / len(texts))
    return bits


def quantize_and_judge(
    source: TensorSource,
    directory: str | Path,
    name: str,
    texts: Texts,
    *,
    progress: Progress = quiet,
    **options: Any,
) -> tuple[Path, Bits]:
    """save_quantized (with its `options` and errors), and where there are texts, before and after in bits per byte,
    which are in the output's model card too: it appears when it has been judged."""
    if not texts:
        return save_quantized(source, directory, name, progress=progress, **options), {}
    check_quantized(source, directory, name, overwrite=bool(options.get("overwrite")))
    progress("before", 0.0)
    bits: Bits = {}
    before = domain_bits(open_fast(source)[0], texts, partial(progress, "before"))

    def judge(made: Path) -> Bits:
        model = open_fast(QuantizedSource(made, str(directory)))[0]
        after = domain_bits(model, texts, partial(progress, "after"))
        bits.update({domain: (before[domain], after[domain]) for domain in texts})
        return bits

    return save_quantized(source, directory, name, progress=progress, judge=judge, **options), bits
