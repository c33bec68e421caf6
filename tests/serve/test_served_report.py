"""The report of an evaluation beside the chat: found, linked in the make-up, shown in a sandbox; and not with keys."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from octad.errors import DataError
from octad.serve.app import Application
from octad.serve.listing import ModelNames
from octad.serve.running import Door
from octad.serve.security import Access
from octad.serve.served_report import find_report


def test_the_report(tmp_path: Path) -> None:
    mixture, report = tmp_path / "mixture", tmp_path / "mixture-report"
    mixture.mkdir()
    assert find_report(str(mixture), None) is None
    with pytest.raises(DataError, match="has no index"):
        find_report(str(mixture), report)
    report.mkdir()
    (report / "index.html").write_text("<p>judged ü</p>", encoding="utf-8")
    app = Application(ModelNames.now(["m"]))
    made = Door(app.access, None, find_report(str(mixture), None)).report_shown(app, {"base": "b"})
    assert made == {"base": "b", "verdict": {"headline": "The mixture was judged.", "report": "report"}}
    answer = TestClient(app.asgi, base_url="http://localhost").get("/report")
    assert answer.text == "<p>judged ü</p>"
    policy = answer.headers["content-security-policy"]
    assert "sandbox allow-scripts" in policy
    assert "allow-same-origin" not in policy
    assert "default-src 'none'" in policy
    keyed = Application(ModelNames.now(["m"]), Access(keys=(b"x",)))
    door = Door(keyed.access, None, find_report("elsewhere", report))
    assert door.report_shown(keyed, {"verdict": {"headline": "Good."}}) == {"verdict": {"headline": "Good."}}
    assert TestClient(keyed.asgi, base_url="http://localhost").get("/report").status_code == 401
