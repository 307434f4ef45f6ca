"""The HTTP client against a local server that fails in every way that servers fail."""

from __future__ import annotations

import email.utils
import shutil
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from conftest import without
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mirror_server import FakeTime, Fault, Mirror, mirror

from prep.errors import UsageError
from prep.fetch_errors import CircuitOpenError, FetchError, ObjectChangedError, StoppedError
from prep.http_client import HttpClient, _content_range, _redirected
from prep.politeness import Politeness, Timing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = bytes(range(256)) * 1200  # 307,200 bytes: longer than one read
FAST = 1e9  # requests a second: no pauses but those a test is about
HALF = 0.75  # what FakeTime's chance of one half makes of a pause


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[Mirror]:
    with mirror() as held:
        yield held


@pytest.fixture
def clock() -> FakeTime:
    return FakeTime()


def client_of(clock: FakeTime, **options: Any) -> HttpClient:
    values = {"requests_per_second": FAST, "read_seconds": 20.0, **options}
    return HttpClient(Politeness(**values), timing=clock.timing())


def read_all(client: HttpClient, url: str, size: int = 1 << 16) -> bytes:
    with client.open_stream(url) as body:
        parts = []
        while data := body.read(size):
            assert len(data) <= size
            parts.append(data)
    return b"".join(parts)


def test_one_request_brings_a_file(server: Mirror, clock: FakeTime) -> None:
    url = server.put("a.bin", DATA)
    with client_of(clock, user_agent="kprep test") as client:
        assert read_all(client, url, 1000) == DATA
        assert client.bytes_received == len(DATA)
    [request] = server.requests
    assert request.headers["User-Agent"] == "kprep test"
    assert request.headers["Accept-Encoding"] == "identity"
    assert "Range" not in request.headers
    assert clock.slept == 0


def test_a_file_of_no_bytes_is_read_as_one(server: Mirror, clock: FakeTime) -> None:
    with client_of(clock) as client:
        assert client.get_bytes(server.put("empty", b""), 10) == b""


def test_stored_content_encoding_is_left_alone(server: Mirror, clock: FakeTime) -> None:
    server.extra_headers = {"Content-Encoding": "gzip"}
    with client_of(clock) as client:
        assert client.get_bytes(server.put("a.tgz", b"\x1f\x8b raw"), 100) == b"\x1f\x8b raw"


@pytest.mark.parametrize("status", [401, 403, 404, 410, 451])
def test_what_is_not_there_is_asked_for_once(server: Mirror, clock: FakeTime, status: int) -> None:
    url = server.put("a.bin", DATA, Fault(status))
    with client_of(clock) as client, pytest.raises(FetchError, match=f"HTTP {status}") as caught:
        client.open_stream(url)
    assert caught.value.reason == "missing upstream"
    assert not caught.value.retryable
    assert len(server.requests) == 1
    assert clock.slept == 0


def test_retry_after_in_seconds_is_honoured(server: Mirror, clock: FakeTime) -> None:
    url = server.put("a.bin", DATA, Fault(429, {"Retry-After": "7"}))
    with client_of(clock) as client:
        assert client.get_bytes(url, len(DATA)) == DATA
    assert clock.slept == 7
    assert len(server.requests) == 2


@pytest.mark.parametrize(("ahead", "slept"), [(30, 30), (86_400, 120), (-50, 1 * HALF)])
def test_retry_after_as_a_date_is_honoured_up_to_a_cap(
    server: Mirror, clock: FakeTime, ahead: int, slept: float
) -> None:
    when = email.utils.formatdate(clock.timing().wall() + ahead, usegmt=True)
    url = server.put("a.bin", DATA, Fault(503, {"Retry-After": when}))
    with client_of(clock, longest_pause_seconds=120) as client:
        client.get_bytes(url, len(DATA))
    assert clock.slept == slept


@given(st.text(max_size=40) | st.integers().map(str) | st.datetimes().map(str))
def test_any_retry_after_is_a_pause_within_the_cap(text: str) -> None:
    client = HttpClient(Politeness(longest_pause_seconds=60), timing=FakeTime().timing())
    assert 0 <= client._retry_after({"Retry-After": text}) <= 60


def test_pauses_double_and_are_capped(server: Mirror, clock: FakeTime) -> None:
    url = server.put("a.bin", DATA, *[Fault(503)] * 5)
    with client_of(clock, first_pause_seconds=1, longest_pause_seconds=4) as client:
        assert client.get_bytes(url, len(DATA)) == DATA
    assert clock.slept == HALF * (1 + 2 + 4 + 4 + 4)
    assert max(clock.naps) <= 0.5  # a pause is slept in slices, so that `stop` ends it


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(429), "rate-limited"),
        (Fault(503, {"Retry-After": "1"}), "rate-limited"),
        (Fault(503), "network"),
        (Fault(500), "network"),
    ],
)
def test_after_all_attempts_the_reason_is_told(
    server: Mirror, clock: FakeTime, fault: Fault, reason: str
) -> None:
    url = server.put("a.bin", DATA, *[fault] * 9)
    with client_of(clock, attempts=3) as client, pytest.raises(FetchError, match="3 attempts") as e:
        client.open_stream(url)
    assert e.value.reason == reason
    assert e.value.retryable
    assert len(server.requests) == 3


def test_no_server_is_a_network_failure(clock: FakeTime) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with client_of(clock, attempts=2) as client, pytest.raises(FetchError, match="refused") as e:
        client.open_stream(f"http://127.0.0.1:{port}/x")
    assert e.value.reason == "network"
    assert "0x" not in str(e.value)  # no addresses of objects in messages


def test_the_circuit_opens_lets_one_trial_through_and_closes(
    server: Mirror, clock: FakeTime
) -> None:
    url = server.put("a.bin", DATA, *[Fault(503)] * 4)
    with client_of(clock, circuit_failures=3, circuit_seconds=300, attempts=10) as client:
        with pytest.raises(CircuitOpenError, match=r"3 failures in a row: left alone for 300 s"):
            client.open_stream(url)
        with pytest.raises(CircuitOpenError):
            client.open_stream(url)
        assert len(server.requests) == 3  # the second call made none
        client.wait_for_circuit()
        with pytest.raises(CircuitOpenError):  # the fourth 503: one trial, open again
            client.open_stream(url)
        assert len(server.requests) == 4
        client.wait_for_circuit()
        assert client.get_bytes(url, len(DATA)) == DATA
        server.faults["/kinetics/a.bin"] = [Fault(503)] * 2
        assert client.get_bytes(url, len(DATA)) == DATA  # closed: two failures are borne again


def test_an_absent_file_does_not_open_the_circuit(server: Mirror, clock: FakeTime) -> None:
    with client_of(clock, circuit_failures=2) as client:
        for _ in range(5):
            with pytest.raises(FetchError) as caught:
                client.open_stream(f"{server.base}/nothing")
            assert not isinstance(caught.value, CircuitOpenError)


def test_requests_keep_their_distance(server: Mirror, clock: FakeTime) -> None:
    url = server.put("a.bin", b"x")
    with client_of(clock, requests_per_second=2) as client:
        for _ in range(3):
            client.get_bytes(url, 10)
    assert clock.slept == 1.0  # the first at once, then two halves of a second


def test_stop_ends_a_pause(server: Mirror, clock: FakeTime) -> None:
    url = server.put("a.bin", DATA, Fault(429, {"Retry-After": "100"}))
    timing = clock.timing()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        client.stop()

    stopping = Timing(timing.monotonic, timing.wall, sleep, timing.random)
    client = HttpClient(Politeness(requests_per_second=FAST), timing=stopping)
    with client, pytest.raises(StoppedError):
        client.open_stream(url)
    assert clock.slept == 0.5


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("ends", ["close", "reset", "stall"])
def test_a_broken_body_goes_on(server: Mirror, clock: FakeTime, ends: str, ranges: bool) -> None:
    server.ranges = ranges
    url = server.put(
        "a.bin", DATA, Fault(after=100_000, ends=ends), Fault(after=150_000, ends=ends)
    )
    with client_of(clock, read_seconds=0.5) as client:
        assert read_all(client, url) == DATA
    first, second, third = server.requests
    assert "Range" not in first.headers
    if ends != "reset":
        assert second.headers["Range"] == "bytes=100000-"
    assert second.headers["If-Range"].startswith('"')
    start = int(third.headers["Range"].removeprefix("bytes=").rstrip("-"))
    whole = 250_000 if ranges else 150_000
    # a reset may overtake bytes that were sent before it
    assert 0 < start <= whole if ends == "reset" else start == whole


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Mirror]:
    with mirror() as held:
        yield held


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(min_size=1, max_size=5000),
    breaks=st.lists(
        st.tuples(st.integers(0, 5000), st.sampled_from(["close", "reset"])), max_size=5
    ),
    ranges=st.booleans(),
    etags=st.booleans(),
    size=st.integers(1, 6000),
)
def test_whatever_breaks_the_bytes_are_the_same(
    shared_server: Mirror,
    data: bytes,
    breaks: list[tuple[int, str]],
    ranges: bool,
    etags: bool,
    size: int,
) -> None:
    shared_server.ranges, shared_server.etags = ranges, etags
    url = shared_server.put("p", data, *(Fault(after=n, ends=how) for n, how in breaks))
    clock = FakeTime()
    with client_of(clock, attempts=20, circuit_failures=20) as client:
        assert read_all(client, url, size) == data


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("etags", [True, False])
def test_a_replaced_file_is_an_error(
    server: Mirror, clock: FakeTime, ranges: bool, etags: bool
) -> None:
    server.ranges, server.etags = ranges, etags
    url = server.put("a.bin", DATA, Fault(after=100_000, ends="close"))
    with client_of(clock) as client, client.open_stream(url) as body:
        assert len(body.read()) > 0
        changed = DATA + b"more" if ranges and not etags else b"\xff" + DATA[1:]
        server.files["/kinetics/a.bin"] = changed
        with pytest.raises(ObjectChangedError, match="was replaced while it was being read"):
            while body.read():
                pass


def test_a_replaced_file_is_noticed_where_the_server_ignores_if_range(
    server: Mirror, clock: FakeTime
) -> None:
    server.if_range = False
    url = server.put("a.bin", DATA, Fault(after=100_000, ends="close"))
    with client_of(clock) as client, client.open_stream(url) as body:
        body.read()
        server.files["/kinetics/a.bin"] = b"\xff" + DATA[1:]  # as long as before
        with pytest.raises(ObjectChangedError, match="ETag was"):
            while body.read():
                pass


def test_a_server_that_sends_less_than_asked_for_is_asked_again(
    server: Mirror, clock: FakeTime
) -> None:
    server.most_range_bytes = 100_000
    url = server.put("a.bin", DATA, Fault(after=100_000, ends="close"))
    with client_of(clock) as client:
        assert read_all(client, url) == DATA
    starts = [request.headers.get("Range") for request in server.requests]
    assert starts == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_a_file_that_got_shorter_is_an_error(server: Mirror, clock: FakeTime) -> None:
    server.etags = False
    url = server.put("a.bin", DATA, Fault(after=100_000, ends="close"))
    with client_of(clock) as client, client.open_stream(url) as body:
        body.read()
        server.files["/kinetics/a.bin"] = DATA[:1000]
        with pytest.raises(ObjectChangedError, match="no byte 100,000 any more"):
            while body.read():
                pass


@pytest.mark.parametrize("ranges", [True, False])
def test_a_length_that_promises_too_much_is_an_error(
    server: Mirror, clock: FakeTime, ranges: bool
) -> None:
    server.ranges = ranges
    url = server.put("a.bin", DATA)
    server.claimed_bytes["/kinetics/a.bin"] = len(DATA) + 10
    with client_of(clock, attempts=3) as client, pytest.raises(FetchError) as caught:
        read_all(client, url)
    assert caught.value.retryable


def test_breaks_without_progress_come_to_an_end(server: Mirror, clock: FakeTime) -> None:
    url = server.put("a.bin", DATA, *[Fault(after=10, ends="close")] * 50)
    with (
        client_of(clock, attempts=4) as client,
        pytest.raises(FetchError, match=r"broke at byte 40 of 307,200: .*4 breaks") as caught,
    ):
        read_all(client, url)
    assert caught.value.reason == "network"


def test_breaks_with_progress_do_not(server: Mirror, clock: FakeTime) -> None:
    url = server.put("a.bin", DATA, *[Fault(after=70_000, ends="close")] * 4)
    with client_of(clock, attempts=2) as client:
        assert read_all(client, url) == DATA  # four breaks, each after more than 64 KiB


def test_a_long_answer_to_a_small_question_is_refused(server: Mirror, clock: FakeTime) -> None:
    url = server.put("list.txt", DATA)
    with client_of(clock) as client:
        assert client.get_bytes(url, len(DATA)) == DATA
        with pytest.raises(FetchError, match="longer than 307,199 bytes"):
            client.get_bytes(url, len(DATA) - 1)


def test_size_comes_from_head(server: Mirror, clock: FakeTime) -> None:
    url = server.put("a.bin", DATA)
    with client_of(clock) as client:
        assert client.size(url) == len(DATA)
        assert {request.method for request in server.requests} == {"HEAD"}
        with pytest.raises(FetchError):
            client.size(f"{server.base}/nothing")
        server.head = False
        assert client.size(url) is None


def test_redirects_are_followed_but_not_for_ever(server: Mirror, clock: FakeTime) -> None:
    target = server.put("a.bin", DATA)
    url = server.put("b.bin", b"", Fault(302, {"Location": "/kinetics/a.bin"}))
    loop = server.put("c.bin", b"", *[Fault(301, {"Location": "c.bin"})] * 20)
    with client_of(clock) as client:
        assert client.get_bytes(url, len(DATA)) == DATA
        with pytest.raises(FetchError, match="more than 5 times"):
            client.get_bytes(loop, 10)
    assert target.endswith("a.bin")


@pytest.mark.parametrize("location", ["", "file:///etc/passwd", "http://example.org/x", "ftp://x"])
def test_redirects_that_lead_astray_are_refused(location: str) -> None:
    with pytest.raises(FetchError, match="redirects to"):
        _redirected("https://example.org/a", location)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "s3://bucket/x", "no address", "https://"])
def test_only_web_addresses_are_fetched(clock: FakeTime, url: str) -> None:
    with client_of(clock) as client, pytest.raises(UsageError, match="https://"):
        client.get_bytes(url, 10)


def test_a_proxy_from_the_environment_is_used(
    server: Mirror, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("a.bin", DATA)
    monkeypatch.setenv("http_proxy", server.base.removesuffix("/kinetics"))
    with client_of(clock) as client:
        assert client.get_bytes("http://mirror.invalid/kinetics/a.bin", len(DATA)) == DATA
        monkeypatch.setenv("no_proxy", "mirror.invalid")
        with pytest.raises(FetchError):
            client_of(clock, attempts=1).get_bytes("http://mirror.invalid/kinetics/a.bin", 10)


def test_a_certificate_that_nobody_signed_is_refused(clock: FakeTime, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        without("openssl, which makes the certificate, is not on this machine")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with mirror(context) as server, client_of(clock) as client:
        url = server.put("a.bin", DATA)
        with pytest.raises(FetchError, match="certificate is refused"):
            client.get_bytes(url, len(DATA))
        assert server.requests == []  # nothing was said before the certificate was checked
    assert clock.slept == 0  # and nothing is gained by asking again


@given(st.text(max_size=30) | st.from_regex(r"bytes [0-9]{1,4}-[0-9]{1,4}/([0-9]{1,4}|\*)"))
def test_any_content_range_is_read_or_not_known(text: str) -> None:
    first, total = _content_range({"Content-Range": text})
    assert first is None or first >= 0
    assert total is None or total >= 0


def test_content_range_by_example() -> None:
    assert _content_range({"Content-Range": "bytes 5-9/10"}) == (5, 10)
    assert _content_range({"Content-Range": "bytes 5-9/*"}) == (5, None)
    assert _content_range({"Content-Range": "bytes */10"}) == (None, 10)
