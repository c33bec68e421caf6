"""The command line: one verb a function, each a few lines over one room, imported late so that --help is quick.

A user's mistake is one line on stderr and exit code 2; an interruption exits with 130; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from octad.errors import OctadError, RequestError

app = typer.Typer(
    help="One mixture-of-experts language model out of eight smaller ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
expert_app = typer.Typer(
    help="Change one expert of a mixture without refitting the others.", no_args_is_help=True
)
app.add_typer(expert_app, name="expert")

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Mixture = Annotated[Path, typer.Argument(help="A mixture made by octad combine.")]
Data = Annotated[list[str] | None, typer.Option("--data", help="Calibration text; may be repeated.")]
Model = Annotated[str, typer.Argument(help="A checkpoint, .gguf file, hub id or bundled base.")]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
]
MinP = Annotated[float, typer.Option(help="Leave out tokens this many times less likely than the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Quantize = Annotated[str | None, typer.Option(help="Weights in int8 or int4.")]
Only = Annotated[str | None, typer.Option(help="Send every token to this expert.")]
Base = Annotated[str | None, typer.Option("--base", help="The mixture's base, where it cannot be found.")]


@app.command()
def combine(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and measure the members, write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    shard_size: Annotated[float, typer.Option(help="Largest weight file, in GB.")] = 5.0,
) -> None:
    """Make one mixture out of the members of a recipe."""
    from octad.cli import commands

    commands.combine(recipe, output, dry_run=dry_run, overwrite=overwrite, shard_bytes=shard_size * 1e9)


@expert_app.command("add")
def expert_add(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The new expert's name.")],
    model: Annotated[str, typer.Option(help="Its weights: a checkpoint or an adapter.")],
    data: Data = None,
    output: Output = None,
    base: Base = None,
) -> None:
    """Add an expert (in place, or to --output)."""
    from octad.cli import commands

    commands.edit("add", mixture, name, model, data or [], output, base)


@expert_app.command("replace")
def expert_replace(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The expert to replace.")],
    model: Annotated[str, typer.Option(help="Its new weights: a checkpoint or an adapter.")],
    data: Data = None,
    output: Output = None,
    base: Base = None,
) -> None:
    """Replace an expert (in place, or to --output)."""
    from octad.cli import commands

    commands.edit("replace", mixture, name, model, data or [], output, base)


@expert_app.command("remove")
def expert_remove(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The expert to remove.")],
    output: Output = None,
    base: Base = None,
) -> None:
    """Remove an expert (in place, or to --output)."""
    from octad.cli import commands

    commands.edit("remove", mixture, name, None, [], output, base)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A checkpoint, .gguf file, hub id or bundled base.")],
    against: Annotated[
        str | None, typer.Option(help="Measure the experts' distance from this model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a model is made of."""
    from octad.cli import commands

    commands.inspect(model, against, as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A mixture (or any model).")],
    data: Annotated[Path | None, typer.Option(help="YAML with `domains: {name: file}`.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens a domain.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens of context at most.")] = 512,
    dense: Annotated[
        list[str] | None, typer.Option(help="A dense model to compare with; may be repeated.")
    ] = None,
    require: Annotated[
        str | None, typer.Option(help="Exit with 1 unless it holds: mean<=oracle, every<=member*1.01")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Directory for a page, Markdown and JSON.")] = None,
    card: Annotated[
        bool | None, typer.Option("--card/--no-card", help="Put the verdict into the model card.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where results are kept. [~/.cache/octad]")] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks by name or file, with commas: octad-code,humaneval,my.yaml.")
    ] = None,
    members: Annotated[
        bool, typer.Option("--members", help="Tasks for each member and the soup too.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=2, help="The first N examples of each task.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each programming problem.")] = None,
    weak_sandbox: Annotated[
        bool, typer.Option("--weak-sandbox", help="Run programs also where the kernel cannot confine them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge a mixture beside its members, their soup, ensemble and oracle: bits per byte of held-out text, and tasks."""
    from octad.cli import judge as commands_evaluate
    from octad.cli import tasks as commands_tasks
    from octad.evaluate.compare import Settings

    options = {"members": members, "limit": limit, "samples": samples, "weak_sandbox": weak_sandbox}
    run_tasks = partial(commands_tasks.run, model, tasks, **options) if tasks is not None else None
    if data is not None:
        settings = Settings(tokens=tokens, window=window, seed=seed)
        outputs = commands_evaluate.Outputs(report, cache, card, as_json)
        commands_evaluate.evaluate(model, data, settings, outputs, dense or [], require, run_tasks)
    elif run_tasks is not None:
        commands_tasks.tell(run_tasks(), as_json=as_json)
    else:
        raise RequestError("nothing to judge on; give --data domains.yaml, --tasks octad-code, or both")


@app.command()
def quantize(
    model: Model,
    output: Output = None,
    to: Annotated[str, typer.Option(help="int8 or int4.")] = "int8",
    data: Annotated[
        Path | None, typer.Option(help="YAML with `domains: {name: file}`: tell what it costs.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens a domain.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens of context at most.")] = 512,
    overwrite: Overwrite = False,
    shard_size: Annotated[float, typer.Option(help="Largest weight file, in GB.")] = 5.0,
) -> None:
    """Write a checkpoint with its weights rounded to 8 or 4 bits: smaller, quick to load, fast to run."""
    from octad.cli import commands

    shard_bytes = shard_size * 1e9
    commands.quantize(
        model, output, to, data, tokens, window, overwrite=overwrite, max_shard_bytes=shard_bytes
    )


@app.command()
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
) -> None:
    """Continue a text: in colour, each word in that of its main expert, at a terminal; the bare answer in a pipe."""
    from octad.cli import commands
    from octad.engine.params import SamplingParams

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
        structured=commands.structured(schema, regex, grammar),
    )
    view = {"chat": chat, "as_json": as_json, "routes": routes}
    commands.generate(model, prompt, params, quantize=quantize, only=only, **view)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told to be.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    quantize: Quantize = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    only: Only = None,
) -> None:
    """Talk with a model. In a pipe: each line is a turn, only the answers are printed."""
    from octad.cli import commands
    from octad.engine.params import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, min_p=min_p, seed=seed
    )
    commands.chat(model, params, system=system, load=load, quantize=quantize, only=only)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A checkpoint, .gguf file, hub id or bundled base.")],
    peer: Annotated[
        list[str] | None, typer.Option(help="Measure beside it: transformers, llama.cpp; may be repeated.")
    ] = None,
    llama_bench: Annotated[
        str | None, typer.Option(help="llama.cpp's llama-bench, where it is not on the PATH.")
    ] = None,
    gguf: Annotated[
        list[Path] | None, typer.Option(help="A file for llama.cpp to run; may be repeated.")
    ] = None,
    quantize: Annotated[
        list[str] | None, typer.Option(help="none, int8 or int4; may be repeated. [default: none]")
    ] = None,
    prompt_lengths: Annotated[str, typer.Option(help="Tokens to read.")] = "128,512",
    contexts: Annotated[str, typer.Option(help="Tokens to write behind.")] = "128,1024",
    batch_sizes: Annotated[str, typer.Option(help="Users at once; 1 is always measured.")] = "1,4,16",
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each user writes.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Repeats of every measurement.")] = 5,
    text: Annotated[Path | None, typer.Option(help="Text to read, in place of octad's own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure speed and memory, as a share of the machine's limits and beside other programs."""
    from octad.cli import commands

    options = {"llama_bench": llama_bench, "decode_tokens": decode_tokens, "repeat": repeat, "device": device}
    lists = {"peers": peer or [], "gguf": gguf or [], "quantize": quantize or ["none"]}
    lengths = {"prompt_lengths": prompt_lengths, "contexts": contexts, "batch_sizes": batch_sizes}
    commands.bench(model, lengths, as_json=as_json, text=text, **options, **lists)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="What to train (YAML): task tune or pretrain.")],
    output: Output = None,
) -> None:
    """Tune a mixture (router, repair or all), or pre-train a model. The same command resumes."""
    from octad.cli import commands

    commands.train(config, output)


@app.command()
def branch(
    config: Annotated[Path, typer.Argument(help="A base and the specialists to make of it (YAML).")],
    output: Output = None,
    only: Annotated[str | None, typer.Option(help="Train this specialist alone.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="All at once, over a Ray cluster.")] = False,
) -> None:
    """Train specialists of one base, one after another or over a cluster. The same command resumes."""
    from octad.cli import commands

    commands.branch(config, output, only, ray=ray)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to put the mixture.")] = Path(
        "demo-output"
    ),
) -> None:
    """Combine eight real models that come with octad, judge the mixture, let it write."""
    from octad.demo.demo import run

    run(output)


@app.command()
def version() -> None:
    """Print the versions that a bug report needs."""
    from importlib.metadata import version as installed

    print(json.dumps({name: installed(name) for name in ("octad", "torch", "safetensors", "tokenizers")}))


def main() -> None:
    """Entry point: runs the command and turns errors into exit codes."""
    started = time.monotonic()
    try:
        code = app(standalone_mode=False)  # None, or what typer makes of an Exit: 130 for an interruption
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code)
    except OctadError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of torchrun's processes one a machine speaks
            print(f"octad: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print(
            f"octad: interrupted after {time.monotonic() - started:.0f} s; nothing was written",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            if message := " ".join(error.format_message().split()):  # empty where help was printed instead
                print(f"octad: {message}", file=sys.stderr)
            sys.exit(2)
        raise
