"""The four files of a project as text that people go on with: every value where it belongs, with the reason beside it.

recipe_text(project), domains_text(project.held_out), branch_text(project), tune_text(project)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from octad.guard import parse_yaml

_PLAIN = re.compile(r"[\w./~@+-]+")
RECIPE, DOMAINS, BRANCH, TUNE = "recipe.yaml", "domains.yaml", "branch.yaml", "tune.yaml"


@dataclass(frozen=True)
class Expert:
    """One expert: its name, the text it is made of, held-out text ("" for none), where its weights are or will be, and
    the column of its text."""

    name: str
    data: Sequence[str]
    held_out: str
    model: str
    field: str = "text"


@dataclass(frozen=True)
class Project:
    """Everything that the files say. `steps`, `window`, `windows` a step, `rank`: of training one specialist;
    `kept`: text of what none is to unlearn; `watched`: whether it is judged on held-out text meanwhile; `router`: further
    keys of the recipe's router."""

    base: str
    experts: Sequence[Expert]
    mode: str = "ffn-adapter"
    steps: int = 100
    window: int = 512
    windows: int = 8
    rank: int = 16
    kept: str = ""
    watched: bool = True
    router: str = "tokens: 16384"
    mixture: str = "mixture"

    @property
    def specialists(self) -> list[Expert]:
        """The experts that are to be trained: all but the base itself."""
        return [expert for expert in self.experts if expert.model != "base"]

    @property
    def held_out(self) -> dict[str, str]:
        """Held-out text by expert."""
        return {expert.name: expert.held_out for expert in self.experts if expert.held_out}


def counted(number: int, what: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {what}{'s' * (number != 1)}"


def scalar(value: str | Sequence[str]) -> str:
    """A text (or a list of texts; of one the text alone) as YAML that reads as the same again."""
    if not isinstance(value, str):
        return scalar(value[0]) if len(value) == 1 else f"[{', '.join(map(scalar, value))}]"
    if _PLAIN.fullmatch(value) and parse_yaml(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def entry(**values: str | Sequence[str]) -> str:
    """One line of a list: {name: law, data: text/law.jsonl}; what is empty is left out."""
    return f"  - {{{', '.join(f'{key}: {scalar(value)}' for key, value in values.items() if value)}}}"


def recipe_text(project: Project) -> str:
    """recipe.yaml."""
    experts = [
        entry(name=e.name, model=e.model, data=e.data, field=e.field if e.field != "text" else "")
        for e in project.experts
    ]
    top_k = min(2, len(experts))
    return "\n".join([
        "# What the mixture is made of:  octad combine recipe.yaml -o mixture",
        f"base: {scalar(project.base)}",
        f"top_k: {top_k}                 # experts that work on each token; 1 costs less, 2 is a little better",
        "experts:                 # model: base is the base itself, the generalist; data: text the router learns from",
        *experts,
        f"router: {{method: logistic, {project.router}}}   # or ridge, prompts, random; tokens: of each expert's text",
        "shared: base             # attention and the like; or mean, linear, ties, dare, regmean, auto (docs/choices.md)",
        "",
    ])  # fmt: skip


def domains_text(held_out: Mapping[str, str]) -> str:
    """domains.yaml."""
    return "\n".join([
        "# Held-out text, which nothing was trained or fitted on:  octad evaluate mixture --data domains.yaml",
        "domains:",
        *(f"  {scalar(name)}: {scalar(file)}" for name, file in held_out.items()),
        "",
    ])  # fmt: skip


def branch_text(project: Project) -> str:
    """branch.yaml."""
    experts = [
        entry(
            name=e.name,
            data=e.data,
            held_out=e.held_out if project.watched else "",
            field=e.field if e.field != "text" else "",
        )
        for e in project.specialists
    ]
    every = max(1, project.steps // 4)
    judged = [f"evaluate: {{every: {every}, window: {project.window}}}"] if project.watched else []
    return "\n".join([
        "# One specialist of the base for each kind of text:  octad branch branch.yaml -o specialists",
        f"base: {scalar(project.base)}",
        f"mode: {project.mode}        # feed-forward networks alone, as adapters: the mixture holds them exactly",
        f"steps: {project.steps}               # of each; more text wants more steps",
        f"batch: {{windows: {project.windows}, micro: {min(4, project.windows)}}}",
        f"data: {{window: {project.window}}}      # tokens that are seen at once",
        "optimizer: {lr: 1.0e-3}",
        *([f"keep: {{data: {scalar(project.kept)}}}   # what none is to unlearn"] if project.kept else []),
        f"low_rank: {{rank: {project.rank}, alpha: {2 * project.rank}}}",
        *judged,
        "experts:",
        *experts,
        "",
    ])  # fmt: skip


def tune_text(project: Project) -> str:
    """tune.yaml."""
    sources = [
        entry(name=e.name, data=e.data, field=e.field if e.field != "text" else "").replace("  -", "    -", 1)
        for e in project.experts
    ]
    every = max(1, project.steps // 4)
    return "\n".join([
        "# What was lost by putting the experts together, won back:  octad train tune.yaml -o tuned",
        "task: tune",
        f"model: {scalar(project.mixture)}",
        "mode: repair             # router: routers alone, cheaper; all: every weight",
        f"steps: {project.steps}",
        "batch: {windows: 8, micro: 4}",
        "optimizer: {lr: 1.0e-3, router_lr: 3.0e-4}",
        "low_rank: {rank: 16, alpha: 32}",
        "data:",
        f"  window: {project.window}",
        "  sources:               # one for each expert, of its name",
        *sources,
        f"evaluate: {{every: {every}, window: {project.window}, domains: domains.yaml}}",
        "",
    ])  # fmt: skip
