"""llama.cpp's own programs, which say whether an exported file is right. `make llama` builds them into the environment;
LLAMA_CPP names another source tree that has them in build/bin."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TREE = Path(os.environ.get("LLAMA_CPP", Path(sys.prefix) / "llama.cpp"))
needs_llama_cpp = pytest.mark.skipif(
    not (TREE / "build/bin/llama-perplexity").is_file(),
    reason=f"{TREE}: no llama.cpp with build/bin in it; `make llama` makes one, LLAMA_CPP names another",
)
EXACT = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]  # keys and values as they are, not in float16


def run(program: str, *arguments: Any) -> str:
    """What a program says, stdout and then stderr; a failure is an AssertionError that quotes it."""
    return "".join(_said(program, *arguments))


def _said(program: str, *arguments: Any) -> tuple[str, str]:
    command = [str(TREE / "build/bin" / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}"
    return done.stdout, done.stderr


def perplexity(model: Path, text: Path, window: int) -> float:
    """Of each whole window of the text, the tokens behind the first half. Tried again where the program's log, which a
    thread of its own writes, was cut off by the program's end."""
    said = ""
    for _ in range(5):
        said = run(
            *("llama-perplexity", "-m", model, "-f", text, "-c", window, "-b", window, *EXACT),
            *("-t", 1, "-ngl", 0),
        )
        if found := re.search(r"Final estimate: PPL = ([0-9.]+|nan|inf)", said):
            return float(found[1])
    raise AssertionError(said[-2000:])


def token_ids(model: Path, text: Path) -> list[int]:
    """llama.cpp's ids of a text file, with what the file says to put around a text."""
    said = run("llama-tokenize", "-m", model, "-f", text, "--ids", "--no-escape", "--log-disable")
    return [int(i) for i in said[said.index("[") + 1 : said.index("]")].split(",") if i.strip()]


def continuation(model: Path, prompt: str, tokens: int) -> str:
    """What is written greedily behind a prompt."""
    said, _ = _said(
        *(
            "llama-completion",
            "-m",
            model,
            "-p",
            prompt,
            "-n",
            tokens,
            "--temp",
            0,
            *EXACT,
            "-t",
            1,
            "-ngl",
            0,
        ),
        *("-no-cnv", "--no-display-prompt", "--no-warmup", "--no-escape", "--simple-io"),
        *("--repeat-penalty", 1, "--ignore-eos"),
    )
    return said.removesuffix("\n\n")  # the program's own


@torch.inference_mode()
def perplexity_of(model: torch.nn.Module, ids: list[int], window: int) -> float:
    """The same count by a model in Python, octad's or transformers'."""
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    found = [model(one[None]) for one in windows]
    logits = torch.cat([one if isinstance(one, torch.Tensor) else one.logits for one in found])
    nats = -logits[:, :-1].float().log_softmax(-1).gather(2, windows[:, 1:, None])[..., 0]
    return float(nats[:, window // 2 :].mean().exp())
