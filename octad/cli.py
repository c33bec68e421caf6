"""The command line: one verb a function, each a few lines over one room, imported late so that --help is quick.

A user's mistake is one line on stderr and exit code 2; an interruption exits with 130; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from octad.errors import OctadError

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
    from octad import commands

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
    from octad import commands

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
    from octad import commands

    commands.edit("replace", mixture, name, model, data or [], output, base)


@expert_app.command("remove")
def expert_remove(
    mixture: Mixture,
    name: Annotated[str, typer.Option(help="The expert to remove.")],
    output: Output = None,
    base: Base = None,
) -> None:
    """Remove an expert (in place, or to --output)."""
    from octad import commands

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
    from octad import commands

    commands.inspect(model, against, as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A mixture (or any model).")],
    data: Annotated[Path, typer.Option(help="YAML with `domains: {name: file}`.")],
    tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens a domain.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens of context at most.")] = 512,
    as_json: Json = False,
) -> None:
    """Judge a mixture beside its members, their soup and the oracle: bits per byte of held-out text."""
    from octad import commands

    commands.evaluate(model, data, tokens, window, as_json=as_json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint, .gguf file, hub id or bundled base.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: int = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the chat template.")] = False,
) -> None:
    """Continue a text; each word in the colour of its main expert."""
    from octad import commands

    commands.generate(
        model, prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, chat=chat
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to put the mixture.")] = Path(
        "demo-output"
    ),
) -> None:
    """Combine eight real models that come with octad, judge the mixture, let it write."""
    from octad.demo.run import run

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


if __name__ == "__main__":
    main()
