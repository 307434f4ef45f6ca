"""How fetching over a network fails: the errors of prep.http_client, without its imports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.errors import KprepError

if TYPE_CHECKING:
    from prep.outcome import Reason


class FetchError(KprepError):
    """Something could not be fetched, for one of the reasons that a ledger knows."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    @property
    def retryable(self) -> bool:
        """Whether asking again later can give another answer."""
        return self.reason.retryable


class ObjectChangedError(FetchError):
    """The object was replaced while it was being read; reading must begin anew."""


class CircuitOpenError(FetchError):
    """The source failed so often in a row that it is left alone for a while."""


class StoppedError(FetchError):
    """`HttpClient.stop` was called; nothing more is fetched."""
