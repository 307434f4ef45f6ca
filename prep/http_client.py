"""Polite HTTP: one client for each source, with a rate limit, back-off and a circuit breaker.

    HttpClient.open_stream ─► ResumableBody.read   a body that goes on where its connection broke
    HttpClient.get_bytes                           a small object in memory, of a limited size
    HttpClient.size                                what HEAD says

Every failure is a FetchError with a reason from a short list:

    network             it may work later: no connection, reset, stall, 5xx, a changed object
    rate-limited        it may work later: 429, or 503 with Retry-After
    missing upstream    the server says that the object is not there or not for us

Certificates are always verified, and a redirect never leads from https to http. Proxies come from
the usual environment variables.
"""

from __future__ import annotations

import contextlib
import email.utils
import ssl
import threading
import urllib.parse
import urllib.request
import zlib
from typing import TYPE_CHECKING, Any, Self

import urllib3
from urllib3.exceptions import HTTPError, LocationValueError

from prep.downloads import growing_wait
from prep.errors import UsageError
from prep.fetch_errors import (
    CircuitOpenError,
    FetchError,
    ObjectChangedError,
)
from prep.outcome import Reason
from prep.politeness import CircuitBreaker, Politeness, Timing, Turns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from urllib3.response import BaseHTTPResponse

_BLOCK_BYTES = 1 << 16
_ABSENT = (401, 403, 404, 410, 451)  # S3 says 403 for a missing object where listing is not allowed
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5


class _ConnectionBrokenError(Exception):
    """One attempt failed in a way that another attempt may not."""


class HttpClient:
    """One source's HTTP client. Safe to use from several threads; not across a fork."""

    def __init__(
        self, politeness: Politeness | None = None, *, timing: Timing | None = None
    ) -> None:
        self.politeness = ask = politeness or Politeness()
        self.timing = timing or Timing()
        self.bytes_received = 0
        self._breaker = CircuitBreaker(
            ask.circuit_failures, ask.circuit_seconds, self.timing.monotonic
        )
        self._headers = {"User-Agent": ask.user_agent, "Accept-Encoding": "identity"}
        self._pools: dict[str, urllib3.PoolManager] = {}
        self.turns = Turns(self.timing)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Return the client; leaving the block closes its connections."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections that are kept for reuse."""
        for pool in self._pools.values():
            pool.clear()

    def stop(self) -> None:
        """Make every pause and request end soon with StoppedError; safe in a signal handler."""
        self.turns.stop()

    def get_bytes(self, url: str, max_bytes: int) -> bytes:
        """Return a whole object; FetchError when it is longer than `max_bytes`."""
        parts, length = [], 0
        with self.open_stream(url) as body:
            while data := body.read(_BLOCK_BYTES):
                length += len(data)
                if length > max_bytes:
                    raise FetchError(Reason.NETWORK, f"{url} is longer than {max_bytes:,} bytes")
                parts.append(data)
        return b"".join(parts)

    def open_stream(self, url: str) -> ResumableBody:
        """Ask for an object; its body is read as it comes, and goes on after a break."""
        return ResumableBody(self, url)

    def size(self, url: str) -> int | None:
        """Return the length that HEAD gives, or None where the server does not say."""
        response = self.request("HEAD", url, {})
        response.close()
        return _length(response.headers) if response.status == 200 else None

    def wait_for_circuit(self) -> None:
        """Return when the next request may be made after a CircuitOpenError."""
        self.turns.pause(self._breaker.seconds_left)

    def request(self, method: str, url: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """Return an answer that is not an error of ours to handle: 2xx, 405, 416 or 501.

        Raises FetchError when the object is absent, or when no attempt succeeded.
        """
        failures = 0
        while True:
            self._admit(url)
            try:
                response = self._attempt(method, url, headers)
            except _ConnectionBrokenError as error:
                reason, detail, asked = Reason.NETWORK, f"{url}: {error}", 0.0
            else:
                if response.status not in _BUSY:
                    return self._settled(url, response)
                reason, detail = _busy_reason(response), f"{url}: HTTP {response.status}"
                asked = self._retry_after(response.headers)
                response.close()
            failures += 1
            if self._breaker.failed():
                raise CircuitOpenError(reason, self._open_message(detail))
            if failures >= self.politeness.attempts:
                raise FetchError(reason, f"{detail}; given up after {failures} attempts")
            self.turns.pause(max(asked, self.back_off(failures)))

    def back_off(self, failures: int) -> float:
        """Return the pause after the n-th failure: doubling, capped, with up to half of jitter."""
        first, longest = self.politeness.first_pause_seconds, self.politeness.longest_pause_seconds
        seconds = growing_wait(first, longest, failures)
        return seconds * (1 - self.timing.random() / 2)

    def _admit(self, url: str) -> None:
        """Wait for this source's turn; raise CircuitOpenError while the circuit is open."""
        self.turns.check_stopped()
        if not self._breaker.admit():
            raise CircuitOpenError(Reason.NETWORK, self._open_message(url))
        self.turns.wait(1.0 / self.politeness.requests_per_second)

    def _open_message(self, detail: str) -> str:
        return (
            f"{detail}; {self.politeness.circuit_failures} failures in a row: "
            f"left alone for {self._breaker.seconds_left:.0f} s"
        )

    def _attempt(self, method: str, url: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """Ask once and follow redirects."""
        target, headers = url, {**self._headers, **headers}
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                response = self._pool(target).request(
                    method, target, headers=headers, preload_content=False, redirect=False,
                    decode_content=False,
                )  # fmt: skip
            except LocationValueError as error:
                raise UsageError(f"{target} is no address: {error}") from error
            except (HTTPError, OSError) as error:
                raise self._broken(target, error) from error
            if response.status not in _REDIRECTS:
                return response
            response.close()
            target = _redirected(target, response.headers.get("Location", ""))
        raise FetchError(Reason.NETWORK, f"{url} redirects more than {_MOST_REDIRECTS} times")

    def _broken(self, url: str, error: Exception) -> Exception:
        cause = error.args[0] if error.args else None
        if isinstance(cause, ssl.SSLCertVerificationError):
            return FetchError(
                Reason.NETWORK, f"{url}: its certificate is refused: {cause.verify_message}"
            )
        return _ConnectionBrokenError(brief(error))

    def _settled(self, url: str, response: BaseHTTPResponse) -> BaseHTTPResponse:
        self._breaker.succeeded()  # whatever it says, the server answers
        if response.status in (200, 206, 405, 416, 501):
            return response
        response.close()
        if response.status in _ABSENT:
            raise FetchError(Reason.MISSING_UPSTREAM, f"{url}: HTTP {response.status}")
        raise FetchError(Reason.NETWORK, f"{url}: unexpected HTTP {response.status}")

    def _retry_after(self, headers: Mapping[str, str]) -> float:
        """Return the seconds that Retry-After asks for (RFC 9110, 10.2.3), at most the cap."""
        text = headers.get("Retry-After", "").strip()
        seconds = 0.0
        if text.isascii() and text.isdigit():
            seconds = float(text[:9])
        elif text:
            with contextlib.suppress(ValueError, OverflowError):
                when = email.utils.parsedate_to_datetime(text)
                seconds = when.timestamp() - self.timing.wall()
        return min(max(seconds, 0.0), self.politeness.longest_pause_seconds)

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Return the connections for an address: direct, or through the proxy it should take."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url} must begin with https:// or http:// and name a host")
        proxy = urllib.request.getproxies().get(parts.scheme, "")
        if proxy and urllib.request.proxy_bypass(parts.hostname):
            proxy = ""
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = self._open_pool(proxy)
            return self._pools[proxy]

    def _open_pool(self, proxy: str) -> urllib3.PoolManager:
        ask = self.politeness
        timeout = urllib3.Timeout(connect=ask.connect_seconds, read=ask.read_seconds)
        options: dict[str, Any] = {"timeout": timeout, "cert_reqs": "CERT_REQUIRED"}
        if proxy:
            return urllib3.ProxyManager(proxy, retries=False, **options)
        return urllib3.PoolManager(retries=False, **options)


class ResumableBody:
    """The body of an object, read once from beginning to end over as many connections as it takes.

    After a break it asks for the rest with Range and If-Range. A server without Range sends all
    again: the bytes that were read before are compared by length and crc32 and left out. An object
    with another ETag, date or length is an ObjectChangedError. Bytes are as stored: no content
    encoding is undone.

    A body without Content-Length that is not chunked ends where its connection ends; whether that
    was the end is for the archive format to say.
    """

    def __init__(self, client: HttpClient, url: str) -> None:
        self.url = url
        self.position = 0
        self._client = client
        self._crc32 = 0
        self._breaks = 0
        self._last_break = 0
        response = client.request("GET", url, {})
        if response.status != 200:
            response.close()
            raise FetchError(Reason.NETWORK, f"{url}: unexpected HTTP {response.status}")
        self.size_bytes = _length(response.headers)
        self._etag = response.headers.get("ETag", "")
        self._modified = response.headers.get("Last-Modified", "")
        self._response: BaseHTTPResponse | None = response

    def __enter__(self) -> Self:
        """Return the body; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Drop the connection, whatever is still on its way."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def read(self, size: int = _BLOCK_BYTES) -> bytes:
        """Return the next 1 to `size` bytes, b"" at the end; FetchError when it cannot go on."""
        if size < 1:
            raise ValueError(f"size ({size}) must be positive")
        while self.size_bytes is None or self.position < self.size_bytes:
            self._client.turns.check_stopped()
            try:
                if self._response is None:
                    self._response = self._reopened()
                data = self._receive(self._response, size)
            except _ConnectionBrokenError as error:
                self._broke(str(error))
                continue
            if data or self.size_bytes is None:
                self._crc32 = zlib.crc32(data, self._crc32)
                self.position += len(data)
                return data
            self._broke("the connection was closed")
        return b""

    def _receive(self, response: BaseHTTPResponse, size: int) -> bytes:
        try:
            data = response.read1(size, decode_content=False) or b""
        except (HTTPError, OSError) as error:
            raise _ConnectionBrokenError(brief(error)) from error
        self._client.bytes_received += len(data)
        return data

    def _broke(self, detail: str) -> None:
        """Drop the connection and pause; FetchError after too many breaks without progress."""
        self.close()
        if self.position - self._last_break >= _BLOCK_BYTES:
            self._breaks = 0
        self._last_break = self.position
        self._breaks += 1
        if self._breaks >= self._client.politeness.attempts:
            whole = "" if self.size_bytes is None else f" of {self.size_bytes:,}"
            raise FetchError(
                Reason.NETWORK,
                f"{self.url} broke at byte {self.position:,}{whole}: {detail}; "
                f"given up after {self._breaks} breaks without progress",
            )
        self._client.turns.pause(self._client.back_off(self._breaks))

    def _reopened(self) -> BaseHTTPResponse:
        """Return an answer whose next byte is the one at `position`."""
        response = self._client.request("GET", self.url, self._range_headers())
        try:
            self._check_same(response)
            if response.status == 200:
                self._leave_out(response)
        except BaseException:
            response.close()
            raise
        return response

    def _range_headers(self) -> dict[str, str]:
        if self.position == 0:
            return {}
        headers = {"Range": f"bytes={self.position}-"}
        # RFC 9110, 13.1.5: a weak ETag must not stand in If-Range
        validator = self._etag if self._etag.startswith('"') else self._modified
        if validator:
            headers["If-Range"] = validator
        return headers

    def _check_same(self, response: BaseHTTPResponse) -> None:
        """Raise ObjectChangedError unless the answer is of the object that reading began with."""
        if response.status == 416:
            raise self._changed(f"it has no byte {self.position:,} any more")
        if response.status not in (200, 206):
            raise FetchError(Reason.NETWORK, f"{self.url}: unexpected HTTP {response.status}")
        for name, known in (("ETag", self._etag), ("Last-Modified", self._modified)):
            now = response.headers.get(name, "")
            if known and now and now != known:
                raise self._changed(f"{name} was {known} and is {now}")
        total = _length(response.headers)
        if response.status == 206:
            first, total = _content_range(response.headers)
            if first != self.position:
                raise _ConnectionBrokenError("the answer is another range than asked for")
        if self.size_bytes is not None and total is not None and total != self.size_bytes:
            raise self._changed(f"it had {self.size_bytes:,} bytes and has {total:,}")

    def _leave_out(self, response: BaseHTTPResponse) -> None:
        """Read again what was read before, and compare."""
        left, crc32 = self.position, 0
        while left:
            data = self._receive(response, min(left, _BLOCK_BYTES))
            if not data:
                raise _ConnectionBrokenError("the connection was closed")
            crc32 = zlib.crc32(data, crc32)
            left -= len(data)
        if crc32 != self._crc32:
            raise self._changed(f"its first {self.position:,} bytes are others now")

    def _changed(self, detail: str) -> ObjectChangedError:
        return ObjectChangedError(
            Reason.NETWORK, f"{self.url} was replaced while it was being read: {detail}"
        )


def brief(error: BaseException) -> str:
    """Return an error as one line without the addresses of objects in memory."""
    text = " ".join(str(error).split())
    return text.rpartition(">: ")[2][:200] or type(error).__name__


def _busy_reason(response: BaseHTTPResponse) -> Reason:
    told = response.status == 429 or "Retry-After" in response.headers
    return Reason.RATE_LIMITED if told else Reason.NETWORK


def _length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _content_range(headers: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return the first byte and the whole length of `bytes 5-9/10`; None where not said."""
    unit, _, rest = headers.get("Content-Range", "").strip().partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0].strip()
    known = unit.lower() == "bytes" and first.isascii() and first.isdigit()
    total = total.strip()
    return int(first) if known else None, int(total) if total.isdecimal() else None


def _redirected(url: str, location: str) -> str:
    """Return where a redirect leads; FetchError where it must not be followed."""
    target = urllib.parse.urljoin(url, location)
    scheme = urllib.parse.urlsplit(target).scheme
    if not location or scheme not in ("http", "https"):
        raise FetchError(
            Reason.NETWORK, f"{url} redirects to {location[:200]!r}, which is no address"
        )
    if urllib.parse.urlsplit(url).scheme == "https" and scheme == "http":
        raise FetchError(
            Reason.NETWORK, f"{url} redirects to http://, which is not verified; refused"
        )
    return target
