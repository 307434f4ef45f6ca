"""A proxy on 127.0.0.1 before an S3 server that does to answers what networks do.

Understands just enough of HTTP/1.1 for an S3 client. What happens to a request is decided by a
function of its number and path, so that a test is repeated exactly: `by_rate` or `script`. Uploads
(PUT and POST) have a function of their own, `choose_upload`, with the faults UPLOAD_FAULTS.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAULTS = ("reset", "close", "stall", "delay", "503", "429", "truncate-200", "truncate-206")
UPLOAD_FAULTS = ("reset", "lost-answer", "stall", "503")


@dataclass(frozen=True)
class Request:
    """One request as the proxy saw it; `number` counts GETs from 0, `fault` is what was done to it."""

    number: int
    method: str
    path: str
    range: str | None
    fault: str | None


def by_rate(seed: int, **rates: float) -> Callable[[int, str], str | None]:
    """Each GET below a `.tar` gets a fault with its own rate; the same for equal seed and number."""

    def choose(number: int, path: str) -> str | None:
        if not path.endswith(".tar"):
            return None
        drawn = random.Random(f"{seed} {number}").random()
        for name, rate in rates.items():
            if drawn < rate:
                return name.replace("_", "-").removeprefix("status-")
            drawn -= rate
        return None

    return choose


def uploads_by_rate(seed: int, **rates: float) -> Callable[[int, str], str | None]:
    """Each upload request gets a fault with its own rate; the same for equal seed and number."""

    def choose(number: int, path: str) -> str | None:
        drawn = random.Random(f"{seed} upload {number}").random()
        for name, rate in rates.items():
            if drawn < rate:
                return name.replace("_", "-").removeprefix("status-")
            drawn -= rate
        return None

    return choose


def script(*faults: str | None) -> Callable[[int, str], str | None]:
    """The first GETs below a `.tar` get these faults in turn, later ones none."""
    left = list(faults)

    def choose(number: int, path: str) -> str | None:
        return left.pop(0) if left and path.endswith(".tar") else None

    return choose


@dataclass
class FaultProxy:
    """Running proxy: `endpoint` for clients, `requests` seen, `down` refuses every connection."""

    upstream: str
    choose: Callable[[int, str], str | None] = field(default=lambda number, path: None)
    choose_upload: Callable[[int, str], str | None] = field(default=lambda number, path: None)
    delay_seconds: float = 0.3
    latency_seconds: float = 0.0
    """Added to the first byte of every answer."""
    requests: list[Request] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    down: bool = False
    open: list[asyncio.StreamWriter] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]

    @property
    def uploads(self) -> list[Request]:
        return [request for request in self.requests if request.method in ("PUT", "POST")]

    @property
    def faults(self) -> list[str]:
        return [request.fault for request in self.requests if request.fault]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client connection, with one connection of its own to the server."""
        far = urlsplit(self.upstream)
        upstream: asyncio.StreamWriter | None = None
        # cancelled when the proxy ends; asyncio's own callback would print that
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not self.down:
                head = await reader.readuntil(b"\r\n\r\n")
                if self.down:
                    break
                if upstream is None:
                    answers, upstream = await asyncio.open_connection(far.hostname, far.port)
                    self.open.append(upstream)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    if not await self._exchange(head, reader, answers, upstream, writer):
                        break
                finally:
                    self.in_flight -= 1
        for end in (writer, upstream):
            if end is not None:
                end.transport.abort()
                self.open.remove(end)

    async def _exchange(self, head, reader, answers, upstream, writer) -> bool:
        """Pass one request on; return whether the connection can be used again."""
        method, target, _ = head.decode("latin-1").split("\r\n")[0].split(" ")
        path = urlsplit(target).path
        found = re.search(rb"\r\nrange: *([^\r]*)", head, re.IGNORECASE)
        if method in ("PUT", "POST"):
            return await self._upload(head, method, path, reader, answers, upstream, writer)
        number = len(self.gets)
        fault = self.choose(number, path) if method == "GET" else None
        span = found.group(1).decode() if found else None
        self.requests.append(Request(number, method, path, span, fault))
        await asyncio.sleep(self.latency_seconds)
        if fault in ("503", "429"):
            writer.write(f"HTTP/1.1 {fault} Slow Down\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return True
        if fault == "delay":
            await asyncio.sleep(self.delay_seconds)
        upstream.write(head)
        answer, body = await _whole_answer(answers, has_body=method != "HEAD")
        return await self._answer(fault, answer, body, writer)

    async def _upload(self, head, method, path, reader, answers, upstream, writer) -> bool:
        number = len(self.uploads)
        fault = self.choose_upload(number, path)
        self.requests.append(Request(number, method, path, None, fault))
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        size = int(length.group(1)) if length else 0
        if fault == "reset":
            await reader.readexactly(size // 2)
            self._reset(writer)
            return False
        body = await reader.readexactly(size)
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "503":
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return True
        upstream.write(head + body)
        answer, body = await _whole_answer(answers, has_body=True)
        if fault == "lost-answer":
            self._reset(writer)
            return False
        writer.write(answer + body)
        await writer.drain()
        return True

    @staticmethod
    def _reset(writer) -> None:
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def _answer(self, fault, answer, body, writer) -> bool:
        half = len(body) // 2
        if fault in (None, "delay") or not body:
            writer.write(answer + body)
            await writer.drain()
            return True
        if fault.startswith("truncate"):
            answer = re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % half, answer)
            if fault == "truncate-200":
                answer = re.sub(rb"^HTTP/1.1 206[^\r]*", b"HTTP/1.1 200 OK", answer)
                answer = re.sub(rb"(?i)\r\ncontent-range:[^\r]*", b"", answer)
            writer.write(answer + body[:half])
            await writer.drain()
            return True
        writer.write(answer + body[:half])
        await writer.drain()
        await asyncio.sleep(0.05)  # so that the half arrives before what follows
        if fault == "close":
            writer.close()
            await writer.wait_closed()
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "reset":
            self._reset(writer)
        return False


async def _whole_answer(answers, *, has_body) -> tuple[bytes, bytes]:
    """Return head and body of an answer; a chunked body as it is on the wire."""
    answer = await answers.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", answer, re.IGNORECASE)
    if not has_body:
        return answer, b""
    if length:
        return answer, await answers.readexactly(int(length.group(1)))
    body = b""
    if re.search(rb"\r\ntransfer-encoding: *chunked", answer, re.IGNORECASE):
        while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
            line = await answers.readuntil(b"\r\n")
            body += line + await answers.readexactly(int(line, 16) + 2)
    return answer, body


@contextlib.contextmanager
def fault_proxy(upstream: str, choose=None, **options) -> Iterator[FaultProxy]:
    """Run a proxy in a thread of its own; all its connections end with the block."""
    proxy = FaultProxy(upstream, **options, **({"choose": choose} if choose else {}))
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    serving: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.open.append(writer)  # here, since a task that is cancelled early never begins
        task = loop.create_task(proxy.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    async def main() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        # asyncio forgets a socket that was accepted and is made a transport of after `close`
        loop.remove_reader(server.sockets[0].fileno())
        await asyncio.sleep(0.01)
        server.close()
        for _ in range(5):  # a connection that was accepted just now begins to be served only later
            await asyncio.sleep(0.01)
            tasks = list(serving)  # not asyncio's own: those that accept leave sockets open then
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in proxy.open:
                writer.transport.abort()
        await asyncio.sleep(0.01)  # so that the transports close their sockets

    stop = asyncio.Event()

    def run() -> None:
        loop.run_until_complete(main())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
