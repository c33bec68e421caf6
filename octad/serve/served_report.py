"""The report of `octad evaluate`, handed out beside the page: /report, one file, read at start.

    report = find_report("mixture", given=None)             # mixture-report/index.html, where it is there
    front.get("/report", report.answer)

The page of a report carries its own script and styles, so it is shown in a sandbox: an origin of its own, which can
neither ask this server anything nor see what the chat keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from octad.errors import DataError
from octad.serve.page import HEADERS

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; font-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts"
)
MOST_BYTES = 64 << 20
PATH = "/report"


@dataclass(frozen=True)
class ServedReport:
    """The page of a report."""

    body: bytes

    async def answer(self, request: Request) -> Response:
        """For GET."""
        headers = HEADERS | {"Content-Security-Policy": POLICY}
        return Response(self.body, headers=headers, media_type="text/html; charset=utf-8")


def find_report(model: str, given: Path | None) -> ServedReport | None:
    """The report in directory `given`, else the one beside the model (mixture-report), else None. Raises DataError where
    the given one is not there or is none."""
    place = Path(model)
    beside = place.with_name(f"{place.name}-report") if place.is_dir() and place.name else None
    directory = given or beside
    if directory is None:
        return None
    path = directory / "index.html"
    if given is None and not path.is_file():
        return None
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path}: is larger than {MOST_BYTES >> 20} MiB, which no report is")
        return ServedReport(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"--report {directory}: has no index.html that can be read ({error.strerror}); give the directory"
            " that octad evaluate --report wrote"
        ) from None
