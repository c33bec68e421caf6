"""The command line: one verb a function, in a file per group of verbs; what they need is imported late, so that --help
is quick.

    octad combine recipe.yaml -o mixture/

A user's mistake is one line on stderr and exit code 2; an interruption exits with 130; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from octad.cli import (
    answering,
    combining,
    exporting,
    inspecting,
    judging,
    plan,
    serve,
    showing,
    starting,
    training,
)
from octad.cli.endings import check_arguments, complain, ended_by_signals, never_refuse, of_the_system
from octad.cli.options import Verb, Verbs
from octad.errors import OctadError
from octad.kernels.compile import IsaError
from octad.report import terminal

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bars and no remarks: results and errors.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Remarks of libraries, and errors with their traces.")
]

# what an interruption leaves behind, where that is something
KEPT = {
    "make": "stages that are done are kept, and the same command goes on",
    "train": "saved states are kept, and the same command goes on",
    "branch": "saved states are kept, and the same command goes on",
    "evaluate": "results that were complete are kept, and the same command goes on",
    "init": "the text that was split so far is left; begin again with --overwrite",
    "serve": "it was not listening yet",
    "demo": "what was complete is kept, and with --base the same command goes on",
}

app = typer.Typer(
    cls=Verbs,
    help="One mixture-of-experts language model out of eight smaller ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
verb = app.command(cls=Verb)
verb(starting.init)
verb(starting.make)
verb(combining.combine)
app.add_typer(combining.expert_app, name="expert")
verb(inspecting.inspect)
verb(judging.evaluate)
verb(combining.quantize)
verb(exporting.export)
verb(answering.generate)
verb(answering.chat)
app.command(cls=serve.EngineCommand)(serve.serve)
verb(inspecting.bench)
verb(training.train)
verb(training.branch)
verb(plan.plan)
verb(showing.demo)
verb(starting.schema)
verb(inspecting.version)


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print octad's version and exit.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """One mixture-of-experts language model out of eight smaller ones."""
    terminal.err.quiet = quiet
    if terminal.leads() and not quiet:
        ctx.with_resource(
            terminal.life.watched(f"{ctx.invoked_subcommand} is at work")
        )  # to the end of the command
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", force=True)
        logging.getLogger("octad").setLevel(logging.DEBUG)
    if show_version:
        from importlib.metadata import version

        print(f"octad {version('octad')}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:  # flags alone
        print(ctx.get_help(), end="")
        raise typer.Exit(2)


def main() -> None:
    """Entry point: runs the command and turns errors into exit codes."""
    warnings.simplefilter("once", FutureWarning)
    warnings.showwarning = _show_warning
    terminal.err.quiet = False
    never_refuse(sys.stdout)
    sys.argv[1:] = _flags_first(sys.argv[1:])
    with ended_by_signals(_kept):
        _main()


def _main() -> None:
    started = time.monotonic()
    try:
        check_arguments(sys.argv[1:])
        code = app(standalone_mode=False)  # None, or what typer makes of an Exit: 130 for an interruption
        if code == 130:
            raise KeyboardInterrupt
        _flush()
        sys.exit(code)
    except (OctadError, IsaError) as error:
        if logging.getLogger("octad").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of torchrun's processes one a machine speaks
            complain(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        complain(f"interrupted after {time.monotonic() - started:.0f} s; {_kept()}")
        sys.exit(130)
    except Exception as error:
        if (
            isinstance(error, OSError)
            and error.filename is None
            and error.errno in (errno.ENOSPC, errno.EPIPE)
        ):
            _no_output(error)
        if told := of_the_system(error):
            complain(told)
            sys.exit(2)
        if hasattr(error, "format_message"):  # click's own usage errors
            if message := " ".join(error.format_message().split()):  # empty where help was printed instead
                complain(message)
            sys.exit(2)
        raise


def _kept() -> str:
    """What is left of the command that was ended."""
    return KEPT.get(next((a for a in sys.argv[1:] if not a.startswith("-")), ""), "nothing was written")


def _flush() -> None:
    """Write out what stdout still holds. Where its reader has gone, or there is no room, this is where it shows."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _no_output(error: OSError) -> NoReturn:
    """Ends where nothing can be printed: without a word where the reader has gone (head, a pager that was left)."""
    with contextlib.suppress(OSError, ValueError):  # or else Python tries again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        sys.exit(1)
    complain(f"standard output cannot be written ({error.strerror})")
    sys.exit(2)


def _flags_first(arguments: Sequence[str]) -> list[str]:
    """-q and -v are the whole command's, and may stand behind the verb, too."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [a for a in arguments[:end] if a in ("-q", "--quiet", "-v", "--verbose")]
    return [*flags, *(a for a in arguments[:end] if a not in flags), *arguments[end:]]


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any
) -> None:
    """octad's own remarks are a line like others; a library's look as Python shows them."""
    if category.__module__.startswith("octad."):
        terminal.tell(f"octad: {message}")
    elif not terminal.err.quiet:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
