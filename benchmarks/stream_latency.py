"""Streaming from S3 with slow first bytes against local disk and memory: same clips, same loader.

    python benchmarks/stream_latency.py ROOT [--milliseconds 30] [--seconds 10] [--json FILE]

ROOT is a local dataset. An S3 server (SeaweedFS, from the development extra) and a proxy that
delays first bytes are started on this machine; the processor time that they take is taken from
the loaders too, so on few cores the S3 rows are lower bounds. `--server nginx` (Debian's
nginx-light and libnginx-mod-http-echo) serves the same objects, unsigned, for a small part of
that time: ranges, ETags and conditions as S3 has them, and a delay of its own; with `--tls` it
speaks https, as real stores do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks")]

from nginx_bucket import BUCKET, nginx_buckets  # noqa: E402
from s3_server import s3_server  # noqa: E402 - the tests' helpers

from prep.format import read_manifest  # noqa: E402
from prep.storage import Storage  # noqa: E402
from stream.bench import LoaderOptions, bench_loaders, memory_baseline, table  # noqa: E402
from stream.bench_measure import cpu_seconds, own_processes  # noqa: E402
from stream.options import StreamOptions  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def delayed(endpoint: str, milliseconds: float) -> Iterator[str]:
    """Yield the address of a proxy before `endpoint` that delays first bytes."""
    address = urlsplit(endpoint)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("latency_proxy.py")),
         str(address.hostname), str(address.port), str(milliseconds)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        port = (process.stdout.readline() if process.stdout else "").strip()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def served(asked: argparse.Namespace, folder: Path) -> Iterator[tuple[Storage, Storage]]:
    """Yield the dataset as a bucket, near and far."""
    if asked.server == "nginx":
        with nginx_buckets(asked.root, folder, asked.milliseconds, tls=asked.tls) as buckets:
            options = {"skip_signature": True, "virtual_hosted_style_request": False}
            yield (Storage(f"s3://{BUCKET}", {**options, "endpoint": buckets.near}),
                   Storage(f"s3://{BUCKET}", {**options, "endpoint": buckets.far}))  # fmt: skip
        return
    with s3_server(folder) as server, delayed(server.endpoint, asked.milliseconds) as slow:
        address = server.upload(asked.root, "bench")
        yield (Storage(address, dict(server.options)),
               Storage(address, {**server.options, "endpoint": slow}))  # fmt: skip


@dataclass(frozen=True)
class RequestCost:
    """CPU milliseconds a request of a range: of this process, and of the servers."""

    client: float
    servers: float


def request_costs(
    storage: Storage, split: str, size: int, count: int = 3000
) -> tuple[RequestCost, RequestCost]:
    """Return what a range of `size` bytes costs as the loader asks for it, and through obstore."""
    shard = read_manifest(storage).splits[split].shards[0]
    etag = storage.info(shard.path).etag
    places = max(1, storage.info(shard.path).size_bytes - size)
    starts = [number * 1009 % places for number in range(count)]

    def ahead() -> None:
        waiting: deque[Callable[[], memoryview]] = deque()
        for start in starts:
            waiting.append(storage.begin_range(shard.path, start, start + size, etag=etag))
            if len(waiting) == 48:
                waiting.popleft()()
        for body in waiting:
            body()

    def in_threads() -> None:
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda at: storage.read_range(shard.path, at, at + size, etag=etag),
                             starts))  # fmt: skip

    return _cost(ahead, count), _cost(in_threads, count)


def _cost(work: Callable[[], None], count: int) -> RequestCost:
    servers = own_processes() - {os.getpid()}
    client, served = cpu_seconds({os.getpid()}), cpu_seconds(servers)
    work()
    return RequestCost((cpu_seconds({os.getpid()}) - client) * 1000 / count,
                       (cpu_seconds(servers) - served) * 1000 / count)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--seconds", type=float, default=10, help="measured, for each contender")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--prefetch", type=int, default=2, help="batches a worker prepares ahead")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--layout", choices=["yuv420", "rgb"], default="yuv420")
    parser.add_argument("--server", choices=["seaweedfs", "nginx"], default="seaweedfs")
    parser.add_argument("--tls", action="store_true", help="https, with --server nginx")
    parser.add_argument("--json", type=Path, help="write the results here too")
    asked = parser.parse_args()
    if asked.tls and asked.server != "nginx":
        parser.error("--tls needs --server nginx")
    return asked


def main() -> None:
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # processes, too, are of this checkout
    asked = arguments()
    options = LoaderOptions(
        StreamOptions(asked.split, frames=asked.frames, fps=Fraction(15), layout=asked.layout),
        batch=asked.batch,
        workers=asked.workers,
        prefetch=asked.prefetch,
    )
    local = Storage(str(asked.root))
    memory = memory_baseline(local, asked.split)
    if memory is None:
        sys.exit(f"{asked.root} is too large for a baseline in memory")
    with (
        tempfile.TemporaryDirectory() as folder,
        served(asked, Path(folder)) as (near, far),
    ):
        near_name = "S3, TLS" if asked.tls else "S3"
        far_name = f"{near_name} + {asked.milliseconds:g} ms"
        costs = {
            place: request_costs(storage, asked.split, 20_000)
            for place, storage in ((near_name, near), (far_name, far))
        }
        storages: dict[str, Storage] = {
            "local disk": local,
            "memory": memory,
            near_name: near,
            far_name: far,
        }
        results = bench_loaders(
            storages, options, seconds=asked.seconds, rounds=asked.rounds, baseline="memory"
        )
    print(f"{os.cpu_count()} cores, {platform.machine()}; batch {asked.batch}, "
          f"{asked.workers} workers, {asked.prefetch} batches ahead, {asked.layout}\n")  # fmt: skip
    print("\n".join(table(results)))
    for place, ways in costs.items():
        for way, cost in zip(("as the loader asks", "through obstore"), ways, strict=True):
            print(f"\n{place}, CPU a request of 20 kB, {way}: {cost.client:.3f} ms in the client, "
                  f"{cost.servers:.3f} ms in the servers")  # fmt: skip
    if asked.json:
        found = {name: asdict(result) for name, result in results.items()}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
