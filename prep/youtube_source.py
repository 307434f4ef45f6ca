"""Single videos from YouTube through yt-dlp's Python interface, politely.

No shell, no configuration file, no plugin (unless asked for), no postprocessor: yt-dlp finds the
address of a video stream and downloads it into a fresh folder; our own encode cuts it exactly and
decides whether it is a video.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import ssl
import tempfile
import threading
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from prep.errors import KprepError, UsageError
from prep.fetch_errors import CircuitOpenError, FetchError
from prep.ffmpeg_binary import find_ffmpeg
from prep.format import open_media
from prep.outcome import Reason
from prep.politeness import CircuitBreaker, Timing, Turns
from prep.probe import FORMAT_WHITELIST
from prep.segment import YOUTUBE_ID
from prep.source import Candidate
from prep.youtube_reasons import BLOCKS_ALL, brief, reason_of, without_servers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prep.segment import Segment

_UNFINISHED = (".part", ".ytdl", ".temp")
_FULL_DISK = re.compile(r"\[Errno (28|122|30)\]")  # ENOSPC, EDQUOT, EROFS
_FOLDER_PREFIX = "youtube-"
# One stream, over plain HTTP, with pictures, no larger than needed: nothing has to be merged
DEFAULT_FORMAT = "/".join(
    f"{kind}[protocol^=http][protocol!*=dash]{size}"
    for size in ("[height<=?720]", "")
    for kind in ("bestvideo", "best")
)


@dataclass(frozen=True)
class YoutubeOptions:
    """How YouTube is asked. The defaults are for a guest: about 300 videos an hour.

    `cookies` is a file in Netscape's form; it is read once and never written. `player_clients`,
    `js_runtimes` (`deno` or `deno:/path`) and `format` are yt-dlp's. With `sections` only the
    segment and `margin_seconds` around it are fetched; a whole video may take `longest_seconds`.
    `bot_checks` in a row open the circuit for `circuit_seconds`. `extractors` are the only ones
    that yt-dlp may use.
    """

    url_template: str = "https://www.youtube.com/watch?v={id}"
    extractors: tuple[str, ...] = ("youtube",)
    cookies: Path | None = None
    proxy: str | None = None
    player_clients: tuple[str, ...] = ()
    js_runtimes: tuple[str, ...] = ()
    format: str = DEFAULT_FORMAT
    sections: bool = False
    margin_seconds: float = 5.0
    seconds_between_videos: float = 12.0
    seconds_between_requests: float = 0.5
    bytes_per_second: int | None = None
    socket_timeout_seconds: float = 30.0
    longest_seconds: float = 3600.0
    attempts: int = 3
    bot_checks: int = 3
    circuit_seconds: float = 3600.0
    plugins: bool = False

    def __post_init__(self) -> None:
        """Refuse values with which nothing could be fetched, or something else would be."""
        parts = urllib.parse.urlsplit(self.url_template)
        if parts.scheme not in ("https", "http") or self.url_template.count("{id}") != 1:
            given = f"url_template ({self.url_template})"
            raise UsageError(f"{given} must be an http or https address with one {{id}}")
        for name in ("margin_seconds", "seconds_between_videos", "seconds_between_requests"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} ({getattr(self, name)}) must not be negative")
        for name in ("attempts", "bot_checks", "socket_timeout_seconds", "circuit_seconds"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} ({getattr(self, name)}) must be positive")


class YoutubeSource:
    """Fetches one video at a time into a folder of its own below `work`.

    `work` is this source's alone: what a killed run has left there is removed first.
    """

    name = "youtube"

    def __init__(
        self, work: Path, options: YoutubeOptions | None = None, *, timing: Timing | None = None
    ) -> None:
        self.options = options or YoutubeOptions()
        self._work = work.absolute()
        self._timing = timing or Timing()
        self._breaker = CircuitBreaker(
            self.options.bot_checks, self.options.circuit_seconds, self._timing.monotonic
        )
        self._turns = Turns(self._timing)
        self._lock = threading.Lock()
        self._refusal: tuple[Reason, str] | None = None
        self.network_error = ""  # the last one, as yt-dlp put it
        self._wanted: Segment | None = None
        self._deadline = 0.0
        self._cookies = _read_cookies(self.options.cookies)
        self._downloader: Any = None

    def fetch(self, segment: Segment) -> Candidate:
        """Download the video of a segment, or the part around it; `release` removes the file.

        The candidate's times are relative to the downloaded file. Raises FetchError with the
        reason that yt-dlp's words stand for, CircuitOpenError when YouTube is to be left alone,
        StoppedError after `stop`, KprepError when the disk is full.
        """
        if segment.path is not None or not YOUTUBE_ID.fullmatch(segment.video_id):
            raise FetchError(Reason.MISSING_UPSTREAM, f"{segment.video_id!a} is no YouTube id")
        with self._lock:
            downloader = self._open()
            self._admit()
            folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=self._work))
            try:
                path = self._download(downloader, segment, folder)
                start, end = self._times(segment, path)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return Candidate(path, self.name, start, end)

    def release(self, candidate: Candidate) -> None:
        """Remove what `fetch` has stored; calling it again does nothing."""
        folder = candidate.path.parent
        if folder.parent == self._work and folder.name.startswith(_FOLDER_PREFIX):
            shutil.rmtree(folder, ignore_errors=True)

    def stop(self) -> None:
        """Make every pause and download end soon with StoppedError; safe in a signal handler."""
        self._turns.stop()

    def close(self) -> None:
        """Close yt-dlp's connections."""
        if self._downloader is not None:
            self._downloader.close()
            self._downloader = None

    @property
    def circuit_seconds_left(self) -> float:
        """How long YouTube will be left alone."""
        return self._breaker.seconds_left

    def wait_for_circuit(self) -> None:
        """Return when the site may be asked again; raise StoppedError when told to stop."""
        self._turns.pause(self.circuit_seconds_left)

    def _admit(self) -> None:
        """Wait for the next turn; raise CircuitOpenError while the circuit is open."""
        self._turns.check_stopped()
        if not self._breaker.admit():
            raise CircuitOpenError(Reason.BOT_CHECK, self._open_message())
        spread = 0.5 + self._timing.random()  # between half and one and a half of the interval
        self._turns.wait(self.options.seconds_between_videos * spread)

    def _open_message(self) -> str:
        return (
            f"YouTube refused {self.options.bot_checks} videos in a row; it is left alone for "
            f"{self._breaker.seconds_left:.0f} s (cookies or another address may help)"
        )

    def _download(self, downloader: Any, segment: Segment, folder: Path) -> Path:
        """Return the one file that yt-dlp wrote."""
        module = _yt_dlp()
        self._refusal, self._wanted = None, segment
        self._deadline = self._timing.monotonic() + self.options.longest_seconds
        # `%` begins a field of a template
        target = f"{folder}/video".replace("%", "%%")
        downloader.params["outtmpl"] = {"default": target}
        downloader.params.pop("download_ranges", None)
        if self._cuts(segment):
            downloader.params["download_ranges"] = self._range
            # As yt-dlp's command line does: a part of it looks nowhere else, in any thread
            found = module.postprocessor.FFmpegPostProcessor._ffmpeg_location  # noqa: SLF001
            found.set(find_ffmpeg().path)
        url = self.options.url_template.replace("{id}", segment.video_id)
        try:
            downloader.extract_info(url, download=True)
        except module.utils.DownloadCancelled as error:
            self._turns.check_stopped()
            raise FetchError(Reason.NETWORK, brief(str(error))) from error
        except module.utils.YoutubeDLError as error:
            raise self._failure(str(error)) from error
        except Exception as error:  # an extractor may meet a page that it was not written for
            raise self._failure(f"{type(error).__name__}: {error}") from error
        if self._refusal is not None:
            raise FetchError(*self._refusal)
        files = [path for path in folder.iterdir() if path.suffix not in _UNFINISHED]
        if len(files) != 1 or not files[0].is_file():
            raise FetchError(Reason.EXTRACTOR_FAILED, "yt-dlp reported success, but wrote no video")
        self._breaker.succeeded()
        return files[0]

    def _failure(self, message: str) -> KprepError:
        """Book a failure and return it as one of our errors."""
        if _FULL_DISK.search(message):
            return KprepError(f"{self._work} cannot be written: {brief(message)}")
        reason, detail = reason_of(message), brief(message)
        if reason == Reason.NETWORK:
            self.network_error, detail = detail, without_servers(message)
        if reason in BLOCKS_ALL:
            if self._breaker.failed():
                return CircuitOpenError(reason, f"{detail}; {self._open_message()}")
        elif reason not in (Reason.NETWORK, Reason.EXTRACTOR_FAILED):
            self._breaker.succeeded()  # whatever it says of this video, it still talks to us
        return FetchError(reason, detail)

    def _cuts(self, segment: Segment) -> bool:
        return self.options.sections and segment.end_seconds is not None

    def _range(self, _info: dict[str, Any], _downloader: Any) -> Iterator[dict[str, float]]:
        """Yield the one section to fetch, in yt-dlp's form."""
        wanted, margin = self._wanted, self.options.margin_seconds
        if wanted is not None and wanted.end_seconds is not None:
            start = max(0.0, wanted.start_seconds - margin)
            yield {"start_time": start, "end_time": wanted.end_seconds + margin}

    def _times(self, segment: Segment, path: Path) -> tuple[float, float | None]:
        """Return the segment's times in the file: a section keeps the timestamps of the video."""
        if not self._cuts(segment) or segment.end_seconds is None:
            return segment.start_seconds, segment.end_seconds
        origin = min(_start_seconds(path), segment.start_seconds)
        return segment.start_seconds - origin, segment.end_seconds - origin

    def _refuse(self, info: dict[str, Any], *, incomplete: bool = False) -> str | None:
        """Return why a video is not worth a download, in yt-dlp's form of a filter."""
        duration, wanted = info.get("duration"), self._wanted
        if info.get("live_status") in ("is_live", "is_upcoming", "post_live"):
            self._refusal = (Reason.NOT_YET, f"the video's live status is {info['live_status']}")
        elif (
            not incomplete
            and wanted is not None
            and isinstance(duration, (int, float))
            and duration + 1 <= wanted.start_seconds  # YouTube rounds it
        ):
            self._refusal = (Reason.OUTSIDE, f"the video ends at {duration:g} s")
        return self._refusal[1] if self._refusal is not None else None

    def _progress(self, _status: dict[str, Any]) -> None:
        """Cancel a download, in yt-dlp's form: after `stop`, or where it takes too long."""
        if self._turns.stopped or self._timing.monotonic() > self._deadline:
            limit = self.options.longest_seconds
            raise _yt_dlp().utils.DownloadCancelled(f"the download took more than {limit:g} s")

    def _open(self) -> Any:
        """Return yt-dlp's downloader; one serves all videos, so the player is fetched once."""
        module = _yt_dlp()
        self._work.mkdir(parents=True, exist_ok=True)
        if self._downloader is None:
            for folder in self._work.glob(f"{_FOLDER_PREFIX}*"):
                shutil.rmtree(folder, ignore_errors=True)
            if not self.options.plugins:
                module.globals.plugin_dirs.value = []
            self._downloader = module.YoutubeDL(self._parameters(), auto_init="no_verbose_header")
        return self._downloader

    def _parameters(self) -> dict[str, Any]:
        options = self.options
        parameters: dict[str, Any] = {
            "logger": _Silent(), "quiet": True, "no_warnings": True, "noprogress": True,
            "color": "never", "cachedir": False, "noplaylist": True, "playlist_items": "1",
            "allowed_extractors": list(options.extractors), "geo_bypass": False,
            "format": options.format, "fixup": "never", "updatetime": False, "overwrites": True,
            "postprocessors": [], "match_filter": self._refuse, "progress_hooks": [self._progress],
            "socket_timeout": options.socket_timeout_seconds, "retries": options.attempts,
            "extractor_retries": options.attempts, "fragment_retries": options.attempts,
            "skip_unavailable_fragments": False, "ratelimit": options.bytes_per_second,
            "sleep_interval_requests": options.seconds_between_requests,
            "retry_sleep_functions": {"http": _back_off, "extractor": _back_off},
            "external_downloader": {"default": "native"},
            "ffmpeg_location": find_ffmpeg().path,
            "external_downloader_args": ffmpeg_arguments(options),
        }  # fmt: skip
        if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
            # yt-dlp prefers the certificates of the package certifi, where that is installed
            parameters["compat_opts"] = {"no-certifi"}
        if self._cookies:
            parameters["cookiefile"] = io.StringIO(self._cookies)
        if options.proxy is not None:
            parameters["proxy"] = options.proxy
        if options.player_clients:
            clients = list(options.player_clients)
            parameters["extractor_args"] = {"youtube": {"player_client": clients}}
        if options.js_runtimes:
            parameters["js_runtimes"] = dict(map(_js_runtime, options.js_runtimes))
        return parameters


def ffmpeg_arguments(options: YoutubeOptions) -> dict[str, list[str]]:
    """Return what ffmpeg is told when it fetches a section, in yt-dlp's form.

    A section is copied with the timestamps of the video, so that the file says where it begins.
    The lists keep ffmpeg from following a playlist to other files and addresses; not every build
    of it verifies certificates, or finds the system's, unless told to.
    """
    before = [
        "-protocol_whitelist", "http,https,tcp,tls,httpproxy,crypto",
        "-format_whitelist", FORMAT_WHITELIST,
        "-rw_timeout", str(round(options.socket_timeout_seconds * 1e6)),
    ]  # fmt: skip
    if options.url_template.startswith("https:"):
        before += ["-tls_verify", "1"]
        authorities = ssl.get_default_verify_paths().cafile
        before += ["-ca_file", authorities] if authorities else []
    return {"ffmpeg_i": before, "ffmpeg_o": ["-copyts", "-map", "0:v:0", "-an"]}


class _Silent:
    """Takes yt-dlp's messages; what matters arrives as an exception."""

    def debug(self, message: str) -> None:
        """Drop a message."""

    info = warning = error = debug


def _yt_dlp() -> Any:
    try:
        import yt_dlp
        import yt_dlp.globals
        import yt_dlp.postprocessor
        import yt_dlp.utils
    except ImportError as error:
        # one of before 2025.3 lacks yt_dlp.globals
        needed = "yt-dlp" if error.name == "yt_dlp" else "a newer yt-dlp"
        raise UsageError(
            f"the source youtube: needs {needed}; pip install --upgrade 'kprep[youtube]'"
        ) from error
    return yt_dlp


def _back_off(n: int) -> float:
    """Return the pause before the n-th retry, in yt-dlp's form (by keyword)."""
    return float(min(30.0, 2.0**n))


def _js_runtime(text: str) -> tuple[str, dict[str, str]]:
    name, _, path = text.partition(":")
    return name.lower(), {"path": path} if path else {}


def _read_cookies(path: Path | None) -> str:
    try:
        return path.read_text(encoding="utf-8") if path is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cookies file {path} cannot be read: {error}") from error


def _start_seconds(path: Path) -> float:
    """Return the time of a file's first packet, 0 where it is no video: the encode will say so."""
    with (
        contextlib.suppress(av.FFmpegError, OSError, ValueError),
        open_media(
            str(path), {"format_whitelist": FORMAT_WHITELIST, "protocol_whitelist": "file"}
        ) as file,
    ):
        return float(file.start_time or 0) / av.time_base
    return 0.0
