"""What README, docs and CONTRIBUTING say can be done: commands with options that exist, targets of the Makefile, links
that lead somewhere, and a README that is read in one go."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from octad.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# `octad ...` of a code block or between backticks, or $OCTAD of a script, up to a comment, a pipe or a redirection
COMMAND = {
    ".md": re.compile(r"(?:^ {4,}(?:\$ )?|`)octad ([a-z][^`#|>\n]*)", re.MULTILINE),
    ".sh": re.compile(r"^ *(?:if )?\$OCTAD ([a-z-][^`#|>\n;]*)", re.MULTILINE),
}
FOREIGN = {"serve": {"--engine"}}  # with these, options of another program may follow


def commands(text: str, kind: str = ".md") -> Iterator[list[str]]:
    """The words of each, without "octad"."""
    for match in COMMAND[kind].finditer(text.replace("\\\n", " ")):
        line = match[1].replace("[", " ").replace("]", " ").strip().rstrip(".,:;")
        try:
            yield shlex.split(line)
        except ValueError:  # a quotation mark of the sentence
            yield line.split()


def known_options(words: list[str]) -> tuple[str, set[str]]:
    """The verb that these words name, and all its options. Fails for a verb that there is not."""
    group: Any = typer.main.get_command(app)
    options = {"-q", "--quiet", "-v", "--verbose", "--version", "-h", "--help", "--install-completion"}
    rest, name = [w for w in words if w not in options], ""
    while rest and hasattr(group, "commands"):
        name, *rest = rest
        assert name in group.commands, f"octad has no verb {name!r}"
        group = group.commands[name]
    return name, options | {
        opt for p in group.params for opt in (*p.opts, *p.secondary_opts) if opt.startswith("-")
    }


def wrong(words: list[str]) -> list[str]:
    """Options that the verb does not have."""
    verb, known = known_options(words)
    if FOREIGN.get(verb, set()) & set(words):
        words = words[: max(words.index(option) for option in FOREIGN[verb] if option in words) + 1]
    return [w for w in words if re.match(r"--?[a-z]", w) and w.split("=")[0] not in known]


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "tests" / "walks").glob("*.sh"))], ids=lambda p: p.name
)
def test_commands_exist(page: Path) -> None:
    found = [(words, wrong(words)) for words in commands(page.read_text("utf-8"), page.suffix)]
    assert [entry for entry in found if entry[1]] == []


def test_the_search_finds_commands_and_their_mistakes() -> None:
    text = "    octad combine r.yaml -o out --dry  # yes\n`octad expert add | replace`\n"
    found = [*commands(text), *commands("  $OCTAD -q make mine --json > x\n", ".sh")]
    assert found == [
        ["combine", "r.yaml", "-o", "out", "--dry"],
        ["expert", "add"],
        ["-q", "make", "mine", "--json"],
    ]
    assert [wrong(words) for words in found] == [["--dry"], [], []]
    assert wrong(["serve", "m", "--engine", "vllm", "--tensor-parallel-size", "2"]) == []
    with pytest.raises(AssertionError, match="no verb 'combin'"):
        wrong(["combin", "r.yaml"])


def test_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    workflow = ROOT / ".github" / "workflows" / "test.yml"
    for page in (*PAGES, workflow):
        for target in re.findall(
            r"(?:^ {4,}|`|run: )make ([a-z][a-z-]+)", page.read_text("utf-8"), re.MULTILINE
        ):
            assert target in targets, f"{page.name}: make {target}"


def heading_ids(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", line).lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    ):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in heading_ids(target), f"{page.name}: {link}"


def test_the_readme_is_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    linked = set(re.findall(r"\(([a-z]+\.md)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked
