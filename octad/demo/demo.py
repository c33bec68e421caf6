"""octad demo: the whole road on real weights, in a few minutes on two cores.

SmolLM2-135M-Instruct and its seven specialists become one mixture of 692 M parameters; it is judged on held-out text
beside everything it is made of, and writes a little prose and a little code.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octad.checkpoint.provenance import PROVENANCE
from octad.cli import answering
from octad.cli import evaluation as commands_evaluate
from octad.errors import OutputError
from octad.figures import human, listed
from octad.report import terminal

if TYPE_CHECKING:
    from octad.combine.preflight import Plan

HERE = Path(__file__).parent
TOKENS, WINDOW = 320, 64  # held-out tokens a domain, of five documents: enough to see, few enough to wait for
SAMPLES = (
    ("Prose", "It was a dark and stormy evening when Elizabeth", 0.7),
    ("Code", 'def is_prime(n):\n    """Return True if n is a prime number."""\n', 0.0),
)


def run(output: Path) -> None:
    """Combine, judge, write; prints as it goes. Raises OctadError."""
    from octad.combine.preflight import preflight
    from octad.combine.recipe import Recipe
    from octad.dist import keep_freed_memory

    if output.is_dir() and any(output.iterdir()) and not (output / PROVENANCE).is_file():
        raise OutputError(f"{output}: holds something that octad did not make; choose another --output")
    keep_freed_memory()
    started, report = time.monotonic(), output.with_name(f"{output.name}-report")
    plan = preflight(Recipe.load(HERE / "recipe.yaml"), output, overwrite=True)
    introduce(plan, output)
    make(plan, output)
    heading("2. Is it better than its parts?")
    tell(
        "All now read text that none has seen, some from sources that the router does not know either."
        f" Fewer bits a byte are better. {TOKENS} tokens of each kind: a quick look."
    )
    outputs = commands_evaluate.Outputs(report, brief=True)
    options: dict[str, Any] = {"tokens": TOKENS, "window": WINDOW, "other_k": False}
    commands_evaluate.evaluate(str(output), HERE / "domains.yaml", outputs, **options)
    write(output)
    heading(f"Done in {time.monotonic() - started:.0f} s. Three things to try")
    terminal.remark(
        f"  octad serve {output}\n"
        "      a chat page at http://127.0.0.1:8000, which shows who answers\n"
        f"  octad evaluate {output} --data {HERE / 'domains.yaml'}\n"
        "      judge it on 4,096 tokens of each kind of text\n"
        f"  octad combine {HERE / 'recipe.yaml'} -o mine\n"
        "      this demo's recipe: copy it, and put your own eight models in"
    )


def introduce(plan: Plan, output: Path) -> None:
    """What will happen, and how long it takes."""
    from octad.model import cost

    total, active = cost.parameters(plan.config), cost.parameters(plan.config, active=True)
    minutes = max(1, math.ceil(expected_seconds(plan) / 60))
    names = [member.name for member in plan.reports]
    heading("octad demo: eight models become one")
    tell(
        f"{names[0]} is a small chat model; {listed(names[1:])} were tuned from it. Together: one mixture of"
        f" {human(total)} parameters; {plan.config.num_experts_per_tok} of {plan.config.num_experts} experts,"
        f" {human(active)}, work on a token."
        f" About {minutes} min on this machine, and {human(plan.output_bytes, 'B')} in {output}."
    )


def expected_seconds(plan: Plan) -> float:
    """A rough forecast for combining, and for judging every part and the mixture."""
    from octad.combine.build import expected_seconds as combining
    from octad.evaluate.estimate import judging_seconds

    return combining(plan) + judging_seconds(plan.config, TOKENS * len(plan.members), other_k=False)


def make(plan: Plan, output: Path) -> None:
    """Combine, with progress."""
    from octad.combine.build import combine

    heading("1. One mixture out of eight models")
    tell(
        "Each model's feed-forward networks become an expert; the rest is kept once. A router learns from text of each"
        " kind whom to ask; no weight of the models changes."
    )
    started = time.monotonic()
    with terminal.progress_bar() as progress:
        path = combine(plan, output, overwrite=True, progress=progress)
    terminal.remark(f"wrote {path} in {time.monotonic() - started:.0f} s")


def write(output: Path, quantize: str | None = None) -> None:
    """A little prose and a little code."""
    from octad.chat import speakers
    from octad.engine.params import SamplingParams

    heading("3. What does it write?")
    tell("Each word has the colour of the part that had most to say on it.")
    llm = answering.load_llm(answering.open_model(str(output), quantize))
    terminal.out.print(speakers.legend(llm.expert_names))
    for title, prompt, temperature in SAMPLES:
        terminal.out.print(f"\n[bold]{title}[/]")
        speakers.write_prompt(terminal.out, prompt)
        params = SamplingParams(
            max_tokens=40, temperature=temperature, top_p=0.9, seed=1, routed_experts=True
        )
        speakers.speak(llm, speakers.encode(llm, prompt), params, terminal.out, prompt)


def heading(text: str) -> None:
    """A line across the screen, apart from what came before; none under -q."""
    if not terminal.err.quiet:
        terminal.out.print()
        terminal.out.rule(text, align="left")


def tell(text: str) -> None:
    """A paragraph, cut at words where the terminal ends; none under -q."""
    if not terminal.err.quiet:
        terminal.out.print(text, markup=False)
