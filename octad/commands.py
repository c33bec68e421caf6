"""The verbs of the command line, each a short script over the rooms: open, work with a progress bar, print."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from octad import terminal
from octad.dist import keep_freed_memory
from octad.errors import OctadError, OutputError


def combine(recipe: Path, output: Path | None, *, dry_run: bool, overwrite: bool, shard_bytes: float) -> None:
    """Pre-flight, then the work unless `dry_run`."""
    from octad.combine.build import combine as carry_out
    from octad.combine.build import expected_seconds
    from octad.combine.preflight import preflight
    from octad.combine.recipe import Recipe

    keep_freed_memory()
    loaded = Recipe.load(recipe)
    if output is None and not dry_run:
        raise OutputError(f"{recipe}: no output given; add -o DIRECTORY (or --dry-run)")
    plan = preflight(loaded)
    terminal.show_plan(plan, expected_seconds(plan))
    if dry_run or output is None:
        return
    started = time.monotonic()
    with terminal.progress_bar() as progress:
        path = carry_out(plan, output, overwrite=overwrite, max_shard_bytes=shard_bytes, progress=progress)
    terminal.out.print(f"wrote {path} in {time.monotonic() - started:.1f} s")


def edit(
    verb: str,
    mixture: Path,
    name: str,
    model: str | None,
    data: list[str],
    output: Path | None,
    base: str | None,
) -> None:
    """Add, replace or remove one expert."""
    from octad.combine import edit as room
    from octad.combine.recipe import ExpertSpec

    started = time.monotonic()
    with terminal.progress_bar() as progress:
        if verb == "remove":
            path = room.remove_expert(mixture, name, output, base=base, progress=progress)
        else:
            spec = ExpertSpec.checked(name, str(model), tuple(data))
            if verb == "add":
                path = room.add_expert(mixture, spec, output, base=base, progress=progress)
            else:
                path = room.replace_expert(mixture, name, spec, output, base=base, progress=progress)
    terminal.out.print(f"wrote {path} in {time.monotonic() - started:.1f} s")


def inspect(model: str, against: str | None, *, as_json: bool) -> None:
    """The make-up of a model."""
    from octad.checkpoint.inspect import inspect as look
    from octad.checkpoint.inspect_view import render
    from octad.checkpoint.load import open_source

    source = open_source(model)
    found = look(source, open_source(against) if against else None)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        terminal.out.print(render(found))


def evaluate(model: str, data: Path, tokens: int, window: int, *, as_json: bool) -> None:
    """The comparison in bits per byte."""
    from octad.checkpoint.load import open_source
    from octad.evaluate.compare import compare, read_domains

    keep_freed_memory()
    domains = read_domains(data)
    with terminal.progress_bar() as progress:
        result = compare(open_source(model), domains, tokens=tokens, window=window, progress=progress)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    terminal.show_comparison(result)
    terminal.out.print(terminal.verdict(result))


def generate(model: str, prompt: str, *, chat: bool, **options: Any) -> None:
    """Continue a prompt, streaming."""
    from octad.checkpoint.load import load_model, load_tokenizer, open_source
    from octad.dist import compute_dtype
    from octad.evaluate.compare import expert_names

    if not prompt.strip():
        raise OctadError("the prompt is empty; give some text")
    keep_freed_memory()
    source = open_source(model)
    tokenizer = load_tokenizer(source)
    ids = (
        tokenizer.encode_chat([{"role": "user", "content": prompt}])
        if chat
        else tokenizer.encode(prompt, add_special_tokens=True, parse_special=False)
    )
    loaded = load_model(source, compute_dtype())
    names = expert_names(source)[0] if source.config.is_moe else []
    if not chat:
        terminal.out.print(prompt, end="", style="dim", markup=False)
    speak(loaded, tokenizer, ids, **options)
    if names and terminal.out.is_terminal:
        terminal.out.print(terminal.legend(names))


def speak(model: Any, tokenizer: Any, ids: list[int], **options: Any) -> None:
    """Print the continuation, word by word, each in the colour of its main expert; never half a character."""
    from octad.engine.generate import generate as run

    pending: list[int] = []
    votes: list[int | None] = []
    for token in run(model, ids, eos_ids=tokenizer.eos_ids, **options):
        piece = tokenizer.decode([token.id], skip_special_tokens=False)
        if pending and (piece[:1].isspace() or not piece[:1].isalnum()) and not _broken(tokenizer, pending):
            _flush(tokenizer, pending, votes)
            pending, votes = [], []
        pending.append(token.id)
        votes.append(token.speaker)
    if pending:
        _flush(tokenizer, pending, votes)
    terminal.out.print()


def _broken(tokenizer: Any, ids: list[int]) -> bool:
    """True while the last character's bytes are not all there."""
    return bool(tokenizer.decode(ids).endswith("\ufffd"))


def _flush(tokenizer: Any, ids: list[int], votes: list[int | None]) -> None:
    main = max(set(votes), key=votes.count)
    terminal.out.print(terminal.word(tokenizer.decode(ids), main), end="")
