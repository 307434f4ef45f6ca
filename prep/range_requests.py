"""Ranges of objects, asked for long before they are needed and taken from the socket when they are.

One thread, no event loop: a request is sent on a connection of its own, and what the store answers
waits in the kernel's buffer. So an answer costs one `send` and mostly one `recv`, and no thread is
woken for it. While the caller waits for one answer, all the others are taken in too.

Only the usual case is handled here: a 206 with exactly the bytes that were asked for, of the
version that was asked for. Whatever else happens (an error, a redirect, a broken or stalled
answer), the range is read by `fallback`, in threads, which knows what can be tried again, how long
to wait, and what to say. Nothing is concluded from an answer that is not taken.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from prep.downloads import growing_wait
from prep.errors import KprepError, StorageError
from prep.http_connection import Connection, UnusualAnswerError
from prep.object_urls import tls_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from prep.http_connection import Address
    from prep.object_urls import ObjectUrl, ObjectUrls, Origin

    Fallback = Callable[[str, int, int, str | None], memoryview]

MOST_CONNECTIONS = 80
"""Requests in flight at once: all that a loader has begun, 72 clips with batches of 24.

With fewer, requests wait for a connection until somebody waits for an answer, and a decoding
process does so too rarely. No more are opened than are in flight.
"""
_MOST_THREADS = 16  # that read what could not be read here
_LONGEST_BYTES = 1 << 20  # above, a body that can be continued is worth more than a cheap request
_LARGE_BYTES = 48 << 10  # more than surely fits into the kernel's buffer
_FAILURES_IN_A_ROW = 3  # then the other way is taken for a while
_MOST_TRIES = 4  # of a range, on new connections
_STALLS = 4  # so many times as long as a stall is how long a trickling answer is waited for
_RESOLVED_SECONDS = 60.0  # a store's name leads elsewhere after a while
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 300.0

_log = logging.getLogger("kprep.storage")


class RangeBody:
    """Bytes `[start, end)` of an object, on their way: call it to wait for them.

    Raises what the fallback raises.
    """

    __slots__ = (
        "__weakref__", "_requests", "answer", "connection", "end", "etag", "future", "path",
        "start", "tries",
    )  # fmt: skip

    def __init__(
        self, requests: RangeRequests, path: str, start: int, end: int, etag: str | None
    ) -> None:
        self._requests = requests
        self.path, self.start, self.end, self.etag = path, start, end, etag
        self.answer: memoryview | None = None
        self.connection: Connection | None = None
        self.future: Future[memoryview] | None = None
        self.tries = 0

    def __call__(self) -> memoryview:
        """Wait for the bytes and return them; they can be asked for again."""
        if self.answer is None:
            self._requests.wait(self)  # also where the fallback reads: what else failed joins it
        if self.answer is None and self.future is not None:
            self.answer = self.future.result()
        assert self.answer is not None  # noqa: S101 - for the type checker
        return self.answer


class RangeRequests:
    """The requests of one root in one process.

    `stall_seconds` is how long an answer may bring no byte while somebody waits for it,
    `connect_seconds` how long a connection may take to be there. Meant for one thread: others
    that share them wait while one waits.
    """

    def __init__(
        self,
        urls: ObjectUrls,
        fallback: Fallback,
        *,
        stall_seconds: float = 10.0,
        connect_seconds: float = 3.0,
    ) -> None:
        self._urls, self._fallback, self._stall_seconds = urls, fallback, stall_seconds
        self._connect_seconds = min(connect_seconds, stall_seconds)
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._origin: Origin | None = None
        self._addresses: list[Address] = []
        self._resolved = 0.0
        self._context: ssl.SSLContext | None = None
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._opening: set[Connection] = set()
        self._queue: deque[weakref.ref[RangeBody]] = deque()  # what nobody wants is not asked for
        self._has_large = False
        self._threads: ThreadPoolExecutor | None = None
        self._failures = self._pauses = 0
        self._paused_until = 0.0
        self._sockets: dict[int, socket.socket] = {}
        # not the selector: it leads back to here, and is closed with its last reference
        weakref.finalize(self, _close, self._sockets)

    def begin(self, path: str, start: int, end: int, etag: str | None) -> RangeBody:
        """Ask for bytes `[start, end)`; call what is returned to have them."""
        body = RangeBody(self, path, start, end, etag)
        with self._lock:
            if self._idle or len(self._open) < MOST_CONNECTIONS:
                self._start(body)
            else:
                self._queue.append(weakref.ref(body))
        return body

    def wait(self, body: RangeBody) -> None:
        """Take in answers until `body` has its own, or the fallback reads it.

        Raises StorageError in a process that was forked since: the connections are its parent's.
        """
        if os.getpid() != self._process:
            raise StorageError(
                f"{body.path} was asked for before this process was forked; start workers with "
                "the 'forkserver' or 'spawn' method"
            )
        with self._lock:
            if self._queue or self._has_large or self._opening or self._failures:
                self._step(0)
            elif body.connection is not None and body.connection.is_ready:
                self._advance(body.connection)
            since = time.monotonic()
            while body.answer is None and body.future is None:
                if not self._step(self._connect_seconds / 4):
                    self._end_stalled(since, body)
                if time.monotonic() - since > _STALLS * self._stall_seconds:
                    self._give_up(body)  # a trickle is no better than nothing

    def _step(self, seconds: float) -> bool:
        """Take in what has arrived, or does within the time; return whether anything has."""
        events = self._selector.select(seconds)
        for key, _ in events:
            self._advance(key.data)
        while self._queue and (self._idle or len(self._open) < MOST_CONNECTIONS):
            body = self._queue.popleft()()
            if body is not None:
                self._start(body)
        return bool(events)

    def _start(self, body: RangeBody) -> None:
        size = body.end - body.start
        url = self._urls.get(body.path) if 0 < size <= _LONGEST_BYTES else None
        if url is None or time.monotonic() < self._paused_until or not _can_ask(body.etag):
            self._fall_back(body)
            return
        self._origin = self._origin or url.origin
        if url.origin != self._origin:
            self._fall_back(body)
            return
        self._has_large |= size > _LARGE_BYTES
        request = _request(url, body)
        while self._idle:
            connection = self._idle.pop()
            try:
                connection.send(body, request)
            except OSError:
                self._drop(connection)
            else:
                return
        self._connect(body, request)

    def _connect(self, body: RangeBody, request: bytes) -> None:
        """Ask over a new connection, to the next of the origin's addresses that takes one."""
        body.tries += 1
        try:
            self._resolve()
            while True:
                self._addresses.append(self._addresses.pop(0))
                try:
                    connection = self._new_connection(self._addresses[-1])
                    break
                except OSError:
                    self._addresses.pop()
                    if not self._addresses:
                        raise
        except (OSError, ValueError):  # a name that cannot be one is a ValueError
            self._failed(body)
            return
        self._open.add(connection)
        self._opening.add(connection)
        connection.send(body, request)

    def _resolve(self) -> None:
        origin = self._origin
        assert origin is not None  # noqa: S101 - for the type checker
        if not self._addresses or time.monotonic() - self._resolved > _RESOLVED_SECONDS:
            found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
            self._addresses = [(family, address) for family, _, _, _, address in found]
            self._resolved = time.monotonic()
        if origin.tls and self._context is None:
            self._context = tls_context()

    def _new_connection(self, address: Address) -> Connection:
        assert self._origin is not None  # noqa: S101 - for the type checker
        return Connection(address, self._selector, self._sockets, self._context, self._origin.host)

    def _advance(self, connection: Connection) -> None:
        try:
            is_whole = connection.advance()
        except (OSError, ValueError, UnusualAnswerError) as error:
            self._broken(connection, error)
            return
        if connection.is_ready:
            self._opening.discard(connection)
        if is_whole:
            body = connection.body
            assert body is not None  # noqa: S101 - for the type checker
            body.answer = connection.take()
            self._failures = self._pauses = 0
            if connection.closes:
                self._drop(connection)
            else:
                self._idle.append(connection)

    def _broken(self, connection: Connection, error: Exception) -> None:
        body = connection.body
        # a store ends connections that were not used for a while, as it may
        again = connection.has_answered and not connection.received and isinstance(error, OSError)
        if not connection.is_ready:
            if connection.address in self._addresses:
                self._addresses.remove(connection.address)
            again = bool(self._addresses)  # another of the name's addresses may be reached
        self._drop(connection)
        if body is None:
            return
        if isinstance(error, UnusualAnswerError) and error.status in (400, 401, 403):
            self._urls.forget()  # their signatures may be too old
        url = self._urls.get(body.path) if again and body.tries < _MOST_TRIES else None
        if url is not None:
            self._connect(body, _request(url, body))
        else:
            self._failed(body)

    def _end_stalled(self, since: float, body: RangeBody) -> None:
        """End what has brought nothing for too long, with somebody waiting since `since`."""
        now = time.monotonic()
        for connection in list(self._open):
            patience = self._stall_seconds if connection.is_ready else self._connect_seconds
            if connection.body is not None and max(since, connection.progress) < now - patience:
                self._broken(connection, UnusualAnswerError())
        if body.connection is None and since < now - self._stall_seconds:
            self._give_up(body)

    def _give_up(self, body: RangeBody) -> None:
        """Read a range the other way that has neither come nor failed."""
        if body.answer is not None or body.future is not None:
            return
        if body.connection is not None:
            self._broken(body.connection, UnusualAnswerError())
            return
        if weakref.ref(body) in self._queue:
            self._queue.remove(weakref.ref(body))
        self._failed(body)

    def _drop(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._opening.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        connection.close()

    def _failed(self, body: RangeBody) -> None:
        """Read a range the other way; after some in a row all are, for a while.

        What was under way when that began, and fails too, says nothing new.
        """
        now = time.monotonic()
        self._failures += now >= self._paused_until
        if now >= self._paused_until and self._failures % _FAILURES_IN_A_ROW == 0:
            self._pauses += 1
            pause = growing_wait(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, self._pauses, 4.0)
            self._paused_until = now + pause
            _log.info("reading %s through the object store's client for %.0f s", body.path, pause)
        self._fall_back(body)

    def _fall_back(self, body: RangeBody) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_MOST_THREADS, "kprep-read")
        arguments = (body.path, body.start, body.end, body.etag)
        try:
            body.future = self._threads.submit(self._fallback, *arguments)
        except RuntimeError:  # no thread can be started
            body.future = Future()
            try:
                body.future.set_result(self._fallback(*arguments))
            except KprepError as error:
                body.future.set_exception(error)


def _can_ask(etag: str | None) -> bool:
    """Whether a version can stand in a request as it is."""
    return etag is None or (etag.isascii() and etag.isprintable())


def _request(url: ObjectUrl, body: RangeBody) -> bytes:
    condition = b""
    # a weak ETag never satisfies If-Match (RFC 9110, 13.1.1); the answer's own is compared
    if body.etag is not None and not body.etag.startswith("W/"):
        condition = b"If-Match: %b\r\n" % body.etag.encode("ascii")
    return b"%b%d-%d\r\n%b\r\n" % (url.head, body.start, body.end - 1, condition)


def _close(sockets: dict[int, socket.socket]) -> None:
    for one in sockets.values():
        one.close()
