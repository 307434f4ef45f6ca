"""A TCP proxy that delays the first byte of each answer: a near object store plays a far one.

    python latency_proxy.py TARGET_HOST TARGET_PORT MILLISECONDS

Prints the port it listens on. What a client sends passes at once; the first bytes that come back
after it wait until MILLISECONDS have passed since then; the rest of the answer is not delayed.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

CHUNK = 1 << 18


class Turn:
    """When the client spoke last, and whether it has been answered since."""

    def __init__(self) -> None:
        self.asked_at = 0.0
        self.answered = True


async def client_to_server(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, turn: Turn
) -> None:
    while data := await source.read(CHUNK):
        turn.asked_at, turn.answered = asyncio.get_running_loop().time(), False
        sink.write(data)
        await sink.drain()
    sink.close()


async def server_to_client(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, turn: Turn, delay: float
) -> None:
    while data := await source.read(CHUNK):
        if not turn.answered:
            await asyncio.sleep(turn.asked_at + delay - asyncio.get_running_loop().time())
            turn.answered = True
        sink.write(data)
        await sink.drain()
    sink.close()


async def serve(host: str, port: int, delay: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        turn = Turn()
        with contextlib.suppress(OSError):
            upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
            await asyncio.gather(
                client_to_server(reader, upstream_writer, turn),
                server_to_client(upstream_reader, writer, turn, delay),
            )

    server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000))
