"""The mirror and YouTube as sources of a conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.fetch_errors import CircuitOpenError, FetchError, StoppedError
from prep.outcome import Reason
from prep.source import Offer
from prep.tar_stream import BROKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prep.cvdf_source import CvdfSource
    from prep.segment import Segment
    from prep.source import Candidate, PendingRows
    from prep.youtube_source import YoutubeSource


_MOST_CIRCUITS = 3  # so often the site may turn us away before its other rows wait for another run


class MirrorSource:
    """The CVDF mirror: archives are read as a stream, finished members are skipped."""

    name = "cvdf"
    several_files = True  # the repaired archive and the original

    def __init__(self, mirror: CvdfSource) -> None:
        self.mirror = mirror

    def offers(self, pending: PendingRows) -> Iterator[Offer]:
        """Yield what the archives hold for pending rows, in the order of the archives.

        No archive is opened when no row waits, but one that has clips here and was not read to its
        end, as its checksum is there.
        """
        if pending.waiting() or pending.unread():
            yield from self.mirror.offers(pending)

    def absence(self) -> tuple[Reason, str]:
        """Say "missing upstream" only when no archive is left that another run might read.

        Archives that are damaged may have held the clip: the detail names the first of them. They
        are read again in every run, so that it is the same after an interruption.
        """
        unread = [finding for finding in self.mirror.findings if finding.retryable]
        if unread:
            first = unread[0].archive
            if not first:  # its detail may name a server
                return Reason.NETWORK, "the mirror was left before its end"
            return Reason.NETWORK, f"{len(unread)} archives could not be read, {first} the first"
        broken = [finding for finding in self.mirror.findings if finding.reason in BROKEN]
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            where = f"{broken[0].archive} ({broken[0].reason}){more}"
            return Reason.MISSING_UPSTREAM, f"or in what cannot be read of {where}"
        return Reason.MISSING_UPSTREAM, ""

    def check(self) -> None:
        """Do nothing: what the mirror does not have is its answer."""

    def stop(self) -> None:
        """End the transfer that is under way."""
        self.mirror.client.stop()

    def notes(self) -> list[str]:
        """Name every archive that was not whole, and what was left out of the others."""
        found = [
            f"mirror: {finding.archive or 'archives'}: {finding.reason} ({finding.detail})"
            for finding in self.mirror.findings
        ]
        found += [
            f"mirror: {archive}: {count} clips taken from it; their details in the ledger say so"
            for archive, count in self.mirror.clips_of_broken.items()
        ]
        for kind, tally in self.mirror.tallies.items():
            if tally.count:
                found.append(f"mirror: {tally.count} members: {kind}, e.g. {tally.examples[0]}")
        return found


class VideoSiteSource:
    """YouTube through yt-dlp, one video at a time."""

    name = "youtube"
    several_files = False

    def __init__(self, site: YoutubeSource) -> None:
        self.site = site
        self._refused = 0
        self._circuits = 0
        self._ended = ""

    def offers(self, pending: PendingRows) -> Iterator[Offer]:
        """Fetch the video of each pending row; a refusal is an answer, and the next row goes on."""
        for row in pending.rows():
            if row.segment is None:
                continue
            try:
                candidate = self._fetch(row.segment)
            except (StoppedError, CircuitOpenError) as error:
                self._ended = error.detail
                if isinstance(error, StoppedError):
                    raise
                return
            except FetchError as error:
                self._refused += 1
                yield Offer(row, [], refusal=(error.reason, error.detail))
            else:
                yield Offer(row, [candidate], Release(self.site, candidate))

    def _fetch(self, segment: Segment) -> Candidate:
        """Fetch a video; when the site turns us away, wait until it may be asked again."""
        while True:
            try:
                return self.site.fetch(segment)
            except CircuitOpenError:
                self._circuits += 1
                if self._circuits > _MOST_CIRCUITS:
                    raise
                self.site.wait_for_circuit()

    def absence(self) -> tuple[Reason, str]:
        """Say that the site was not asked any more: it may answer in another run."""
        return Reason.BOT_CHECK, "not asked for: YouTube had turned kprep away"

    def check(self) -> None:
        """Do nothing: what the site does not have is its answer."""

    def stop(self) -> None:
        """End the download that is under way."""
        self.site.stop()

    def notes(self) -> list[str]:
        """Say how many videos could not be had, and what the site and the network said."""
        found = [f"youtube: {self._refused} videos could not be fetched"] if self._refused else []
        said = (self._ended, self.site.network_error)
        return found + [f"youtube: {text}" for text in said if text]


class Release:
    """Removes a downloaded video once its row is settled."""

    def __init__(self, site: YoutubeSource, candidate: Candidate) -> None:
        self._site, self._candidate = site, candidate

    def __call__(self) -> None:
        """Remove it; a second call does nothing."""
        self._site.release(self._candidate)
