"""What `octad branch` leaves beside the specialists that it made: a recipe of them, and the domains to judge them on.

    write_beside(config, Path("specialists"))        # -> lines for the user

A file of that name that somebody else wrote, or changed, is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from octad.project.layout_text import DOMAINS, RECIPE, Expert, Project, domains_text, recipe_text
from octad.staging import replace_file
from octad.text.corpus import HUB
from octad.train.run_config import BranchConfig


def write_beside(config: BranchConfig, run: Path) -> Iterator[str]:
    """Write recipe.yaml, and domains.yaml where there is held-out text; what was done, in lines."""
    experts = [
        Expert(
            s.name,
            [seen_from(run, config.resolve(file)) for file in s.data],
            seen_from(run, config.resolve(s.held_out[0]))
            if len(s.held_out) == 1 and s.field == "text"
            else "",
            s.name,
            s.field,
        )
        for s in config.experts
    ]
    if len(experts) < 2:
        return
    base = config.resolve(config.base)
    project = Project(seen_from(run, base) if Path(base).exists() else base, experts)
    texts = {RECIPE: recipe_text(project)}
    if project.held_out:
        texts[DOMAINS] = domains_text(project.held_out)
    for name, text in texts.items():
        path = run / name
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            yield f"{path}: is there already, and was left alone"
        else:
            replace_file(path, text)
            yield f"wrote {path}"


def seen_from(directory: Path, reference: str) -> str:
    """A reference as a file in this directory would name it: relative where it lies near, else absolute."""
    if reference.startswith(HUB):
        return reference
    place, here = Path(reference).expanduser().resolve(), directory.resolve()
    if here.parent in (place, *place.parents) or here in place.parents:
        return Path(os.path.relpath(place, here)).as_posix()
    return str(place)
