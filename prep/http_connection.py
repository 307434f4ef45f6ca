"""One HTTP/1.1 connection that never blocks, for GETs of ranges, one at a time."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prep.range_requests import RangeBody

Address = tuple[int, tuple[Any, ...]]
"""Family and address of a socket, as getaddrinfo has them."""
HEAD_BYTES = 4096
"""Longer heads of answers are unusual; stores send 300 to 1,000 bytes."""
_KEPT_SECONDS = 60.0
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_STATUS = re.compile(rb"http/1\.1 (\d{3})[ \r]")
_RANGE = re.compile(rb"\r\ncontent-range:[ \t]*bytes (\d{1,19})-(\d{1,19})/")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,19})[ \t]*\r\n")
_ETAG = re.compile(rb"\r\netag:[ \t]*([^\r]*)")
_ENCODED = (b"\r\ntransfer-encoding:", b"\r\ncontent-encoding:")
_CLOSES = re.compile(rb"\r\nconnection:[ \t]*close")


class UnusualAnswerError(Exception):
    """An answer that is not exactly the bytes that were asked for; `status` is its code, or 0."""

    def __init__(self, status: int = 0) -> None:
        super().__init__(status)
        self.status = status


class Connection:
    """A socket that is being connected, with the request that it is used for.

    `address` is where to. `context` encrypts it, for the server's name `host`; None leaves it
    plain. It stands in `sockets` until it is closed.
    """

    def __init__(
        self,
        address: Address,
        selector: selectors.BaseSelector,
        sockets: dict[int, socket.socket],
        context: ssl.SSLContext | None,
        host: str,
    ) -> None:
        self.address, self._selector, self._sockets = address, selector, sockets
        self._context, self._host = context, host
        self._is_connected = self.is_ready = False
        self.socket = _connecting(address)
        self.body: RangeBody | None = None
        self.has_answered = self.closes = False
        self.received = 0
        self.progress = time.monotonic()
        self._request = b""
        self._buffer = bytearray()
        self._body_at = 0
        self._number = self.socket.fileno()
        sockets[self._number] = self.socket
        selector.register(self.socket, selectors.EVENT_WRITE, self)

    def send(self, body: RangeBody, request: bytes) -> None:
        """Ask for `body`, now or once connected; raises OSError.

        Not over a connection that has ended, that holds bytes which nobody asked for, or that was
        not used for so long that a router may have forgotten it.
        """
        if self.is_ready:
            self._listen()
            if time.monotonic() - self.progress > _KEPT_SECONDS:
                raise OSError("the connection is too old")
        self.body, body.connection = body, self
        self._request, self.received, self._body_at = request, 0, 0
        self.progress = time.monotonic()
        if self.is_ready:
            self._send()

    def advance(self) -> bool:
        """Do what can be done without waiting; return whether the answer is whole.

        Raises OSError when the connection broke, UnusualAnswerError.
        """
        if self.is_ready:
            return self._receive() if self.body is not None else self._listen()
        self._open()
        return False

    def take(self) -> memoryview:
        """Return the answer's body, which is whole; the connection is free again."""
        assert self.body is not None  # noqa: S101 - for the type checker
        taken = memoryview(self._buffer)[self._body_at : self.received]
        self.body.connection = None
        self.body, self._buffer, self.has_answered = None, bytearray(), True
        return taken

    def close(self) -> None:
        """End it; a body that it has is not answered any more."""
        if self.body is not None:
            self.body.connection = None
            self.body = None
        self._selector.unregister(self.socket)
        del self._sockets[self._number]
        self.socket.close()

    def _open(self) -> None:
        if not self._is_connected:
            code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            self._is_connected = True
            self.progress = time.monotonic()
            if self._context is not None:
                self.socket = self._context.wrap_socket(
                    self.socket, server_hostname=self._host, do_handshake_on_connect=False
                )
                self._sockets[self._number] = self.socket
        if isinstance(self.socket, ssl.SSLSocket):
            try:
                self.socket.do_handshake()
            except ssl.SSLWantReadError:
                self._selector.modify(self.socket, selectors.EVENT_READ, self)
                return
            except ssl.SSLWantWriteError:
                self._selector.modify(self.socket, selectors.EVENT_WRITE, self)
                return
        self.is_ready = True
        self._selector.modify(self.socket, selectors.EVENT_READ, self)
        self._send()

    def _send(self) -> None:
        # a few hundred bytes into an empty buffer: whatever is not taken at once is an error
        if self.socket.send(self._request) != len(self._request):
            raise OSError("the request was not sent")

    def _listen(self) -> bool:
        """Hear what an unused connection says: TLS of its own at most, or its end."""
        try:
            self.socket.recv(1)
        except _WOULD_BLOCK:
            return False
        raise OSError("the connection has ended")

    def _receive(self) -> bool:
        assert self.body is not None  # noqa: S101 - for the type checker
        wanted = self.body.end - self.body.start
        if not self._buffer:
            self._buffer = bytearray(wanted + HEAD_BYTES)
        while True:
            try:
                count = self.socket.recv_into(memoryview(self._buffer)[self.received :])
            except _WOULD_BLOCK:
                return False
            if not count:
                raise OSError("the connection has ended")
            self.received += count
            self.progress = time.monotonic()
            if not self._body_at:
                self._read_head(self.body)
            missing = self._body_at + wanted - self.received
            if self._body_at and missing <= 0:
                if missing:
                    raise UnusualAnswerError
                return True
            if self._context is None:  # a plain socket gave all that it had
                return False

    def _read_head(self, body: RangeBody) -> None:
        end = self._buffer.find(b"\r\n\r\n", 0, min(self.received, HEAD_BYTES))
        if end >= 0:
            self.closes = check_head(bytes(self._buffer[: end + 2]), body)
            self._body_at = end + 4
        elif self.received >= HEAD_BYTES:
            raise UnusualAnswerError


def _connecting(address: Address) -> socket.socket:
    """Return a socket that has begun to connect."""
    family, target = address
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.settimeout(0)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BlockingIOError):
            made.connect(target)
    except OSError:
        made.close()
        raise
    return made


def check_head(head: bytes, body: RangeBody) -> bool:
    """Return whether the connection ends with this answer.

    Raises UnusualAnswerError unless the head, with its last line's end, announces exactly the
    bytes of `body`, of its version.
    """
    lower = head.lower()
    status = _STATUS.match(lower)
    if status is None or status.group(1) != b"206":
        raise UnusualAnswerError(int(status.group(1)) if status else 0)
    span, length = _RANGE.search(lower), _LENGTH.search(lower)
    if (
        span is None
        or length is None
        or (int(span.group(1)), int(span.group(2)) + 1) != (body.start, body.end)
        or int(length.group(1)) != body.end - body.start
        or any(name in lower for name in _ENCODED)
    ):
        raise UnusualAnswerError
    if body.etag is not None:
        etag = _ETAG.search(lower)
        if etag is None or head[slice(*etag.span(1))].strip() != body.etag.encode("latin-1"):
            raise UnusualAnswerError
    return _CLOSES.search(lower) is not None
