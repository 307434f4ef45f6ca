"""A small HTTP server on 127.0.0.1 that answers requests for ranges as a test says."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

DATA = bytes(range(256)) * 1024  # so that every byte says where it stands


@dataclass(frozen=True)
class Asked:
    """One request: its target, its range, and which connection it came over, counted from 0."""

    target: str
    start: int
    end: int
    head: bytes
    connection: int

    def answer(
        self,
        status: str = "206 Partial Content",
        body: bytes | None = None,
        **changes: str | None,
    ) -> bytes:
        """The right answer, with headers replaced (`content_range=…`) or left out (None)."""
        body = DATA[self.start : self.end] if body is None else body
        headers: dict[str, str | None] = {
            "Content-Length": str(len(body)),
            "Content-Range": f"bytes {self.start}-{self.end - 1}/{len(DATA)}",
            "ETag": '"one"',
        }
        for name, value in changes.items():
            headers[name.replace("_", "-").title().replace("Etag", "ETag")] = value
        lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
        return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


@dataclass
class RangeServer:
    """`reply` gives the bytes to send for a request; None closes the connection without any."""

    reply: Callable[[Asked], bytes | None] = field(default=lambda asked: asked.answer())
    closes_after: Callable[[Asked], bool] = field(default=lambda asked: False)
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    scheme: str = "http"
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def serve(self, accepted: socket.socket, number: int) -> None:
        waiting = b""
        with contextlib.suppress(OSError), accepted:
            while True:
                while b"\r\n\r\n" not in waiting:
                    more = accepted.recv(65536)
                    if not more:
                        return
                    waiting += more
                head, _, waiting = waiting.partition(b"\r\n\r\n")
                span = re.search(rb"\r\nRange: bytes=(\d+)-(\d+)", head)
                assert span is not None, head
                target = head.split(b" ")[1].decode()
                one = Asked(target, int(span[1]), int(span[2]) + 1, head, number)
                self.asked.append(one)
                answer = self.reply(one)
                if answer is None:
                    return
                accepted.sendall(answer)
                if self.closes_after(one):
                    return


@contextlib.contextmanager
def range_server(context: ssl.SSLContext | None = None) -> Iterator[RangeServer]:
    """Run a server, over TLS with `context`; all its connections end with the block."""
    server = RangeServer(scheme="http" if context is None else "https")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.port = listening.getsockname()[1]
        threads: list[threading.Thread] = []

        def accept() -> None:
            while True:
                try:
                    accepted, _ = listening.accept()
                except OSError:
                    return
                server.sockets.append(accepted)
                number, server.connections = server.connections, server.connections + 1
                one = threading.Thread(target=talk, args=(accepted, number), daemon=True)
                threads.append(one)
                one.start()

        def talk(accepted: socket.socket, number: int) -> None:
            if context is not None:
                with contextlib.suppress(OSError):
                    wrapped = context.wrap_socket(accepted, server_side=True)
                    server.sockets.append(wrapped)
                    server.serve(wrapped, number)
                accepted.close()
                return
            server.serve(accepted, number)

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield server
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join(10)
            for one in server.sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)
            for one in server.sockets:
                one.close()
