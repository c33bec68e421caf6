"""The page's files: the ones that were built, licensed, and nothing in them that a strict CSP would have to allow."""

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import octad.serve.page
from octad.errors import OctadError
from octad.serve.page import CSP, assets

STATIC = Path(octad.serve.page.__file__).parent / "static"
SOURCES = Path(__file__).parents[3] / "page-src"


def test_manifest_names_every_file_with_its_hash() -> None:
    manifest = json.loads((STATIC / "manifest.json").read_text())["files"]
    on_disk = {str(p.relative_to(STATIC)) for p in STATIC.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest) == on_disk
    for name, entry in manifest.items():
        body = (STATIC / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(body).hexdigest(), name
        assert entry["bytes"] == len(body), name


def test_assets_are_the_files(tmp_path: Path) -> None:
    page = assets()
    assert page["index.html"].body == (STATIC / "index.html").read_bytes()
    assert page["index.html"].media_type == "text/html; charset=utf-8"
    assert page["app.js"].media_type == "text/javascript; charset=utf-8"
    assert len({asset.etag for asset in page.values()}) == len(page)


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "page"
    shutil.copytree(STATIC, copy / "static")
    (copy / "static" / "app.js").write_text("other")
    monkeypatch.setattr(octad.serve.page, "files", lambda _: copy)
    with pytest.raises(OctadError, match=r"app\.js is not the file that was built"):
        assets()
    (copy / "static" / "app.js").unlink()
    with pytest.raises(OctadError, match="damaged"):
        assets()


class _Inline(HTMLParser):
    """What a page has inline, and where it points."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.inline += [name for name in names if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]


def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    page = _Inline()
    page.feed((STATIC / "index.html").read_text())
    assert page.inline == []
    assert page.addresses
    for address in page.addresses:
        assert address.startswith("#") or address.split("#")[0].removeprefix("page/") in assets(), address
    for name in ("style.css", "math.css"):
        urls = re.findall(r"url\(([^)]*)\)|@import", (STATIC / name).read_text())
        assert all(url in assets() for url in urls), name
    assert "unsafe" not in CSP


def test_licences_of_what_is_vendored() -> None:
    notices = (STATIC / "LICENCES.txt").read_text()
    versions = json.loads((SOURCES / "package.json").read_text())["dependencies"]
    for name, version in versions.items():
        assert f"{name} {version}" in notices
    assert notices.count("Copyright") >= len(versions)


@pytest.mark.slow
@pytest.mark.skipif(not (SOURCES / "node_modules").is_dir(), reason="`npm ci` was not run in page-src")
def test_the_bundle_is_what_its_sources_give(tmp_path: Path) -> None:
    subprocess.run(["npm", "run", "--silent", "check"], cwd=SOURCES, check=True, timeout=120)
    subprocess.run(["node", "build.mjs", str(tmp_path / "built")], cwd=SOURCES, check=True, timeout=120)
    built = json.loads((tmp_path / "built" / "manifest.json").read_text())
    assert built == json.loads((STATIC / "manifest.json").read_text())
