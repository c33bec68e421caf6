"""Running a mixture: `octad bench` with its results kept in a file.

    python benchmarks/engine.py demo-output --peer transformers --quantize none --quantize int8 --quantize int4 \
        --llama-bench llama.cpp/build/bin/llama-bench --gguf mixture-bf16.gguf --gguf mixture-q8_0.gguf

All options but --out are those of `octad bench`, which does the measuring, shows its tables here and ends in the line of
JSON that is saved. The files for llama.cpp come out of the same mixture:

    python llama.cpp/convert_hf_to_gguf.py demo-output --outtype bf16 --outfile mixture-bf16.gguf
    llama-quantize mixture-bf16.gguf mixture-q8_0.gguf Q8_0        # and Q4_0
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import save

OUT = Path(__file__).resolve().parent / "results" / "engine.json"


def run(options: list[str]) -> str:
    """`octad bench`, its output passed on line by line; returns the last line. Ends with its status where it fails."""
    command = [sys.executable, "-m", "octad.cli", "bench", *options]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        sys.exit(process.returncode)
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    known, options = parser.parse_known_args()
    save(known.out, json.loads(run(options)))


if __name__ == "__main__":
    main()
