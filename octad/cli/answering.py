"""octad generate and octad chat: the verbs with which a model speaks."""

from __future__ import annotations

import gc
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octad.cli.options import Memory, MinP, Model, Only, Quantize, Seed, TopP, one_process
from octad.engine.params import CHAT, SamplingParams, own_sampling
from octad.errors import RequestError
from octad.guard import read_text
from octad.report import terminal

if TYPE_CHECKING:
    from octad.engine.llm import LLM
    from octad.engine.opened import Opened
    from octad.engine.outputs import RequestOutput
    from octad.engine.params import StructuredOutput
    from octad.fast.beginning import Begun


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - or nothing: from standard input.")] = "-",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: TopP = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="How many answers.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all there is.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Tell each token's N likeliest alternatives.")] = None,
    schema: Annotated[Path | None, typer.Option(help="Answer with JSON of this schema (a file).")] = None,
    regex: Annotated[str | None, typer.Option(help="Answer with what this expression matches.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="Answer in this grammar (a file in Lark's syntax).")
    ] = None,
    routes: Annotated[bool, typer.Option("--routes", help="Tell which experts made each token.")] = False,
    quantize: Quantize = None,
    only: Only = None,
    memory: Memory = None,
) -> None:
    """Continue a text: in colour, each word in that of its main expert, at a terminal; the bare answer in a pipe."""
    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop or (),
        logprobs=logprobs,
        structured=_structured(schema, regex, grammar),
    )
    if n > 1 and params.greedy:
        raise RequestError(f"n: found {n}, allowed: 1 at temperature 0, where all answers would be the same")
    begun = _begin(model, quantize, memory)
    with _no_collection():
        from octad.chat import pipe, speakers

    opened = open_model(model, quantize, only, memory)
    if routes and not opened.expert_names:
        raise RequestError(f"{model}: is dense, there are no routes to show; leave out --routes")
    with terminal.life.doing("", shown=True):  # somebody may be typing
        text = pipe.read_prompt(prompt)
    ids = speakers.encode(opened, text, chat=chat)
    params = replace(params, routed_experts=bool(opened.expert_names))
    opened.check(ids, params)
    llm = load_llm(opened, only, begun)
    shown = text if terminal.out.is_terminal and not chat else ""
    output = (_as_json if as_json else _spoken)(llm, ids, params, shown, routes)
    output.check()


def _as_json(llm: LLM, ids: list[int], params: SamplingParams, before: str, routes: bool) -> RequestOutput:
    """All there is as one JSON object, once it is whole."""
    from octad.chat import answer_view

    with terminal.waiting("writing"):
        output = llm.generate([ids], params)[0]
    _tell_store(llm)
    print(json.dumps(answer_view.as_json(llm, output, routes=routes), ensure_ascii=False))
    return output


def _spoken(llm: LLM, ids: list[int], params: SamplingParams, before: str, routes: bool) -> RequestOutput:
    """As it comes, behind the text that it goes on from."""
    from octad.chat import answer_view, speakers

    if terminal.out.is_terminal:
        terminal.life.rest()  # the answer is one
    if before:
        speakers.write_prompt(terminal.out, before)
    output = speakers.speak(llm, ids, params, terminal.out, before)
    answer_view.show(llm, output, terminal.out, routes=routes)
    _tell_store(llm)
    return output


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told to be.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0: always the likeliest token; else the model's own, or 0.7."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="As in generate; else the model's own, or 0.95.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="As in generate; else the model's own, or 0.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: what was said already gets less likely; 1: off. Else 1.1.")
    ] = None,
    seed: Seed = None,
    quantize: Quantize = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    only: Only = None,
    memory: Memory = None,
    speakers: Annotated[
        bool, typer.Option("--speakers/--no-speakers", help="Each word in its expert's colour, or Markdown.")
    ] = True,
) -> None:
    """Talk with a model. In a pipe: each line is a turn, only the answers are printed."""
    options = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "seed": seed}
    options |= {"repetition_penalty": repetition_penalty}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    SamplingParams(**given)  # what cannot be is said before anything is opened
    begun = _begin(model, quantize, memory)
    with _no_collection():
        from octad.chat import pipe, transcript
        from octad.chat.session import Session, require_chat_template

    at_terminal = pipe.is_terminal() and terminal.out.is_terminal
    if at_terminal and find_spec("prompt_toolkit") is None:
        raise RequestError(
            "chat: at a terminal it needs the library prompt_toolkit: pip install 'octad[chat]'; or pipe the lines in"
        )
    opened = open_model(model, quantize, only, memory)
    require_chat_template(opened.tokenizer, model)
    if load is not None:
        transcript.read(load)  # a file that is none is said before the weights are read
    own = own_sampling(opened.tokenizer.generation)
    params = SamplingParams(max_tokens=max_tokens, **CHAT | own | given)
    session = Session(load_llm(opened, only, begun), params, label=model, speaker=only)
    terminal.life.rest()
    if load is not None:
        session.load(load)
    if system is not None:
        session.set_system(system or None)
    session.show_speakers = speakers and bool(session.llm.expert_names)
    if at_terminal:
        from octad.chat.screen import Screen, history_file

        Screen(session, terminal.out, history_file()).run()
    else:
        pipe.converse(session, pipe.read_lines(), terminal.out, terminal.err)
    _tell_store(session.llm)


def _begin(model: str, quantize: str | None, memory: str | None) -> Begun | None:
    """Import PyTorch, and have the weights read meanwhile. With --memory there is no room for all of them."""
    from octad.cli.quick_start import quick_start
    from octad.fast.beginning import begin

    begun = None if memory is not None else begin(model, quantize)
    with _no_collection():
        quick_start()
    return begun


def open_model(
    model: str, quantize: str | None = None, only: str | None = None, memory: str | None = None
) -> Opened:
    """The model that answers, before its weights are read. Raises OctadError for what is asked of it and cannot be."""
    one_process("generate and chat")
    with _no_collection():
        from octad.chat.speakers import expert_number
        from octad.engine.opened import Opened

        opened = Opened.of(model, quantize=quantize, memory=memory)
    if only is not None:
        expert_number(opened, only)
    return opened


def load_llm(opened: Opened, only: str | None = None, begun: Begun | None = None) -> LLM:
    """The same behind an engine, with a sign of life on stderr while it is read."""
    with _no_collection():
        from octad.dist import keep_freed_memory, spare_the_collector
        from octad.engine.llm import LLM

    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model can say what this terminal's encoding cannot
    with terminal.waiting(f"loading {opened.source.label}"), _no_collection():
        llm = LLM.of(opened, begun)
    spare_the_collector()
    if llm.dtype_note and terminal.err.is_terminal:
        terminal.tell(f"octad: {llm.dtype_note}")
    if only is not None:
        llm.only(only)
    return llm


@contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, nobody looks for garbage: imports and loading make a million objects and no garbage to speak of, and
    looking through them takes a tenth of a start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _tell_store(llm: LLM) -> None:
    """With --memory, how often an expert was there, and what it cost where it was not."""
    if (store := llm.expert_store) is not None and store.stats.tokens:
        terminal.tell(f"octad: {store.stats.line()}")


def _structured(schema: Path | None, regex: str | None, grammar: Path | None) -> StructuredOutput | None:
    """The form that --schema, --regex or --grammar asks for. Raises OctadError for several, or a file that cannot be
    read."""
    from octad.engine.params import StructuredOutput

    given = {"json": schema, "regex": regex, "grammar": grammar}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise RequestError("--schema, --regex and --grammar exclude each other; give one of them")
    form: dict[str, Any] = {k: read_text(v) if isinstance(v, Path) else v for k, v in found.items()}
    return StructuredOutput(**form) if form else None
