"""What is said when a store fails: the cause and the way out, none of the client's debug text."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from range_server import range_server

from prep.downloads import RetryPolicy
from prep.errors import (
    BadClipError,
    DatasetError,
    KprepError,
    StorageError,
    UsageError,
    error_from_text,
    error_to_text,
)
from prep.storage import Storage
from prep.store_errors import store_errors
from prep.verify_files import extra_files, unfinished_copy

if TYPE_CHECKING:
    from collections.abc import Iterator

_REFUSAL = b"<Error><Code>SignatureDoesNotMatch</Code><Message>Check your key.</Message></Error>"


class _Server(http.server.BaseHTTPRequestHandler):
    """Refuses what lies under /b or a status, turns /loop to itself, and gives anything else whole, whatever is asked for."""

    def do_GET(self) -> None:
        folder = self.path.split("/")[1].partition("?")[0]
        status = {"b": 403, "loop": 302}.get(folder, int(folder) if folder.isdigit() else 200)
        self.send_response(status)
        if folder == "loop":
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(_REFUSAL)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(_REFUSAL)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def _s3(endpoint: str, bucket: str = "b", **policy: Any) -> Storage:
    options = {"endpoint": endpoint, "access_key_id": "a", "secret_access_key": "b"}
    return Storage(f"s3://{bucket}", options, RetryPolicy(**(policy or {"patience_seconds": 0})))


def test_what_may_be_read_and_not_listed_is_verified_without_a_list(port):
    """S3 answers 403 to a list that is not allowed, and then also for what is not there."""
    store = _s3(f"http://127.0.0.1:{port}")
    assert extra_files(store, None) is None
    assert list(unfinished_copy(store)) == []
    gone = _s3(f"http://127.0.0.1:{port}", "400")
    with pytest.raises(StorageError, match="Bad Request"):
        extra_files(gone, None)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def _says(*parts: str) -> Iterator[None]:
    with pytest.raises(StorageError) as raised:
        yield
    text = str(raised.value)
    assert all(part in text for part in parts), text
    assert "Debug source" not in text
    assert "{" not in text


def test_nobody_listens_there():
    with _says("b/x cannot be reached", "error sending request: Connection refused"):
        _s3(f"http://127.0.0.1:{_free_port()}").read("x")


def test_a_host_that_does_not_exist():
    with _says("error sending request: failed to lookup address information"):
        _s3("http://nowhere.invalid").read("x")


def test_a_server_that_hangs_up():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while server.fileno() >= 0:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.recv(4096)
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        with _says("error sending request: IncompleteMessage"):
            _s3(f"http://127.0.0.1:{server.getsockname()[1]}").read("x")


@pytest.mark.parametrize(("root", "variable"), [
    ("s3://b", "AWS_ACCESS_KEY_ID"), ("gs://b", "GOOGLE_APPLICATION_CREDENTIALS"),
])  # fmt: skip
def test_credentials_are_asked_for_that_the_store_knows(root, variable):
    with _says(f"no credentials; set {variable}"), store_errors(f"{root}/x"):
        raise RuntimeError("error sending request for url (http://169.254.169.254/latest)")


def test_a_refusal_is_quoted_with_what_to_do(port):
    store = _s3(f"http://127.0.0.1:{port}")
    with _says("403 Forbidden: <Error><Code>SignatureDoesNotMatch", "credentials are right"):
        store.read("x")
    with _says("403 Forbidden; see that the credentials are right"):
        store.info("x")  # the answer to a HEAD has no body


def test_a_server_without_ranges(port):
    with _says("x cannot be reached: its server does not answer Range requests; serve"):
        Storage(f"http://127.0.0.1:{port}/c").read_range("x", 2, 5)


def test_a_larger_object_than_any_reader_expects_is_not_read(port):
    store = Storage(f"http://127.0.0.1:{port}/c")
    size = len(_REFUSAL)
    assert store.read("x", size) == _REFUSAL
    with pytest.raises(DatasetError, match=f"c/x has {size} bytes, where {size - 1} are the most"):
        store.read("x", size - 1)


def test_a_loop_of_redirects_is_not_followed_for_a_minute(port):
    waits: list[float] = []
    store = Storage(f"http://127.0.0.1:{port}/loop", retry=RetryPolicy(sleep=waits.append))
    with _says("error following redirect: TooManyRedirects"):
        store.read("x")
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("status", "says"),
    [(301, "configured region; set AWS_REGION to the bucket's"), (501, "501 Not Implemented")],
)
def test_what_cannot_succeed_is_tried_for_less_than_a_second(port, status, says):
    waits: list[float] = []
    store = _s3(f"http://127.0.0.1:{port}", str(status), sleep=waits.append)
    for read in (store.read, store.info):
        waits.clear()
        with _says(says):
            read("x")
        assert 0 < len(waits) <= 2
        assert sum(waits) < 1


def test_a_certificate_that_nobody_trusts_is_tried_for_less_than_a_second():
    waits: list[float] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with range_server(context) as server:
        store = Storage(server.url, retry=RetryPolicy(sleep=waits.append))
        with _says("its certificate is not valid", "; SSL_CERT_FILE names"):
            store.read("x")
    assert len(waits) == 2


@pytest.mark.parametrize("status", [400, 407, 501])
def test_an_answer_is_quoted_once_and_nothing_behind_it(port, status):
    store = _s3(f"http://127.0.0.1:{port}", str(status))
    with pytest.raises(StorageError, match=r"</Error>($| \(given up)") as raised:
        store.read("x")
    assert str(raised.value).count("Check your key") == 1
    with pytest.raises(StorageError, match=http.HTTPStatus(status).phrase + r"($| \(given up)"):
        store.info("x")


def test_a_folder_that_may_not_be_listed():
    with (
        _says("/r/. cannot be reached: /r/a: b: Permission denied; mend that"),
        store_errors("/r/."),
    ):
        raise RuntimeError(
            "Generic LocalFileSystem error: Unable to walk dir: IO error for operation on /r/a: b: "
            "Permission denied (os error 13)\n\nDebug source:\nGeneric { store: 'LocalFileSystem' }"
        )


@pytest.mark.parametrize("root", ["s3://", "s3:", "s3:/k400", "s3:///k400", "gs://", "https:///x"])
def test_an_address_without_a_name_is_no_folder(root):
    what = "server" if root.startswith("http") else "bucket"
    with pytest.raises(UsageError, match=f"names no {what}; give {root[:2]}.*://{what.upper()}/"):
        Storage(root)


def test_an_address_is_taken_by_its_scheme_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="must be a directory, s3://"):
        Storage("S3://bucket")
    assert Storage("./s3:/x/").root == f"{tmp_path}/s3:/x"
    assert Storage("s3://bucket//").root == "s3://bucket"


class _OwnError(KprepError):
    """Of a kind that another process may not have."""

    exit_code = 75


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UsageError("a"), UsageError),
        (BadClipError("b"), BadClipError),
        (_OwnError("c"), KprepError),
    ],
)
def test_an_error_reaches_another_process_with_its_sentence_and_exit_code(error, kind):
    found = error_from_text(error_to_text(error))
    assert (type(found), str(found), found.exit_code) == (kind, str(error), error.exit_code)
