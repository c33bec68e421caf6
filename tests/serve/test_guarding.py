"""What clients never send, on raw sockets, and who may ask: Host, Origin, keys, bodies, slow senders."""

# ruff: noqa: F401, F811 (fixtures are imported)

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import CONTEXT, LIMITS, Running, Start, running, served_mixture, start

from octad.errors import DataError, RequestError
from octad.serve.page import CSP
from octad.serve.security import Access

BODY = {"model": "mixture", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
RAW = json.dumps(BODY).encode()


def post(
    running: Running,
    *headers: str,
    body: bytes = RAW,
    path: str = "/v1/chat/completions",
    version: str = "1.1",
) -> tuple[int, Any]:
    """Status and JSON of a request made by hand."""
    lines = [f"POST {path} HTTP/{version}", "Connection: close", f"Content-Length: {len(body)}", *headers]
    if not any(line.lower().startswith("host:") for line in lines) and version == "1.1":
        lines.append(f"Host: 127.0.0.1:{running.port}")
    answer = running.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(rest) if rest.startswith(b"{") else rest


def is_error(found: Any) -> bool:
    return set(found["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "should be a JSON object"),
        (b'"text"', "should be a JSON object"),
        (b"\xff\xfe\xfd", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"messages": [], "messages": []}', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', ""),
        (b'{"messages": [{"role": "user", "content": "x"}], "metadata": {"a": NaN}}', "not valid JSON"),
    ],
)
def test_bodies_that_are_none(running: Running, body: bytes, told: str) -> None:
    status, found = post(running, body=body)
    assert status == 400
    assert is_error(found)
    assert told in found["error"]["message"]
    assert len(found["error"]["message"]) < 700
    assert post(running)[0] == 200


def test_a_body_that_is_too_large(running: Running) -> None:
    status, found = post(running, body=b" " * (10 << 20))
    assert (status, found["error"]["code"]) == (413, "request_too_large")
    chunks = b"".join(b"10000\r\n" + b" " * 65536 + b"\r\n" for _ in range(20)) + b"0\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 413 " in running.raw(head + chunks).split(b"\r\n")[0]


def test_protocols_of_other_times(running: Running) -> None:
    assert post(running, version="1.0")[0] == 200
    for nonsense in (
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n",
    ):
        answer = running.raw(nonsense)
        assert b" 400 " in answer.split(b"\r\n")[0]
        assert is_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
    flood = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
        b"X-%d: %s\r\n" % (i, b"y" * 900) for i in range(200)
    )
    with suppress(ConnectionResetError):  # where it is closed while the flood still comes
        assert b" 431 " in running.raw(flood + b"\r\n").split(b"\r\n")[0]
    for smuggled in (
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: x\r\n",
    ):
        answer = running.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + smuggled + b"\r\nhello"
        )
        assert b" 400 " in answer.split(b"\r\n")[0] or b" 413 " in answer.split(b"\r\n")[0]


def test_slow_senders_are_let_go(running: Running) -> None:
    """Half a header, half a body, nothing at all, and half a second request on a connection that is kept alive."""
    begun = (
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
    )
    for data in begun:
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
            connection.sendall(data)
            answer = b""
            while part := connection.recv(65536):  # until the server closes; a hang is a timeout here
                answer += part
            assert not data.endswith(b"{") or b" 408 " in answer.split(b"\r\n")[0]
    assert running.get("/health").status_code == 200


def test_errors_of_every_path_have_one_form(running: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/page/..%2f..%2fpyproject.toml", 404),
        ("GET", "/page/%00", 404),
        ("GET", "/page/static/../../replies.py", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/decisions", 404),
    ):
        request = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        head, _, body = running.raw(request.encode()).partition(b"\r\n\r\n")
        assert head.split()[1] == str(status).encode(), (path, head)
        assert is_error(json.loads(body))


def test_names_of_this_machine_alone(running: Running, start: Start) -> None:
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        "[::1",
        "evil.example:80",
    ):
        status, found = post(running, f"Host: {host}")
        assert (status, found["error"]["code"]) == (403, "host_not_allowed")
    for host in ("localhost", f"LOCALHOST:{running.port}", "127.0.0.1", "[::1]:80"):
        assert post(running, f"Host: {host}")[0] == 200
    assert Access.of("0.0.0.0").hosts is None
    named = start(Access.of("0.0.0.0", ["chat.example"]))
    assert post(named, "Host: chat.example")[0] == 200
    assert post(named, "Host: other.example")[0] == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/x-www-form-urlencoded"])
def test_pages_of_other_origins(running: Running, kind: str) -> None:
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:1",
        f"https://localhost:{running.port + 1}",
    ):
        status, found = post(running, f"Origin: {origin}", f"Content-Type: {kind}")
        assert (status, found["error"]["code"]) == (403, "origin_not_allowed")
    own = f"127.0.0.1:{running.port}"
    assert post(running, f"Host: {own}", f"Origin: http://{own}", f"Content-Type: {kind}")[0] == 200
    response = running.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_origins_that_are_named(start: Start) -> None:
    running = start(Access.of("127.0.0.1", cors=["https://app.example"]))
    answer = running.post("/v1/chat/completions", BODY, headers={"Origin": "https://app.example"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-credentials" not in answer.headers
    wanted = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx2.options(running.url + "/v1/chat/completions", headers=wanted)
    assert preflight.status_code == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    other = httpx2.options(
        running.url + "/v1/chat/completions", headers=wanted | {"Origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in other.headers
    assert (
        running.post("/v1/chat/completions", BODY, headers={"Origin": "https://evil.example"}).status_code
        == 403
    )
    for wrong in ("*", "app.example", "https://a/b", "ftp://x"):
        with pytest.raises(RequestError, match="--cors"):
            Access.of("127.0.0.1", cors=[wrong])


def test_keys(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team's\nsecret-one\n\n  sécret-two \n", encoding="utf-8")
    running = start(Access.of("127.0.0.1", key_file=file, cors=["https://app.example"]))
    for given in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic secret-one"},
        {"X-API-Key": "x"},
    ):
        refused = running.post("/v1/chat/completions", BODY, headers=given)
        assert refused.status_code == 401
        assert is_error(refused.json())
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["www-authenticate"] == "Bearer"
    for given in (
        {"Authorization": "Bearer secret-one"},
        {"x-api-key": "secret-one"},
        {"Authorization": "bearer  secret-one"},
    ):
        assert running.post("/v1/chat/completions", BODY, headers=given).status_code == 200
    for path, status in (
        ("/health", 200),
        ("/", 200),
        ("/page/app.js", 200),
        ("/metrics", 401),
        ("/v1/models", 401),
        ("/docs", 401),
    ):
        assert running.get(path).status_code == status
    with pytest.raises(DataError, match="cannot be read"):
        Access.of("127.0.0.1", key_file=tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(DataError, match="holds no key"):
        Access.of("127.0.0.1", key_file=tmp_path / "empty")


def test_the_page(running: Running) -> None:
    page = running.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == CSP
    assert page.headers["x-content-type-options"] == "nosniff"
    assert running.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    script = running.get("/page/app.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert 'href="page/' in page.text or 'src="page/' in page.text
    assert running.get("/docs").status_code == 200
    schema = running.get("/openapi.json").json()
    assert "/v1/chat/completions" in schema["paths"]


def test_requests_have_ids(running: Running) -> None:
    assert running.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "x" * 200, "<script>"):
        made = running.get("/health", headers={"X-Request-Id": odd}).headers["x-request-id"]
        assert made.startswith("req_")
    assert running.get("/v1/nothing").headers["x-request-id"]


def test_a_websocket_is_refused_without_advice(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn would say twice in the log that a library should be installed, which would not help."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    answer = running.raw(
        b"GET /v1/ws HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"Sec-WebSocket-Key: YQ==\r\n\r\n"
    )
    assert b" 404 " in answer.split(b"\r\n")[0]
    assert "ebSocket" not in caplog.text
    assert "upgrade" not in caplog.text
