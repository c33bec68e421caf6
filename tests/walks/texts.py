"""Folders of text for the walks: texts.py DIRECTORY makes law/ and sea/ (.txt files) and sky.csv (a column `body`)."""

import csv
import random
import sys
from pathlib import Path

WORDS = {
    "law": "whereas party shall court clause hereby tenant contract statute appeal",
    "sea": "wave salt gull tide harbour anchor mast storm current reef",
    "sky": "cloud star moon orbit comet dawn meteor planet eclipse light",
}


def documents(name: str, count: int = 40, length: int = 120) -> list[str]:
    """Sentences out of ten words."""
    draw = random.Random(name)
    words = WORDS[name].split()
    return [" ".join(draw.choices(words, k=length)).capitalize() + "." for _ in range(count)]


def main(directory: Path) -> None:
    for name in ("law", "sea"):
        (directory / name).mkdir(parents=True)
        for number, text in enumerate(documents(name)):
            (directory / name / f"{number:02}.txt").write_text(text + "\n", encoding="utf-8")
    with (directory / "sky.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["body"], *([text] for text in documents("sky"))])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
