"""Addresses under which any HTTP client can read the objects of a root, for a while.

Signing is the object store client's work: it knows credentials, regions and styles of address.
Where it cannot sign, or is set up to do what a plain HTTP request would not (a proxy, certificates,
encryption with the caller's keys), there is no address, and reads go through that client.
"""

from __future__ import annotations

import ssl
import time
import urllib.request
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from prep import __version__
from prep.forks import note_client, refuse_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from obstore.store import ObjectStore

_URL_CHARACTERS = ":/?#[]@!$&'()*+,;=%"
_VALID = timedelta(hours=1)
_UNKNOWN_SECONDS = 10.0  # where an address could not be made
_USED_SECONDS = 1800.0  # of that hour, so that no clock's error matters
_PLAIN_OPTIONS = {
    "access_key_id", "client_options", "endpoint", "region", "secret_access_key", "session_token",
    "skip_signature", "token", "virtual_hosted_style_request",
}  # fmt: skip
_PLAIN_CLIENT_OPTIONS = {"timeout", "read_timeout", "connect_timeout", "allow_http"}


@dataclass(frozen=True)
class Origin:
    """Where connections go to."""

    host: str
    port: int
    tls: bool


@dataclass(frozen=True)
class ObjectUrl:
    """An object's address; `head` is the request for it, up to the first byte's number."""

    origin: Origin
    head: bytes


class ObjectUrls:
    """The addresses of one root's objects, made when they are first asked for and kept.

    `store` opens the client of the root, `root` is its URL, `options` are those of Storage.
    """

    def __init__(
        self, root: str, options: dict[str, Any], store: Callable[[], ObjectStore]
    ) -> None:
        self._root, self._store = root, store
        self._unsigned = str(options.get("skip_signature", "")).lower() in ("true", "1")
        self._options = options
        self._signer: ObjectStore | None = None
        self._known: dict[str, tuple[float, ObjectUrl | None]] = {}
        self._possible = _is_plain(root, options)

    def get(self, path: str) -> ObjectUrl | None:
        """Return the address of an object; None where it must be read through the client."""
        if not self._possible:
            return None
        found = self._known.get(path)
        now = time.monotonic()
        if found is None or now > found[0]:
            url = self._make(path)
            found = self._known[path] = (
                now + (_UNKNOWN_SECONDS if url is None else _USED_SECONDS),
                url,
            )
        return found[1]

    def forget(self) -> None:
        """Make addresses anew when they are next asked for: a signature was refused."""
        self._known.clear()

    def _make(self, path: str) -> ObjectUrl | None:
        if self._root.startswith("s3://"):
            url = self._signed(path)
        else:
            url = f"{quote(self._root, safe=_URL_CHARACTERS)}/{quote(path)}"
        return None if url is None else parse_url(url)

    def _signed(self, path: str) -> str | None:
        import obstore

        refuse_fork(self._root)
        try:
            if self._signer is None:
                self._signer = self._without_credentials() if self._unsigned else self._store()
            url = str(obstore.sign(self._signer, "GET", path, _VALID))  # type: ignore[call-overload]
        except Exception:  # noqa: BLE001 - reads through the client say what is wrong, and where
            return None
        return url.partition("?")[0] if self._unsigned else url

    def _without_credentials(self) -> ObjectStore:
        """Return a client that signs with nothing, for the addresses in front of signatures."""
        from obstore.store import from_url

        note_client()
        named = {key: value for key, value in self._options.items() if key != "skip_signature"}
        named.pop("client_options", None)
        store: ObjectStore = from_url(
            self._root,
            **{**named, "access_key_id": "none", "secret_access_key": "none"},
            client_options={"allow_http": True},
        )
        return store


def parse_url(url: str) -> ObjectUrl | None:
    """Return what a request for `url` needs; None for an address that is not a plain one."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        return None
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    # no encoding of our own: what is not ASCII as it stands is left to the client
    if not all(
        text.isascii() and text.isprintable() and " " not in text for text in (target, parts.netloc)
    ):
        return None
    if _has_proxy(parts.scheme, parts.hostname):
        return None
    head = (
        f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: kprep/{__version__}\r\n"
        "Accept: */*\r\nAccept-Encoding: identity\r\nRange: bytes="
    )
    tls = parts.scheme == "https"
    return ObjectUrl(
        Origin(parts.hostname, port or (443 if tls else 80), tls), head.encode("ascii")
    )


def tls_context() -> ssl.SSLContext:
    """Return how servers of https:// addresses are checked: by the system's certificates."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _is_plain(root: str, options: dict[str, Any]) -> bool:
    """Whether a plain request does all that these options ask for."""
    if not root.startswith(("s3://", "http://", "https://")) or "?" in root or "#" in root:
        return False
    client = options.get("client_options", {})
    return set(options) <= _PLAIN_OPTIONS and set(client) <= _PLAIN_CLIENT_OPTIONS


def _has_proxy(scheme: str, host: str) -> bool:
    proxies = urllib.request.getproxies()
    if not ({scheme, "all"} & set(proxies)):
        return False
    return not urllib.request.proxy_bypass(host)
