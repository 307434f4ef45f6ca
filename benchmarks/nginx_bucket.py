"""A folder as an S3 bucket, near and far, from nginx: unsigned reads at 0.05 ms of CPU a request.

Debian's nginx-light and libnginx-mod-http-echo. Ranges, ETags and conditions are as S3 has them;
signatures are not looked at. The far bucket delays the first byte of each answer. Requests of both
are written to one log.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "bench"
MODULE = Path("/usr/lib/nginx/modules/ngx_http_echo_module.so")
INSTALL = "apt-get install nginx-light libnginx-mod-http-echo"


@dataclass(frozen=True)
class Buckets:
    """Two endpoints that serve bucket `bench`; `log` has a line `METHOD STATUS BYTES` a request."""

    near: str
    far: str
    log: Path


def available() -> bool:
    """Whether nginx and its module for delays are installed."""
    return shutil.which("nginx") is not None and MODULE.exists()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in taken]


def _config(root: Path, folder: Path, ports: list[int], milliseconds: float, tls: bool) -> str:
    # a prefix that is asked for holds something: that is all that readers of a bucket want to know
    key = "<Key>${arg_prefix}manifest.json</Key><Size>1</Size>"
    found = f"<KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents>{key}</Contents>"
    answer = f"<ListBucketResult><Name>{BUCKET}</Name>{found}</ListBucketResult>"
    listing = f"location = /{BUCKET} {{ default_type application/xml; return 200 '{answer}'; }}"
    no_folders = "if (-d $request_filename) { return 404; }"
    ssl = " ssl" if tls else ""
    certificate = f"ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.pem;"
    return f"""load_module {MODULE};
        daemon off; worker_processes 1; user root; pid {folder}/nginx.pid;
        error_log {folder}/error.log;
        events {{ worker_connections 1024; }}
        http {{
          log_format request "$request_method $status $body_bytes_sent";
          access_log {folder}/access.log request;
          keepalive_requests 1000000; sendfile on; tcp_nopush on;
          open_file_cache max=1000 inactive=1h; open_file_cache_valid 1h;
          {certificate if tls else ""}
          client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
          uwsgi_temp_path {folder}; scgi_temp_path {folder};
          server {{
            listen 127.0.0.1:{ports[0]}{ssl};
            {listing}
            location /{BUCKET}/ {{ alias {root.absolute()}/; {no_folders} }}
          }}
          server {{
            listen 127.0.0.1:{ports[1]}{ssl};
            {listing}
            location /now/{BUCKET}/ {{ internal; alias {root.absolute()}/; {no_folders} }}
            location /{BUCKET}/ {{ echo_sleep {milliseconds / 1000}; echo_exec /now$uri; }}
          }}
        }}"""


@contextlib.contextmanager
def nginx_buckets(
    root: Path, folder: Path, milliseconds: float, *, tls: bool = False
) -> Iterator[Buckets]:
    """Serve `root` as bucket `bench` at two endpoints; nginx's own files stand in `folder`.

    With `tls`, processes that are started from then on trust its certificate.
    """
    if not available():
        sys.exit(f"nginx or its echo module is missing: {INSTALL}")
    ports = _free_ports(2)
    config = folder / "nginx.conf"
    if tls:
        _certify(folder)
    config.write_text(_config(root, folder, ports, milliseconds, tls))
    process = subprocess.Popen(
        [shutil.which("nginx") or "nginx", "-c", str(config), "-e", f"{folder}/error.log"]
    )
    try:
        _wait(process, ports, folder / "error.log")
        near, far = (f"http{'s' if tls else ''}://127.0.0.1:{port}" for port in ports)
        yield Buckets(near, far, folder / "access.log")
    finally:
        process.terminate()
        process.wait()


def _certify(folder: Path) -> None:
    """Make a certificate for the server, and trust its authority here."""
    import trustme  # of the development extra, as the tests' server

    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        str(folder / "server.pem")
    )
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    os.environ["SSL_CERT_FILE"] = str(folder / "authority.pem")


def _wait(process: subprocess.Popen[bytes], ports: list[int], log: Path) -> None:
    for _ in range(100):
        if process.poll() is not None:
            sys.exit(f"nginx ended: {log.read_text()[-500:]}")
        with contextlib.suppress(OSError):
            for port in ports:
                socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.1)
    sys.exit("nginx does not answer")
