"""The report as one HTML page that needs nothing else, its style, script and drawings inside; and one table alone.

    html = page(report)
    html = table(t)                     # <table>...</table>, as notebooks show it

All text is escaped by jinja2, and by markupsafe in the drawings: a domain may be called <script>.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from octad.figures import percent
from octad.report import svg
from octad.report.page import parts as sections
from octad.report.page import quality, routes
from octad.report.table import Table

ASSETS = "octad.report.page"
EMPTY = {"octad": None, "model": None, "command": None, "settings": None}
NO_VERDICT = {"headline": None, "sentences": (), "details": (), "advice": ()}


def page(report: Mapping[str, Any]) -> str:
    """The whole document."""
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=EMPTY | dict(report),
            verdict=NO_VERDICT | dict(report.get("verdict") or {}),
            routing=report.get("routing"),
            sections=sections,
            quality=quality,
            svg=svg,
            percent=percent,
            routes=routes,
            colours=routes.COLOURS,
            style=Markup(asset("style.css")),
            script=Markup(asset("page.js")),
        )
    )
    return html.lstrip()  # a doctype comes first


def table(t: Table) -> str:
    """One table, without style."""
    module: Any = _environment().get_template("table.html.j2").module
    return str(module.table(t))


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> str:
    """A file of the page."""
    return resources.files(ASSETS).joinpath(name).read_text(encoding="utf-8")
