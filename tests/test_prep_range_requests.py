"""Ranges asked for early and taken late: what is taken, and what goes the other way."""

import errno
import gc
import multiprocessing
import os
import pickle
import select
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from range_server import DATA, range_server

from prep import range_requests
from prep.downloads import seconds_of
from prep.errors import ReplacedError, StorageError
from prep.http_connection import UnusualAnswerError, check_head
from prep.object_urls import ObjectUrls, parse_url
from prep.range_requests import MOST_CONNECTIONS, RangeBody, RangeRequests
from prep.storage import Storage


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Other:
    """The other way to read, which counts."""

    def __init__(self):
        self.reads = []

    def __call__(self, path, start, end, etag):
        self.reads.append((path, start, end, etag))
        return memoryview(DATA)[start:end]


@pytest.fixture
def other():
    return Other()


def never():
    raise AssertionError("no client is needed")


def requests(url, other, **more):
    return RangeRequests(ObjectUrls(url, {}, never), other, **more)


@pytest.fixture
def server():
    with range_server() as running:
        yield running


# -- the usual case ------------------------------------------------------------------------------


def test_ranges_come_as_they_were_asked_for_over_connections_that_are_kept(server, other):
    one = requests(f"{server.url}/a b", other)
    spans = [(number * 100, number * 100 + 1 + number * 7) for number in range(200)]
    bodies = [one.begin("train/x é.tar", start, end, '"one"') for start, end in spans]
    for body, (start, end) in zip(bodies, spans, strict=True):
        assert body() == DATA[start:end]
        assert body() == DATA[start:end]  # can be asked for again
    assert not other.reads
    assert server.connections <= MOST_CONNECTIONS
    assert {asked.target for asked in server.asked} == {"/a%20b/train/x%20%C3%A9.tar"}
    assert len(server.asked) == 200
    assert all(b'\r\nIf-Match: "one"' in asked.head for asked in server.asked)
    assert all(b"\r\nAccept-Encoding: identity" in asked.head for asked in server.asked)


def test_requests_are_sent_before_anybody_waits(server, other):
    one = requests(server.url, other)
    first = one.begin("x", 0, 10, None)
    first()  # so that there is a connection
    one.begin("x", 10, 20, None)
    until = time.monotonic() + 60
    while len(server.asked) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert [asked.start for asked in server.asked] == [0, 10]


def test_bodies_that_nobody_takes_do_no_harm(server, other):
    one = requests(server.url, other)
    for number in range(MOST_CONNECTIONS * 3):
        one.begin("x", number, number + 5, None)
    assert one.begin("x", 70_000, 70_009, None)() == DATA[70_000:70_009]
    assert not other.reads


def test_large_answers_arrive_while_others_are_waited_for(server, other):
    one = requests(server.url, other)
    bodies = [one.begin("x", number, number + 200_000, None) for number in range(50)]
    assert all(body() == DATA[number : number + 200_000] for number, body in enumerate(bodies))
    assert not other.reads


def test_threads_may_share_them(server, other):
    one = requests(server.url, other)

    def read(number):
        return one.begin("x", number, number + 3000, None)() == DATA[number : number + 3000]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(400)))
    assert not other.reads


@given(st.lists(st.integers(1, 400), max_size=12), st.sampled_from(["", "X-Other: y"]))
def test_an_answer_in_any_pieces_is_the_same(cuts, more):
    with range_server() as running:

        def reply(asked):
            answer = asked.answer(**({"x_other": more} if more else {}))
            pieces, at = [], 0
            for cut in cuts:
                pieces.append(answer[at : at + cut])
                at += cut
            pieces.append(answer[at:])
            for piece in pieces:
                running.sockets[-1].sendall(piece)
            return b""

        running.reply = reply
        other = Other()
        one = requests(running.url, other)
        assert one.begin("x", 1000, 1700, '"one"')() == DATA[1000:1700]
        assert len(running.asked) == 1
        assert not other.reads


# -- everything else goes the other way ----------------------------------------------------------

UNUSUAL = {
    "an error": lambda asked: asked.answer("503 Slow Down", b""),
    "a redirect": lambda asked: asked.answer("307 Moved", b"", location="/elsewhere"),
    "a precondition": lambda asked: asked.answer("412 Precondition Failed", b""),
    "the whole object": lambda asked: asked.answer("200 OK", DATA, content_range=None),
    "another range": lambda asked: asked.answer(content_range="bytes 0-99/262144"),
    "no range": lambda asked: asked.answer(content_range=None),
    "a longer range": lambda asked: asked.answer(body=DATA[asked.start : asked.end + 1]),
    "no length": lambda asked: asked.answer(content_length=None),
    "a wrong length": lambda asked: asked.answer(content_length="99"),
    "another version": lambda asked: asked.answer(etag='"two"'),
    "a version in other case": lambda asked: asked.answer(etag='"ONE"'),
    "no version": lambda asked: asked.answer(etag=None),
    "chunks": lambda asked: asked.answer(transfer_encoding="chunked"),
    "compression": lambda asked: asked.answer(content_encoding="gzip"),
    "more than was asked for": lambda asked: asked.answer() + b"!",
    "a long head": lambda asked: asked.answer(x_long="y" * 5000),
    "an endless head": lambda asked: b"HTTP/1.1 206 OK\r\nX: " + b"y" * 100_000,
    "no HTTP": lambda asked: b"220 smtp ready\r\n\r\n" + b"x" * 5000,
    "old HTTP": lambda asked: asked.answer().replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    "nothing": lambda asked: None,
}


@pytest.mark.parametrize("reply", UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_answer_is_not_taken(server, other, reply):
    one = requests(server.url, other)
    server.reply = reply
    assert one.begin("x", 1000, 1100, '"one"')() == DATA[1000:1100]
    assert other.reads == [("x", 1000, 1100, '"one"')]
    server.reply = lambda asked: asked.answer()
    assert one.begin("x", 2000, 2100, '"one"')() == DATA[2000:2100]
    assert len(other.reads) == 1
    assert server.asked[-1].connection == 1  # the first one was given up


@pytest.mark.parametrize("sent", [0, 5, 100, 400])
def test_a_broken_answer_is_not_taken(server, other, sent):
    one = requests(server.url, other)
    server.reply = lambda asked: asked.answer()[:sent]
    server.closes_after = lambda asked: True
    assert one.begin("x", 1000, 2000, '"one"')() == DATA[1000:2000]
    assert len(other.reads) == 1


@pytest.mark.parametrize("sent", [0, 100, 400])
def test_a_stalled_answer_is_not_waited_for(server, other, sent):
    one = requests(server.url, other, stall_seconds=0.1)
    server.reply = lambda asked: asked.answer()[:sent]
    bodies = [one.begin("x", number, number + 1000, None) for number in range(40)]
    assert all(body() == DATA[number : number + 1000] for number, body in enumerate(bodies))
    assert len(other.reads) == 40


def test_a_trickle_is_not_waited_for(server, other):
    one = requests(server.url, other, stall_seconds=0.2)
    ended = threading.Event()

    def reply(asked):
        for byte in asked.answer():
            if ended.wait(0.02):
                return None
            server.sockets[-1].sendall(bytes([byte]))
        return b""

    server.reply = reply
    assert one.begin("x", 0, 200_000, None)() == DATA[:200_000]
    ended.set()
    assert len(other.reads) == 1


def test_a_server_that_cannot_be_reached_costs_nothing_but_the_other_way(other):
    with range_server() as gone:
        url = gone.url
    one = requests(url, other)
    bodies = [one.begin("x", number, number + 10, None) for number in range(50)]
    assert all(body() == DATA[number : number + 10] for number, body in enumerate(bodies))
    assert len(other.reads) == 50


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "no-such-name.invalid"])
def test_names_that_lead_nowhere(other, host):
    one = requests(f"http://{host}", other)
    assert one.begin("x", 0, 10, None)() == DATA[:10]
    assert len(other.reads) == 1


def test_an_error_of_the_other_way_is_what_is_raised(server):
    def fails(*_):
        raise StorageError("the store is away")

    one = requests(server.url, fails)
    server.reply = UNUSUAL["an error"]
    body = one.begin("x", 0, 10, None)
    with pytest.raises(StorageError, match="away"):
        body()
    with pytest.raises(StorageError, match="away"):
        body()


@pytest.mark.parametrize(
    ("start", "end", "etag"),
    [(0, 0, None), (0, (1 << 20) + 1, None), (0, 10, 'a\r\nX: "'), (0, 10, "é")],
)
def test_what_is_not_asked_for_here(server, other, start, end, etag):
    one = requests(server.url, other)
    one.begin("x", start, end, etag)()
    assert len(other.reads) == 1
    assert not server.asked


def test_a_weak_version_is_compared_but_no_condition(server, other):
    one = requests(server.url, other)
    server.reply = lambda asked: asked.answer(etag='W/"one"')
    assert one.begin("x", 0, 10, 'W/"one"')() == DATA[:10]
    assert not other.reads
    assert b"If-Match" not in server.asked[0].head


# -- connections ---------------------------------------------------------------------------------


def test_connections_that_the_server_ended_are_made_anew(server, other):
    one = requests(server.url, other)
    server.closes_after = lambda asked: True  # without saying so, as after a time of no use
    for number in range(5):
        assert one.begin("x", number, number + 10, None)() == DATA[number : number + 10]
        select.select(list(one._sockets.values()), [], [], 60)  # until its end has arrived
    assert not other.reads
    assert len(server.asked) == 5  # none was sent over a connection that had ended


def test_bytes_that_nobody_asked_for_are_not_the_next_answer(server, other):
    one = requests(server.url, other)
    assert one.begin("x", 0, 10, None)() == DATA[:10]
    late = server.asked[0].answer(body=b"otherbytes")
    server.sockets[0].sendall(late)
    select.select(list(one._sockets.values()), [], [], 60)
    assert one.begin("y", 0, 10, None)() == DATA[:10]
    assert server.asked[-1].connection == 1


def test_connections_that_were_long_unused_are_made_anew(server, other, monkeypatch):
    one = requests(server.url, other)
    for passed in (0, 50, 70):
        real = time.monotonic() + passed
        monkeypatch.setattr("prep.http_connection.time.monotonic", lambda real=real: real)
        assert one.begin("x", 0, 10, None)() == DATA[:10]
    assert [asked.connection for asked in server.asked] == [0, 0, 1]
    assert not other.reads


def test_new_connections_are_used_while_something_else_is_waited_for(server, other):
    """What is waited for has always arrived, so that nothing is done for the others by waiting."""
    one = requests(server.url, other)
    one.begin("x", 0, 10, None)()
    again = one.begin("x", 0, 10, None)
    more = [one.begin("x", number, number + 10, None) for number in range(1, 31)]
    for _ in range(500):
        select.select([again.connection.socket], [], [], 60)
        assert again() == DATA[:10]
        if {asked.start for asked in server.asked} == set(range(31)):
            break
        time.sleep(0.01)
        again = one.begin("x", 0, 10, None)
    else:
        pytest.fail("the others were not asked for")
    assert all(body() == DATA[number : number + 10] for number, body in enumerate(more, 1))
    assert not other.reads


def test_a_server_that_says_that_it_ends_is_believed(server, other):
    one = requests(server.url, other)
    server.reply = lambda asked: asked.answer(connection="close")
    for number in range(5):
        assert one.begin("x", number, number + 10, None)() == DATA[number : number + 10]
    assert server.connections == 5
    assert not other.reads


def test_after_failures_in_a_row_the_server_is_left_alone_for_a_while(server, other, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(range_requests.time, "monotonic", lambda: now[0])
    one = requests(server.url, other)
    server.reply = UNUSUAL["an error"]
    for number in range(10):
        one.begin("x", number, number + 10, None)()
    assert len(server.asked) == 3
    now[0] += 1.5
    for number in range(10):
        one.begin("x", number, number + 10, None)()
    assert len(server.asked) == 6
    now[0] += 1.5  # the second pause is longer
    one.begin("x", 0, 10, None)()
    assert len(server.asked) == 6
    now[0] += 4
    server.reply = lambda asked: asked.answer()
    for number in range(10):
        assert one.begin("x", number, number + 10, None)() == DATA[number : number + 10]
    assert len(server.asked) == 16
    assert len(other.reads) == 21


def test_a_server_that_never_answers_directly_is_left_alone_for_days(other, monkeypatch):
    """As where signatures in addresses are forbidden: the other way reads all of a long run."""
    now = [1000.0]
    monkeypatch.setattr(range_requests.time, "monotonic", lambda: now[0])
    one = requests("http://127.0.0.1:9", other)
    monkeypatch.setattr(one, "_fall_back", lambda body: None)
    for _ in range(3 * 600):
        one._failed(RangeBody(one, "x", 0, 10, None))
        assert one._paused_until <= now[0] + 300
        now[0] = max(now[0], one._paused_until)
    assert now[0] > 40 * 3600


def test_what_fails_together_counts_once(server, other, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(range_requests.time, "monotonic", lambda: now[0])
    one = requests(server.url, other)
    server.reply = UNUSUAL["an error"]
    for body in [one.begin("x", number, number + 10, None) for number in range(32)]:
        body()
    assert len(other.reads) == 32
    server.reply = lambda asked: asked.answer()
    now[0] += 1.5  # a second's pause, not one for every three of them
    assert one.begin("x", 0, 10, None)() == DATA[:10]
    assert len(other.reads) == 32


def test_what_failed_is_read_side_by_side(server):
    together = threading.Barrier(7)

    def read(path, start, end, etag):
        if start:
            together.wait(60)
        return memoryview(DATA)[start:end]

    one = requests(server.url, read)
    server.reply = UNUSUAL["a redirect"]
    bodies = [one.begin("x", number, number + 10, None) for number in range(8)]
    assert bodies[0]() == DATA[:10]
    for body in bodies[1:]:  # all answers have arrived
        if body.connection is not None:
            while not body.connection.is_ready:
                one._step(1)
            select.select([body.connection.socket], [], [], 60)
    assert all(body() == DATA[number : number + 10] for number, body in enumerate(bodies))


def test_no_thread_can_be_started(server, other, monkeypatch):
    def none(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(range_requests.ThreadPoolExecutor, "submit", none)
    one = requests(server.url, other)
    server.reply = UNUSUAL["an error"]
    assert one.begin("x", 0, 10, None)() == DATA[:10]


def test_what_nobody_wants_any_more_is_not_asked_for(server, other):
    one = requests(server.url, other)
    server.reply = lambda asked: asked.answer()
    dropped = [one.begin("x", number, number + 5, None) for number in range(200)]
    del dropped
    gc.collect()
    assert one.begin("x", 70_000, 70_009, None)() == DATA[70_000:70_009]
    assert len(server.asked) <= MOST_CONNECTIONS + 1


@pytest.mark.parametrize(
    ("family", "address"),
    [(2, ("127.0.0.1", 9)), (2, ("255.255.255.255", 9)), (99, ("127.0.0.1", 9))],
)
def test_addresses_that_fail_are_left_out(server, other, monkeypatch, family, address):
    """Whether they refuse, may not be connected to, or are of a kind that this machine lacks."""
    real = range_requests.socket.getaddrinfo

    def two(host, port, **more):
        found = real(host, port, **more)
        bad = (family, *found[0][1:4], address)
        return [bad, *found, bad]

    monkeypatch.setattr(range_requests.socket, "getaddrinfo", two)
    one = requests(server.url, other, connect_seconds=0.3)
    bodies = [one.begin("x", number, number + 10, None) for number in range(32)]
    assert all(body() == DATA[number : number + 10] for number, body in enumerate(bodies))
    assert not other.reads


def test_another_address_of_the_name_is_tried(server, other, monkeypatch):
    real = range_requests.socket.getaddrinfo

    def two(host, port, **more):
        found = real(host, port, **more)
        return [(*found[0][:4], ("127.0.0.1", 9)), *found, (*found[0][:4], ("127.0.0.1", 9))]

    monkeypatch.setattr(range_requests.socket, "getaddrinfo", two)
    one = requests(server.url, other)
    for number in range(5):
        assert one.begin("x", number, number + 10, None)() == DATA[number : number + 10]
    assert not other.reads


def test_sockets_are_closed_with_what_holds_them(server, other):
    one = requests(server.url, other)
    one.begin("x", 0, 10, None)()
    one.begin("x", 0, 10, None)
    sockets = list(one._sockets.values())
    assert sockets
    del one
    gc.collect()
    assert all(socket.fileno() == -1 for socket in sockets)


# -- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def tls_server(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with range_server(context) as running:
        yield running


def test_tls_servers_that_the_system_trusts(tls_server, authority, other, tmp_path, monkeypatch):
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    one = requests(tls_server.url, other)
    bodies = [one.begin("x", number, number + 40_000, '"one"') for number in range(80)]
    assert all(body() == DATA[number : number + 40_000] for number, body in enumerate(bodies))
    assert not other.reads
    assert tls_server.connections <= MOST_CONNECTIONS


def test_tls_servers_that_nobody_trusts_get_no_request(tls_server, other):
    one = requests(tls_server.url, other)
    assert one.begin("x", 0, 10, None)() == DATA[:10]
    assert len(other.reads) == 1
    assert not tls_server.asked


def test_tls_servers_of_another_name_get_no_request(authority, other, tmp_path, monkeypatch):
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("other.example").configure_cert(context)
    with range_server(context) as running:
        one = requests(running.url, other)
        assert one.begin("x", 0, 10, None)() == DATA[:10]
        assert len(other.reads) == 1
        assert not running.asked


# -- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a/b", "http:///b", "http://user:secret@a/b", "http://a/b c", "http://a/\r\nX: y",
        "http://a/é", "http://é/b", "http://a b/c", "file:///etc/passwd", "http://a:99999/b", "http://[::1/b",
    ],
)  # fmt: skip
def test_addresses_that_are_not_plain(url):
    assert parse_url(url) is None


def test_ports_and_hosts():
    plain, tls = parse_url("http://a/b"), parse_url("https://a:8443/b?c=d%20e")
    assert (plain.origin.host, plain.origin.port, plain.origin.tls) == ("a", 80, False)
    assert (tls.origin.host, tls.origin.port, tls.origin.tls) == ("a", 8443, True)
    assert tls.head.startswith(b"GET /b?c=d%20e HTTP/1.1\r\nHost: a:8443\r\n")


def test_a_proxy_is_the_clients_business(server, other, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    one = requests(server.url, other)
    one.begin("x", 0, 10, None)()
    assert len(other.reads) == 1
    assert not server.asked
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    requests(server.url, other).begin("x", 0, 10, None)()
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"client_options": {"proxy_url": "http://a"}},
        {"client_options": {"user_agent": "mine"}},
        {"client_options": {"allow_invalid_certificates": True}},
        {"sse_customer_key_base64": "x"},
        {"request_payer": True},
    ],
)
def test_what_a_plain_request_would_not_do_is_the_clients_business(options):
    assert ObjectUrls("s3://bucket/a", options, never).get("x") is None


def test_no_descriptor_left_is_named_with_the_root(monkeypatch):
    def refused() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("prep.range_requests.selectors.DefaultSelector", refused)
    with pytest.raises(StorageError, match=r"http://a/x .*Too many open files; mend that"):
        Storage("http://a").begin_range("x", 0, 10)


def test_stores_that_were_not_tried_are_the_clients_business():
    assert ObjectUrls("gs://bucket/a", {}, never).get("x") is None


def test_unsigned_buckets_have_addresses_without_a_signature():
    options = {"skip_signature": True, "endpoint": "http://127.0.0.1:9", "region": "us-east-1",
               "virtual_hosted_style_request": False}  # fmt: skip
    url = ObjectUrls("s3://bucket/a b", options, never).get("train/x.tar")
    assert url.head.startswith(b"GET /bucket/a%20b/train/x.tar HTTP/1.1\r\n")


def test_addresses_are_made_anew_in_time(monkeypatch):
    now, made = [0.0], []
    monkeypatch.setattr("prep.object_urls.time.monotonic", lambda: now[0])
    urls = ObjectUrls("http://a", {}, never)
    monkeypatch.setattr(urls, "_make", lambda path: made.append(path) or parse_url("http://a/b"))
    for passed in (0, 1700, 200, 10):
        now[0] += passed
        urls.get("x")
    assert made == ["x", "x"]
    urls.forget()
    urls.get("x")
    assert made == ["x", "x", "x"]


def test_an_address_that_could_not_be_made_is_tried_again_soon(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("prep.object_urls.time.monotonic", lambda: now[0])
    urls = ObjectUrls("http://a", {}, never)
    monkeypatch.setattr(urls, "_make", lambda path: None)
    assert urls.get("x") is None
    monkeypatch.setattr(urls, "_make", lambda path: parse_url("http://a/b"))
    assert urls.get("x") is None
    now[0] += 11
    assert urls.get("x") is not None


@pytest.mark.parametrize("root", ["https://h/c?sig=1", "https://h/c#d"])
def test_roots_that_are_more_than_a_path_are_the_clients_business(root):
    assert ObjectUrls(root, {}, never).get("x") is None


@pytest.mark.parametrize("status", ["403 Forbidden", "401 Unauthorized", "400 Bad Request"])
def test_a_refused_signature_is_made_anew(server, other, status, monkeypatch):
    urls = ObjectUrls(server.url, {}, never)
    numbers = iter(range(10))
    monkeypatch.setattr(
        urls, "_make", lambda path: parse_url(f"{server.url}/{path}?signature={next(numbers)}")
    )
    one = RangeRequests(urls, other)
    server.reply = lambda asked: asked.answer(
        *((status, b"") if asked.target.endswith("0") else ())
    )
    assert one.begin("x", 0, 10, None)() == DATA[:10]
    assert one.begin("x", 10, 20, None)() == DATA[10:20]
    assert [asked.target for asked in server.asked] == ["/x?signature=0", "/x?signature=1"]
    assert len(other.reads) == 1


# -- heads ---------------------------------------------------------------------------------------


def head(body, length=None):
    size = body.end - body.start if length is None else length
    return (
        f"HTTP/1.1 206 Partial Content\r\nContent-Length: {size}\r\n"
        f"Content-Range: bytes {body.start}-{body.end - 1}/999\r\n"
    ).encode()


@given(st.binary(max_size=300), st.integers(0, 10**12), st.integers(1, 10**6))
def test_no_noise_is_taken_for_a_head(noise, start, size):
    body = RangeBody(None, "x", start, start + size, None)
    assert not check_head(head(body), body)
    with pytest.raises(UnusualAnswerError):
        check_head(noise, body)
    with pytest.raises(UnusualAnswerError):
        check_head(head(body, size + 1) + noise, body)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("400ms", 0.4),
        ("1m 30s", 90),
        ("2min", 120),
        ("2 minutes", 120),
        ("60secs", 60),
        ("", 0),
        ("soon", 0),
    ],
)
def test_durations(text, seconds):
    assert seconds_of(text) == pytest.approx(seconds)


# -- storages ------------------------------------------------------------------------------------


@pytest.fixture
def url(s3):
    obstore.put(s3.store("ranges"), "a b/x.tar", DATA)
    return "s3://kprep/ranges"


def test_signed_addresses_serve_a_real_store(s3, url, monkeypatch):
    one = Storage(url, s3.options)
    etag = one.info("a b/x.tar").etag
    monkeypatch.setattr(Storage, "read_range", lambda *a, **k: pytest.fail("the other way"))
    bodies = [one.begin_range("a b/x.tar", n, n + 500, etag=etag) for n in range(100)]
    assert all(body() == DATA[n : n + 500] for n, body in enumerate(bodies))


def test_a_replaced_object_is_named(s3, url):
    one = Storage(url, s3.options)
    etag = one.info("a b/x.tar").etag
    obstore.put(s3.store("ranges"), "a b/x.tar", DATA[::-1])
    with pytest.raises(ReplacedError, match="ranges/a b/x.tar was replaced"):
        one.begin_range("a b/x.tar", 0, 10, etag=etag)()


def test_wrong_credentials_are_named_as_ever(s3, url):
    one = Storage(url, {**s3.options, "secret_access_key": "wrong"})
    with pytest.raises(StorageError, match="x.tar cannot be reached"):
        one.begin_range("a b/x.tar", 0, 10)()


def test_paths_stay_inside(s3, url):
    with pytest.raises(StorageError, match="refused"):
        Storage(url, s3.options).begin_range("../x.tar", 0, 10)


def test_a_local_root_is_read_when_the_bytes_are_needed(tmp_path):
    (tmp_path / "x").write_bytes(DATA)
    one = Storage(str(tmp_path))
    body = one.begin_range("x", 5, 50)
    absent = one.begin_range("y", 5, 50)
    assert body() == DATA[5:50]
    (tmp_path / "x").unlink()
    assert body() == DATA[5:50]
    with pytest.raises(StorageError, match="does not exist"):
        absent()


def test_another_process_begins_anew(s3, url):
    one = Storage(url, s3.options)
    assert one.begin_range("a b/x.tar", 0, 10)() == DATA[:10]
    other = pickle.loads(pickle.dumps(one))  # noqa: S301 - made in this line
    assert other.begin_range("a b/x.tar", 5, 9)() == DATA[5:9]


def _in_a_fork(one, begun, sender):
    for ask in (lambda: one.begin_range("x", 0, 10), begun):
        try:
            ask()
        except StorageError as error:
            sender.send(str(error))


def test_a_fork_after_requests_is_an_error(server):
    one = Storage(server.url)
    assert one.begin_range("x", 0, 10)() == DATA[:10]
    begun = one.begin_range("x", 20, 30)
    receiver, sender = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=_in_a_fork, args=(one, begun, sender)
    )
    child.start()
    for _ in range(2):
        assert receiver.poll(60)
        assert "before this process was forked" in receiver.recv()
    child.join()
    assert begun() == DATA[20:30]
    assert one.begin_range("x", 10, 20)() == DATA[10:20]
