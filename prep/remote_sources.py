"""The mirror and YouTube as sources of a conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.http_client import FetchError
from prep.outcome import Reason
from prep.source import Offer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prep.cvdf_source import CvdfSource
    from prep.encode import Candidate
    from prep.source import PendingRows
    from prep.youtube_source import YoutubeSource


class MirrorSource:
    """The CVDF mirror: archives are read as a stream, finished members are skipped."""

    name = "cvdf"

    def __init__(self, mirror: CvdfSource) -> None:
        self.mirror = mirror

    def offers(self, pending: PendingRows) -> Iterator[Offer]:
        """Yield what the archives hold for pending rows, in the order of the archives."""
        yield from self.mirror.offers(
            pending.by_cut_name,
            pending.archive_done,
            pending.mark_done,
            known=pending.known,
            settle=pending.settle,
        )

    def absence(self) -> tuple[Reason, str]:
        """Say "missing upstream" only when every archive was read to its end."""
        unread = [finding for finding in self.mirror.findings if finding.retryable]
        if unread:
            named = unread[0].archive or unread[0].detail
            return Reason.NETWORK, f"{len(unread)} archives could not be read, {named} the first"
        return Reason.MISSING_UPSTREAM, ""

    def stop(self) -> None:
        """End the transfer that is under way."""
        self.mirror.client.stop()

    def notes(self) -> list[str]:
        """Name every archive that was not whole, and what was left out of the others."""
        found = [
            f"mirror: {finding.archive or 'archives'}: {finding.reason} ({finding.detail})"
            for finding in self.mirror.findings
        ]
        for kind, tally in self.mirror.tallies.items():
            if tally.count:
                found.append(f"mirror: {tally.count} members: {kind}, e.g. {tally.examples[0]}")
        return found


class VideoSiteSource:
    """YouTube through yt-dlp, one video at a time."""

    name = "youtube"

    def __init__(self, site: YoutubeSource) -> None:
        self.site = site
        self._refused = 0

    def offers(self, pending: PendingRows) -> Iterator[Offer]:
        """Fetch the video of each pending row; a refusal is an answer, and the next row goes on."""
        for row in pending.rows():
            if row.segment is None:
                continue
            try:
                candidate = self.site.fetch(row.segment)
            except FetchError as error:
                self._refused += 1
                yield Offer(row, [], refusal=(Reason(error.reason), error.detail))
            else:
                yield Offer(row, [candidate], self._release(candidate))

    def _release(self, candidate: Candidate) -> Release:
        return Release(self.site, candidate)

    def absence(self) -> tuple[Reason, str]:
        """Every row gets an offer or a refusal; none is left out."""
        return Reason.MISSING_UPSTREAM, ""

    def stop(self) -> None:
        """End the download that is under way."""
        self.site.stop()

    def notes(self) -> list[str]:
        """Say how many videos could not be had."""
        return [f"youtube: {self._refused} videos could not be fetched"] if self._refused else []


class Release:
    """Removes a downloaded video once its row is settled."""

    def __init__(self, site: YoutubeSource, candidate: Candidate) -> None:
        self._site, self._candidate = site, candidate

    def __call__(self) -> None:
        """Remove it; a second call does nothing."""
        self._site.release(self._candidate)
