"""The verbs of the command line, each a short script over the rooms: open, work with a progress bar, print."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octad.cli.combine_view import show_plan, show_rounding
from octad.dist import keep_freed_memory, spare_the_collector
from octad.errors import DataError, OutputError, RequestError
from octad.report import terminal

if TYPE_CHECKING:
    from octad.engine.llm import LLM
    from octad.engine.params import SamplingParams, StructuredOutput


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
    if not shard_bytes > 0:
        raise OutputError(f"--shard-size is {shard_bytes / 1e9:g} GB; give a size above 0")
    plan = preflight(loaded, None if dry_run else output, overwrite=overwrite)
    show_plan(plan, expected_seconds(plan))
    if dry_run or output is None:
        return
    started = time.monotonic()
    with terminal.progress_bar() as progress:
        path = carry_out(plan, output, overwrite=overwrite, max_shard_bytes=shard_bytes, progress=progress)
    terminal.say(f"wrote {path} in {time.monotonic() - started:.1f} s")


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
        hear: dict[str, Any] = {"progress": progress, "tell": _tell}
        if verb == "remove":
            path = room.remove_expert(mixture, name, output, base=base, **hear)
        else:
            spec = ExpertSpec.of(name, str(model), tuple(data))
            if verb == "add":
                path = room.add_expert(mixture, spec, output, base=base, **hear)
            else:
                path = room.replace_expert(mixture, name, spec, output, base=base, **hear)
    terminal.say(f"wrote {path} in {time.monotonic() - started:.1f} s")


def inspect(model: str, against: str | None, *, as_json: bool) -> None:
    """The make-up of a model."""
    from octad.checkpoint.inspect import inspect as look
    from octad.checkpoint.load import open_source
    from octad.cli.inspect_view import render

    source = open_source(model, quantised=True)
    found = look(source, open_source(against, quantised=True) if against else None)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        terminal.out.print(render(found))


def quantize(
    model: str, output: Path | None, to: str, data: Path | None, tokens: int, window: int, **options: Any
) -> None:
    """Round a checkpoint's weights; with `data`, tell what that costs, here and in the output's model card."""
    from octad.checkpoint.load import open_source
    from octad.evaluate.heldout import read_domains, read_texts
    from octad.evaluate.rounding import quantize_and_judge

    if output is None:
        raise OutputError(f"{model}: no output given; add -o DIRECTORY")
    keep_freed_memory()
    started, source = time.monotonic(), open_source(model)
    texts = read_texts(source, read_domains(data), tokens=tokens, window=window).domains if data else {}
    with terminal.progress_bar() as progress:
        path, bits = quantize_and_judge(source, output, to, texts, progress=progress, **options)
    if bits:
        show_rounding(bits)
    terminal.say(f"wrote {path} in {time.monotonic() - started:.1f} s")


def structured(
    schema: Path | None, regex: str | None, grammar: Path | None = None
) -> StructuredOutput | None:
    """The form that --schema, --regex or --grammar asks for. Raises OctadError for several, or a file that cannot be
    read."""
    from octad.engine.params import StructuredOutput

    given = {"json": schema, "regex": regex, "grammar": grammar}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise RequestError("--schema, --regex and --grammar exclude each other; give one of them")
    form: dict[str, Any] = {k: _text_of(v) if isinstance(v, Path) else v for k, v in found.items()}
    return StructuredOutput(**form) if form else None


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def generate(
    model: str,
    prompt: str,
    params: SamplingParams,
    *,
    chat: bool,
    as_json: bool,
    routes: bool,
    quantize: str | None,
    only: str | None,
) -> None:
    """Continue a prompt: streaming, or as JSON when it is complete."""
    from octad.chat import answer_view as report
    from octad.chat import pipe, speakers

    text = pipe.read_prompt(prompt)
    llm = open_llm(model, quantize, only)
    if routes and not llm.expert_names:
        raise RequestError(f"{model}: is dense, there are no routes to show; leave out --routes")
    ids = speakers.encode(llm, text, chat=chat)
    params = replace(params, routed_experts=bool(llm.expert_names))
    if as_json:
        output = llm.generate([ids], params)[0]
        print(json.dumps(report.as_json(llm, output, routes=routes), ensure_ascii=False))
        return
    if terminal.out.is_terminal and not chat:
        speakers.write_prompt(terminal.out, text)
    output = speakers.speak(llm, ids, params, terminal.out)
    report.show(llm, output, terminal.out, routes=routes)


def chat(
    model: str,
    params: SamplingParams,
    *,
    system: str | None,
    load: Path | None,
    quantize: str | None,
    only: str | None,
) -> None:
    """A conversation: at a terminal on the screen, in a pipe line by line."""
    from octad.chat import pipe
    from octad.chat.session import Session, require_chat_template
    from octad.checkpoint.load import load_tokenizer, open_source

    at_terminal = pipe.is_terminal() and terminal.out.is_terminal
    if at_terminal and find_spec("prompt_toolkit") is None:
        raise RequestError(
            "chat: at a terminal it needs the library prompt_toolkit: pip install octad[chat]; or pipe the lines in"
        )
    require_chat_template(
        load_tokenizer(open_source(model, quantised=True)), model
    )  # before the weights are read
    session = Session(open_llm(model, quantize, only), params, label=model, speaker=only)
    if load is not None:
        session.load(load)
    if system is not None:
        session.set_system(system or None)
    if at_terminal:
        from octad.chat.screen import Screen, history_file

        Screen(session, terminal.out, history_file()).run()
    else:
        pipe.converse(session, pipe.read_lines(), terminal.out, terminal.err)


def open_llm(model: str, quantize: str | None = None, only: str | None = None) -> LLM:
    """The model behind an engine, with a sign of life on stderr while it is read."""
    from octad.chat.speakers import choose_expert
    from octad.engine.llm import LLM

    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model can say what this terminal's encoding cannot
    with terminal.err.status(f"loading {model}") if terminal.err.is_terminal else nullcontext():
        llm = LLM(model, quantize=quantize)
    spare_the_collector()
    if only is not None:
        choose_expert(llm, only)
    return llm


def bench(model: str, lengths: Mapping[str, str], *, as_json: bool, **options: Any) -> None:
    """Measure the engine and its peers; a table unless `as_json`, then one line of JSON."""
    from octad.bench.bench import run
    from octad.bench.cases import BenchOptions, whole_numbers
    from octad.bench.table import live, render

    numbers = {name: whole_numbers(name, text) for name, text in lengths.items()}
    lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    asked = BenchOptions(model, **(options | lists | numbers))
    command = shlex.join(["octad", *(Path(part).name for part in sys.argv[1:])])  # nobody's directories
    with live(terminal.err) as tell:
        results = run(asked, tell, command=command)
    if not as_json:
        for part in render(results):
            terminal.out.print(part)
    print(json.dumps(results))


def train(config: Path, output: Path | None) -> None:
    """Tune a mixture or pre-train a model; goes on where an earlier run in `output` stopped."""
    from octad.train.learner import tune_learner
    from octad.train.plot import draw_run
    from octad.train.pretrain import pretrain_learner
    from octad.train.run_config import TuneConfig, load_config
    from octad.train.trainer import Outcome, Trainer

    keep_freed_memory(any_size=True)
    loaded = load_config(config)
    run = _run_directory(config, output, loaded.unused_keys())
    learner = tune_learner(loaded) if isinstance(loaded, TuneConfig) else pretrain_learner(loaded)
    trainer = Trainer(learner, run, _tell)
    outcome = trainer.fit()
    if outcome is Outcome.FINISHED and learner.routers and trainer.world.leads:
        _tell(draw_run(run))
    _tell_outcome(run, stopped=outcome is Outcome.STOPPED)


def branch(config: Path, output: Path | None, only: str | None, *, ray: bool) -> None:
    """Specialists of one base, a progress bar each; those that are finished in `output` are left alone."""
    from octad.train.branch import branch as in_turn
    from octad.train.fanout import fan_out
    from octad.train.run_config import load_branch
    from octad.train.trainer import Outcome

    keep_freed_memory(any_size=True)
    loaded = load_branch(config)
    run = _run_directory(config, output, loaded.unused_keys(ray=ray))
    carry_out = fan_out if ray else in_turn
    bars = terminal.progress_bar() if terminal.err.is_terminal else nullcontext(lambda name, done: None)
    with bars as progress:
        outcome = carry_out(loaded, run, echo=_tell, progress=progress, only=only)
    _tell_outcome(run, stopped=outcome is Outcome.STOPPED)


def _run_directory(config: Path, output: Path | None, unused: Iterable[str]) -> Path:
    """Where a run goes; tells which settings have no effect. Raises OutputError where nothing is given."""
    for key in unused:
        _tell(f"{config}: no effect: {key}")
    if output is None:
        raise OutputError(f"{config}: no output given; add -o DIRECTORY")
    return output


def _leads() -> bool:
    """False in all of torchrun's processes but the first, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _tell(line: str) -> None:
    """One line of a run's report on stderr, as it is."""
    if _leads():
        terminal.err.print(line, markup=False, soft_wrap=True)


def _tell_outcome(run: Path, *, stopped: bool) -> None:
    """The last line; a run that was asked to stop ends with 130, as after any interruption."""
    if not stopped:
        if _leads():
            terminal.say(f"wrote {run}")
        return
    _tell(f"stopped and saved; the same command goes on from {run}")
    raise SystemExit(130)
