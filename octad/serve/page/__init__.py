"""The chat page, as a server hands it out: files of `static/`, in memory, and the headers that go with them.

    page = assets()                                  # {"index.html": Asset(body, media_type, etag), "app.js": ...}
    page["index.html"] at /, every other one at /page/NAME, each with HEADERS

`static/` is what `npm run build` in page-src makes; its manifest.json names every file with its type, size and SHA-256.
Only what it names is served, so no request's path ever reaches the file system, and a file that is not the one that was
built is refused. The page loads nothing from elsewhere: CSP allows this server alone, and nothing inline.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files

from octad.errors import OctadError

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, and answered 304 by the ETag
}


@dataclass(frozen=True)
class Asset:
    """One file: its bytes, its Content-Type, and its ETag (with the quotes)."""

    body: bytes
    media_type: str
    etag: str


def assets() -> dict[str, Asset]:
    """Every file of the page by its name below /page/ ("fonts/..." among them).

    Raises OctadError where the installation lacks one or has another than was built."""
    static = files(__name__) / "static"
    try:
        manifest = json.loads((static / "manifest.json").read_text(encoding="utf-8"))["files"]
        return {name: _checked(name, (static / name).read_bytes(), entry) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError) as error:
        raise OctadError(f"{static}: the chat page is damaged ({error}); install octad again") from None


def _checked(name: str, body: bytes, entry: dict[str, str]) -> Asset:
    digest = hashlib.sha256(body).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(f"{name} is not the file that was built")
    return Asset(body, entry["type"], f'"{digest[:32]}"')
