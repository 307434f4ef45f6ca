"""Whose credentials a request is signed with: those that a root was given, or the environment's."""

from __future__ import annotations

import http.server
import os
import threading
from typing import TYPE_CHECKING

import pytest

from prep.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Iterator

_BODY = b"0123456789"


class _Server(http.server.ThreadingHTTPServer):
    """Answers every GET with the same ten bytes, and notes what stood in it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.path}\n{self.headers}")
        part = "Range" in self.headers
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes 0-9/{len(_BODY)}")
        self.send_header("Content-Length", str(len(_BODY)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        self.wfile.write(_BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with _Server() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{one.server_port}")
        yield one
        one.shutdown()


def asked(server: _Server, options: dict[str, object]) -> list[str]:
    """Read a root as a whole and as the loader does; return both requests, in lower case."""
    server.asked.clear()
    root = Storage("s3://b/x", options)
    assert root.read("y") == _BODY
    assert root.begin_range("y", 0, 10)() == _BODY
    assert len(server.asked) == 2
    return [text.lower() for text in server.asked]


@pytest.mark.parametrize(
    "other",
    [
        {"AWS_ACCESS_KEY_ID": "THEIRS", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "TOKEN"},
        {"AWS_SKIP_SIGNATURE": "true"},
    ],
)
def test_given_keys_are_not_mixed_with_the_environments(server, monkeypatch, other):
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    requests = asked(server, {"access_key_id": "OURS", "secret_access_key": "s"})
    assert requests[1].startswith("/b/x/y?x-amz-")  # not by way of the store's client
    for request in requests:
        assert "ours/" in request or "ours%2f" in request
        assert "theirs" not in request
        assert "token" not in request


def test_what_is_given_beside_the_keys_counts(server):
    keys = {"access_key_id": "OURS", "secret_access_key": "s"}
    assert all("own-token" in one for one in asked(server, {**keys, "session_token": "OWN-TOKEN"}))
    assert not any("ours" in one for one in asked(server, {**keys, "skip_signature": True}))


def test_the_environments_keys_come_with_its_token(server, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "THEIRS")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "THEIR-TOKEN")
    assert all("theirs" in one and "their-token" in one for one in asked(server, {}))
