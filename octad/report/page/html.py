"""The report as one HTML page that needs nothing else: style, script and drawings are inside.

    html = page(report)

All text is escaped by jinja2, and by markupsafe in the drawings: a domain may be called <script>.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from octad.report.page import parts as sections
from octad.report.page import quality, routes, svg, tables

ASSETS = "octad.report.page"
EMPTY = {"octad": None, "model": None, "command": None, "settings": None}
NO_VERDICT = {"headline": None, "sentences": (), "advice": ()}


def page(report: Mapping[str, Any]) -> str:
    """The whole document."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        report=EMPTY | dict(report),
        verdict=NO_VERDICT | dict(report.get("verdict") or {}),
        routing=report.get("routing"),
        sections=sections,
        quality=quality,
        svg=svg,
        percent=tables.percent,
        routes=routes,
        colours=routes.COLOURS,
        style=Markup(asset("style.css")),
        script=Markup(asset("page.js")),
    )
    return html.lstrip()  # a doctype comes first


def asset(name: str) -> str:
    """A file of the page."""
    return resources.files(ASSETS).joinpath(name).read_text(encoding="utf-8")
