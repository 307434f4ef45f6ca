"""Reading objects of a store: one request after the other until all bytes are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prep.downloads import ShortAnswerError, Tries, seconds_of
from prep.errors import StorageError
from prep.local_files import ends_early, refuse_larger
from prep.store_errors import replaced, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from obstore.store import ObjectStore

    from prep.downloads import Download, RetryPolicy
    from prep.range_requests import RangeRequests

TIMEOUTS = {"timeout": "20s", "read_timeout": "10s", "connect_timeout": "3s"}


def receive(
    download: Download, store: Callable[[], ObjectStore], where: str, retry: RetryPolicy
) -> memoryview:
    """Fill a download, over as many requests as it takes; `where` names it in errors."""
    tries = Tries(retry, where)
    problem: StorageError | None = None
    while not download.complete:
        if problem is not None:
            tries.after(problem)
        before = download.received
        try:
            with store_errors(where):
                _request(download, store, where)
            problem = ShortAnswerError(
                f"{where} cannot be read: the answer held only {download.received - before} bytes "
                "of those that were asked for"
            )
        except StorageError as error:
            problem = error
        if download.received > before:
            tries.progress()
    return memoryview(download.body)


def _request(download: Download, store: Callable[[], ObjectStore], where: str) -> None:
    """Send one request for what is missing; what arrived before an error is kept."""
    import obstore

    options = download.options()
    result = obstore.get(store(), download.path, options=options or None)  # type: ignore[arg-type]
    size, etag = int(result.meta["size"]), result.meta["e_tag"]
    if download.etag is not None and etag is not None and etag != download.etag:
        raise replaced(where)
    if download.end is not None and size < download.end:
        raise ends_early(where, size, download.start, download.end)
    if download.end is None:
        refuse_larger(where, size, download.most)
    download.begin(size, etag)
    if result.range[0] != download.start + download.received:
        raise OSError(f"the answer begins at byte {result.range[0]}, another was asked for")
    for chunk in result.stream(min_chunk_size=1):
        download.add(memoryview(chunk))


def range_requests(
    root: str,
    options: dict[str, Any],
    store: Callable[[], ObjectStore],
    read: Callable[[str, int, int, str | None], memoryview],
) -> RangeRequests:
    """Return what asks a root for ranges directly, and has `read` read whatever fails."""
    # here, as they import ssl and http: a third of the import of prep.storage, for nothing where a
    # root is local
    from prep.object_urls import ObjectUrls
    from prep.range_requests import RangeRequests

    given = {**TIMEOUTS, **options.get("client_options", {})}
    stall, connect = (
        seconds_of(given[name]) or seconds_of(TIMEOUTS[name])
        for name in ("read_timeout", "connect_timeout")
    )
    urls = ObjectUrls(root, options, store)
    return RangeRequests(urls, read, stall_seconds=stall, connect_seconds=connect)
