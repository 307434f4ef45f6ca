"""A web server on this machine for tests: files by path, and faults by request.

    with mirror() as server:
        server.put("400/val/part_0.tar.gz", data, Fault(after=1000, ends="reset"))
        ... server.base ... server.requests ...

The first request for a path meets its first fault, and so on; after them the file is served whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from prep.politeness import Timing

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


@dataclass(frozen=True)
class Fault:
    """What one request meets: an error page, or a body that ends `after` so many bytes.

    `ends`: "close" (cut off), "reset" (RST) or "stall" (nothing more comes).
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    ends: str = ""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Mirror:
    """What the server holds and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.claimed_bytes: dict[str, int] = {}
        self.ranges = True
        self.if_range = True
        self.most_range_bytes = 0  # 0: no limit
        self.etags = True
        self.lengths = True
        self.head = True
        self.extra_headers: dict[str, str] = {}
        self.requests: list[Request] = []
        self.base = ""
        self.stalled = threading.Event()  # set at the end, so that no thread is left waiting

    def put(self, path: str, data: bytes, *faults: Fault) -> str:
        """Serve a file below /kinetics, and return its plain address."""
        self.files[f"/kinetics/{path}"] = data
        self.faults[f"/kinetics/{path}"] = list(faults)
        return f"{self.base}/{path}"

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == f"/kinetics/{path}"]


@contextlib.contextmanager
def mirror(tls: ssl.SSLContext | None = None) -> Iterator[Mirror]:
    """Serve until the block ends, on a port that the system chooses."""
    held = Mirror()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"held": held}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    scheme = "http" if tls is None else "https"
    held.base = f"{scheme}://127.0.0.1:{server.server_address[1]}/kinetics"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield held
    finally:
        held.stalled.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that break off are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held: Mirror

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = self._book()
        if not self.held.head:
            self._page(405, {})
        elif path in self.held.files:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.held.files[path])))
            self.end_headers()
        else:
            self._page(404, {})

    def do_GET(self) -> None:
        path = self._book()
        faults = self.held.faults.get(path, [])
        fault = faults.pop(0) if faults else Fault()
        if fault.status:
            self._page(fault.status, fault.headers)
        elif path not in self.held.files:
            self._page(404, {})
        else:
            self._send(path, fault)

    def _book(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.held.requests.append(Request(self.command, path, dict(self.headers.items())))
        return path

    def _page(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(PAGE)

    def _send(self, path: str, fault: Fault) -> None:
        data = self.held.files[path]
        etag = f'"{hashlib.md5(data).hexdigest()}"'  # noqa: S324 - as S3 makes its ETags
        total = self.held.claimed_bytes.get(path, len(data))
        first, end = self._range(etag)
        is_part = bool(first or end)
        if first and not end and self.held.most_range_bytes:
            end = first + self.held.most_range_bytes
        data = data[: end or None]
        length = (len(data) if end else total) - first
        if first and first >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {first}-{first + length - 1}/{total}")
        if self.held.etags:
            self.send_header("ETag", etag)
        if self.held.lengths:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        for name, value in self.held.extra_headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = data[first:]
        self.wfile.write(body[: fault.after] if fault.ends else body)
        if fault.ends or len(body) != length:
            self._end(fault.ends)

    def _range(self, etag: str) -> tuple[int, int]:
        """The half-open interval of bytes that is asked for; an end of 0 is the file's."""
        wanted = self.headers.get("Range", "")
        same = not self.held.if_range or self.headers.get("If-Range", etag) == etag
        if not (self.held.ranges and same and wanted.startswith("bytes=")):
            return 0, 0
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        return int(first), int(last) + 1 if last else 0

    def _end(self, how: str) -> None:
        self.close_connection = True
        if how == "stall":
            self.held.stalled.wait(60)
        elif how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # without this, a FIN would come first


class FakeTime:
    """A clock that only sleeping moves, and chance that is always one half."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept = 0.0
        self.naps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.naps.append(seconds)

    def timing(self) -> Timing:
        return Timing(
            monotonic=lambda: self.now,
            wall=lambda: 1_700_000_000.0 + self.now,
            sleep=self.sleep,
            random=lambda: 0.5,
        )
