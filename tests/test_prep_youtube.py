"""YouTube through yt-dlp: against a local server, as no test may reach the real one."""

from __future__ import annotations

import gc
import shutil
import ssl
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import yt_dlp
from conftest import without
from mirror_server import FakeTime, Fault, Mirror, mirror

from prep.encode import encode
from prep.errors import KprepError, UsageError
from prep.fetch_errors import CircuitOpenError, FetchError, StoppedError
from prep.ffmpeg_binary import find_ffmpeg
from prep.outcome import Reason
from prep.profile import PROFILES
from prep.segment import Segment
from prep.youtube_reasons import brief, reason_of
from prep.youtube_source import YoutubeOptions, YoutubeSource, ffmpeg_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.source import Candidate

VIDEO_ID = "-B6iLlFGm_k"
SEGMENT = Segment(VIDEO_ID, 8.0, 10.0, "a", "train")
RATE = 10


# yt-dlp leaves the connections of failed requests to the garbage collector
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    av.logging.set_level(av.logging.PANIC)
    yield
    gc.collect()  # here, not in another file's test


@pytest.fixture
def server() -> Iterator[Mirror]:
    with mirror() as held:
        held.extra_headers["Content-Type"] = "video/mp4"
        yield held


def drawn(path: Path, *arguments: object, source: str = "") -> Path:
    """Make a video of 16 s whose grey level is 20 + 10 times the second; a keyframe every 3.3 s."""
    picture = source or f"color=size=160x120:rate={RATE}:duration=16"
    subprocess.run(
        [
            find_ffmpeg().path, "-loglevel", "error", "-f", "lavfi", "-i", picture,
            *(() if source else ("-vf", "geq=lum='20+10*floor(T)':cb=128:cr=128")),
            *(arguments or ("-g", "33", "-keyint_min", "33", "-bf", "0")),
            path,
        ],
        check=True,
        timeout=120,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("youtube")
    # Frames that are shown in another order than they are stored, as in most of YouTube's files
    reordered = ("-g", "33", "-keyint_min", "33", "-bf", "2")
    webm = ("-c:v", "libvpx", "-g", "33", "-b:v", "1M", "-deadline", "realtime")
    return {
        "mp4": drawn(folder / "video.mp4").read_bytes(),
        "mov": drawn(folder / "video.mov", *reordered).read_bytes(),
        "webm": drawn(folder / "video.webm", *webm).read_bytes(),
        "audio": drawn(folder / "audio.mp4", "-c:a", "aac", source="sine=duration=16").read_bytes(),
    }


@pytest.fixture
def source(server: Mirror, tmp_path: Path) -> Iterator[Callable[..., YoutubeSource]]:
    opened: list[YoutubeSource] = []

    def make(suffix: str = "mp4", timing: Any = None, **options: Any) -> YoutubeSource:
        known: dict[str, Any] = {
            "url_template": f"{server.base}/watch/{{id}}.{suffix}",
            "extractors": ("generic",),
            "seconds_between_videos": 0.0,
            "seconds_between_requests": 0.0,
            "socket_timeout_seconds": 5.0,
            "attempts": 1,
        }
        made = YoutubeSource(tmp_path, YoutubeOptions(**(known | options)), timing=timing)
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.close()


def converted(tmp_path: Path, candidate: Candidate) -> tuple[dict[str, Any], list[float]]:
    """Run the encode on a candidate; return its result and the grey level of every frame."""
    work = tmp_path / "work"
    for name in ("staged", "temporary"):
        (work / name).mkdir(parents=True, exist_ok=True)
    job = {
        "profile": PROFILES["small"].to_json(), "cpu_seconds": 60, "wall_seconds": 60,
        "min_seconds": 1.0, "work": str(work), "shard": 0,
        "candidates": [{
            "path": str(candidate.path), "source": candidate.source,
            "start": candidate.start_seconds, "end": candidate.end_seconds,
            "was_there": candidate.was_there,
        }],
    }  # fmt: skip
    result = encode(job)
    if result["status"] != "ok":
        return result, []
    clip = tmp_path / "clip.mp4"
    pack = (work / "staged" / result["pack"]).read_bytes()
    clip.write_bytes(pack[result["pack_offset"] :][: result["video_bytes"]])
    with av.open(str(clip)) as file:
        return result, [
            float(np.mean(frame.to_ndarray(format="gray"))) for frame in file.decode(video=0)
        ]


def left_over(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name.startswith("youtube-")]


# -- good files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm"])
@pytest.mark.parametrize("sections", [False, True])
def test_the_cut_is_exact_also_of_a_section(
    server: Mirror,
    source: Callable[..., YoutubeSource],
    videos: dict[str, bytes],
    tmp_path: Path,
    suffix: str,
    *,
    sections: bool,
) -> None:
    kind = {"mov": "quicktime"}.get(suffix, suffix)
    server.extra_headers["Content-Type"] = f"video/{kind}"
    server.put(f"watch/{VIDEO_ID}.{suffix}", videos[suffix])
    youtube = source(suffix, sections=sections, margin_seconds=1.0)
    candidate = youtube.fetch(SEGMENT)
    assert candidate.source == "youtube"
    whole = candidate.path.read_bytes() == videos[suffix]
    assert whole is not sections
    if sections:
        with av.open(str(candidate.path)) as file:
            packets = sum(packet.size > 0 for packet in file.demux(video=0))
        assert packets < 16 * RATE / 2  # [7, 11) from the keyframe before it, of 16 s
    result, levels = converted(tmp_path, candidate)
    assert result["status"] == "ok", result
    assert result["num_frames"] == 30  # 2 s at 15 fps
    # Seconds 8 and 9 are of luma 100 and 110 (limited range: 98 and 109 of 255 as grey)
    steps = [round((level * 219 / 255 + 16 - 20) / 10) for level in levels]
    assert steps == [8] * 15 + [9] * 15
    youtube.release(candidate)
    youtube.release(candidate)
    assert left_over(tmp_path) == []


def test_a_section_at_the_beginning_and_one_past_the_end(
    server: Mirror, source: Callable[..., YoutubeSource], videos: dict[str, bytes], tmp_path: Path
) -> None:
    server.put(f"watch/{VIDEO_ID}.mp4", videos["mp4"])
    youtube = source(sections=True)
    first = youtube.fetch(replace(SEGMENT, start_seconds=0.0, end_seconds=2.0))
    assert (first.start_seconds, first.end_seconds) == (0.0, 2.0)
    assert converted(tmp_path, first)[0]["status"] == "ok"
    late = replace(SEGMENT, start_seconds=100.0, end_seconds=110.0)
    try:
        candidate = youtube.fetch(late)
    except FetchError as error:
        assert error.reason == Reason.EXTRACTOR_FAILED  # noqa: PT017 - both ends are right
    else:
        assert converted(tmp_path, candidate)[0]["status"] == "failed"


def test_one_request_finds_and_one_fetches_and_names_are_ours(
    server: Mirror, source: Callable[..., YoutubeSource], videos: dict[str, bytes], tmp_path: Path
) -> None:
    server.put(f"watch/{VIDEO_ID}.mp4", videos["mp4"])
    server.extra_headers["Content-Disposition"] = 'attachment; filename="../../escape.sh"'
    work = tmp_path / "100%(id)s %s"
    work.mkdir()
    youtube = source()
    youtube._work = work
    candidate = youtube.fetch(SEGMENT)
    assert candidate.path.parent.parent == work
    assert candidate.path.name.startswith("video")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [candidate.path]
    assert len(server.asked(f"watch/{VIDEO_ID}.mp4")) <= 3


def test_what_a_killed_run_left_is_removed_and_the_folder_is_made(
    server: Mirror, source: Callable[..., YoutubeSource], videos: dict[str, bytes], tmp_path: Path
) -> None:
    server.put(f"watch/{VIDEO_ID}.mp4", videos["mp4"])
    (tmp_path / "youtube-old").mkdir()
    (tmp_path / "youtube-old" / "video").write_bytes(b"x")
    (tmp_path / "other").write_bytes(b"x")
    youtube = source()
    first, second = youtube.fetch(SEGMENT), youtube.fetch(SEGMENT)
    assert first.path != second.path
    assert not (tmp_path / "youtube-old").exists()
    assert (tmp_path / "other").exists()
    deep = YoutubeSource(tmp_path / "a" / "b", source().options)
    assert deep.fetch(SEGMENT).path.is_file()
    deep.close()


# -- what is no video -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("html", b"<!DOCTYPE html><html><body>Not found</body></html>", "unsafe input"),
        ("audio", None, "no video stream"),
        ("playlist", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "unsafe input"),
        ("truncated", None, "truncated"),
        ("noise", bytes(range(256)) * 40, "not a video"),
    ],
)
def test_a_success_without_video_is_refused_by_the_encode(
    server: Mirror,
    source: Callable[..., YoutubeSource],
    videos: dict[str, bytes],
    tmp_path: Path,
    name: str,
    data: bytes | None,
    reason: str,
) -> None:
    served = {"audio": videos["audio"], "truncated": videos["mp4"][:5000]}.get(name, data)
    assert served is not None
    server.put(f"watch/{VIDEO_ID}.mp4", served)
    server.extra_headers["Content-Type"] = "video/mp4"
    candidate = source().fetch(SEGMENT)
    result, _ = converted(tmp_path, candidate)
    assert (result["status"], result["reason"]) == ("failed", reason)


def test_an_empty_file_is_refused(
    server: Mirror, source: Callable[..., YoutubeSource], tmp_path: Path
) -> None:
    server.put(f"watch/{VIDEO_ID}.mp4", b"")
    with pytest.raises(FetchError) as caught:
        source().fetch(SEGMENT)
    assert caught.value.reason in (Reason.EXTRACTOR_FAILED, Reason.NETWORK)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("sections", [False, True])
def test_a_playlist_leads_nowhere(
    server: Mirror, source: Callable[..., YoutubeSource], tmp_path: Path, *, sections: bool
) -> None:
    server.put("secret.ts", b"secret")
    lines = f"#EXTM3U\n#EXTINF:9,\n{server.base}/secret.ts\n#EXTINF:9,\nfile:///etc/passwd\n"
    server.put(f"watch/{VIDEO_ID}.mp4", lines.encode())
    try:
        reason = converted(tmp_path, source(sections=sections).fetch(SEGMENT))[0]["reason"]
    except FetchError as error:
        reason = error.reason
    assert reason == (Reason.EXTRACTOR_FAILED if sections else "unsafe input")
    assert server.asked(f"watch/{VIDEO_ID}.mp4")
    assert server.asked("secret.ts") == []


class TwoFaced(dict[str, bytes]):
    """Files of which the watched one is a video for yt-dlp, and a playlist for ffmpeg after it."""

    def __init__(self, server: Mirror, playlist: bytes) -> None:
        super().__init__(server.files)
        self.server = server
        self.playlist = playlist
        self.turned = 0

    def __getitem__(self, path: str) -> bytes:
        if "watch" in path and len(self.server.asked(path.removeprefix("/kinetics/"))) > 1:
            self.server.extra_headers["Content-Type"] = "application/vnd.apple.mpegurl"
            self.turned += 1
            return self.playlist
        return super().__getitem__(path)


def test_ffmpeg_follows_no_playlist(
    server: Mirror, source: Callable[..., YoutubeSource], videos: dict[str, bytes], tmp_path: Path
) -> None:
    server.put("secret.ts", b"G" + bytes(187))
    server.put(f"watch/{VIDEO_ID}.mp4", videos["mp4"])
    lines = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{server.base}/secret.ts\n#EXT-X-ENDLIST\n"
    )
    server.files = files = TwoFaced(server, lines.encode())
    with pytest.raises(FetchError) as caught:
        source(sections=True).fetch(SEGMENT)
    assert caught.value.reason == Reason.EXTRACTOR_FAILED
    assert files.turned
    assert server.asked("secret.ts") == []


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ([Fault(status=404)] * 9, Reason.MISSING_UPSTREAM),
        ([Fault(status=410)] * 9, Reason.MISSING_UPSTREAM),
        ([Fault(status=429, headers={"Retry-After": "60"})] * 9, Reason.RATE_LIMITED),
        ([Fault(status=503)] * 9, Reason.NETWORK),
        ([Fault(status=403)] * 9, Reason.EXTRACTOR_FAILED),
        ([Fault(ends="reset")] * 9, Reason.NETWORK),
        ([Fault(), *[Fault(after=3000, ends="reset")] * 9], Reason.NETWORK),
        ([Fault(), *[Fault(after=3000, ends="close")] * 9], Reason.NETWORK),
    ],
)
def test_server_faults_have_reasons(
    server: Mirror,
    source: Callable[..., YoutubeSource],
    videos: dict[str, bytes],
    tmp_path: Path,
    faults: list[Fault],
    reason: str,
) -> None:
    server.ranges = False
    server.put(f"watch/{VIDEO_ID}.mp4", videos["mp4"], *faults)
    with pytest.raises(FetchError) as caught:
        source().fetch(SEGMENT)
    assert (caught.value.reason, caught.value.retryable) == (reason, reason.retryable), caught
    assert caught.value.detail
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("sections", [False, True])
def test_a_stall_ends(
    server: Mirror,
    source: Callable[..., YoutubeSource],
    videos: dict[str, bytes],
    tmp_path: Path,
    *,
    sections: bool,
) -> None:
    faults = [Fault(), *[Fault(after=3000, ends="stall")] * 99]
    server.put(f"watch/{VIDEO_ID}.mp4", videos["mp4"], *faults)
    with pytest.raises(FetchError) as caught:
        source(socket_timeout_seconds=0.5, sections=sections).fetch(SEGMENT)
    assert caught.value.retryable
    assert left_over(tmp_path) == []


def test_a_web_page_instead_of_a_video_page_is_a_failure(
    server: Mirror, source: Callable[..., YoutubeSource]
) -> None:
    server.extra_headers["Content-Type"] = "text/html"
    server.put(f"watch/{VIDEO_ID}.mp4", b"<html><body>hello</body></html>")
    with pytest.raises(FetchError) as caught:
        source().fetch(SEGMENT)
    assert caught.value.reason == Reason.EXTRACTOR_FAILED


def test_only_the_allowed_extractors_are_used(
    server: Mirror, source: Callable[..., YoutubeSource], videos: dict[str, bytes]
) -> None:
    server.put(f"watch/{VIDEO_ID}.mp4", videos["mp4"])
    with pytest.raises(FetchError) as caught:
        source(extractors=("youtube",)).fetch(SEGMENT)
    assert caught.value.reason == Reason.EXTRACTOR_FAILED
    assert server.requests == []


@pytest.mark.parametrize(
    "video_id",
    ["", "short", "x" * 12, "../../../etc", "a/b/c/d/e/f", "$(touch x)a", "-B6iLlFGm_\n", "-B6iLlFGm k"],
)  # fmt: skip
def test_what_is_no_youtube_id_is_never_asked_for(
    server: Mirror, source: Callable[..., YoutubeSource], tmp_path: Path, video_id: str
) -> None:
    with pytest.raises(FetchError, match="is no YouTube id"):
        source().fetch(replace(SEGMENT, video_id=video_id))
    with pytest.raises(FetchError, match="is no YouTube id"):
        source().fetch(replace(SEGMENT, path="a/b.mp4"))
    assert server.requests == []
    assert left_over(tmp_path) == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        without("openssl, which makes the certificate, is not on this machine")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        cwd=folder, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("trusted", [False, True])
def test_certificates_are_verified(
    certificate: Path,
    videos: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    trusted: bool,
) -> None:
    """By yt-dlp, and by ffmpeg on its own, which gets the address of the media from it."""
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with mirror(context) as server:
        server.extra_headers["Content-Type"] = "video/mp4"
        address = server.put(f"watch/{VIDEO_ID}.mp4", videos["mp4"])
        options = YoutubeOptions(
            url_template=address.replace(VIDEO_ID, "{id}"), extractors=("generic",), attempts=1,
            seconds_between_requests=0.0, sections=True,
        )  # fmt: skip
        before = ffmpeg_arguments(options)["ffmpeg_i"]
        done = subprocess.run(
            [find_ffmpeg().path, "-loglevel", "quiet", *before, "-i", address, "-f", "null", "-"],
            check=False,
            timeout=60,
        )
        assert (done.returncode == 0) is trusted
        youtube = YoutubeSource(tmp_path, options)
        if trusted:
            assert converted(tmp_path, youtube.fetch(SEGMENT))[0]["status"] == "ok"
        else:
            assert fails(youtube).reason == Reason.NETWORK
            assert server.requests == []
        youtube.close()


# -- yt-dlp's own words ---------------------------------------------------------------------------

# The texts stand in yt-dlp 2026.10.26 (marked *) or are YouTube's, as reported in yt-dlp's and
# youtube-dl's issues.
MESSAGES = [
    (Reason.BOT_CHECK, "[youtube] x: Sign in to confirm you\u2019re not a bot. Use --cookies-from-browser or --cookies for the authentication."),
    (Reason.BOT_CHECK, "All player responses are invalid. Your IP is likely being blocked by Youtube"),  # *
    (Reason.BOT_CHECK, "[youtube] x: Video unavailable. YouTube is requiring a captcha challenge before playback"),  # *
    (Reason.RATE_LIMITED, "[youtube] x: Video unavailable. This content isn\u2019t available, try again later. The current session has been rate-limited by YouTube for up to an hour. It is recommended to use `-t sleep`"),  # *
    (Reason.RATE_LIMITED, "Unable to download API page: HTTP Error 429: Too Many Requests (caused by <HTTPError 429: Too Many Requests>)"),
    (Reason.PRIVATE, "[youtube] x: Private video. Sign in if you've been granted access to this video. Use --cookies-from-browser"),
    (Reason.PRIVATE, "[youtube] x: Video unavailable. This video is private"),
    (Reason.REMOVED, "[youtube] x: Video unavailable"),
    (Reason.REMOVED, "[youtube] x: Video unavailable. This video has been removed by the uploader"),
    (Reason.REMOVED, "[youtube] x: This video has been removed for violating YouTube's policy on hate speech. Learn more"),
    (Reason.REMOVED, "[youtube] x: Video unavailable. This video is no longer available because the YouTube account associated with this video has been terminated."),
    (Reason.REMOVED, "[youtube] x: Video unavailable. This video is no longer available because the uploader has closed their YouTube account."),
    (Reason.REMOVED, "[youtube] x: This video isn't available anymore"),
    (Reason.REMOVED, "[youtube] x: This video is not available"),
    (Reason.REMOVED, "[youtube] x: This live stream recording is not available."),
    (Reason.COPYRIGHT, "[youtube] x: Video unavailable. This video is no longer available due to a copyright claim by SME"),
    (Reason.COPYRIGHT, "[youtube] x: Video unavailable. This video contains content from UMG, who has blocked it on copyright grounds"),
    (Reason.GEO_BLOCKED, "x: YouTube said: This video contains content from UMG, who has blocked it in your country on copyright grounds."),
    (Reason.GEO_BLOCKED, "[youtube] x: Video unavailable. The uploader has not made this video available in your country"),  # *
    (Reason.GEO_BLOCKED, "This video is not available from your location due to geo restriction"),  # *
    (Reason.SIGN_IN, "[youtube] x: Sign in to confirm your age. This video may be inappropriate for some users."),
    (Reason.SIGN_IN, "This video is available to this channel's members on level: Bonus Videos! (or any higher level). Join this channel to get access to members-only content and other exclusive perks."),
    (Reason.SIGN_IN, "This video is only available for registered users. Use --cookies"),  # *
    (Reason.SIGN_IN, "Login details are needed to download this content. Use --cookies"),  # *
    (Reason.SIGN_IN, "[youtube] x: This video requires payment to watch"),
    (Reason.NOT_YET, "[youtube] x: Premieres in 7 hours"),
    (Reason.NOT_YET, "[youtube] x: This live event will begin in a few moments."),
    (Reason.NOT_YET, "[youtube] x: We're processing this video. Check back later."),
    (Reason.MISSING_UPSTREAM, "[youtube] x: This video does not exist."),
    (Reason.MISSING_UPSTREAM, "[youtube:truncated_id] x: Incomplete YouTube ID x. URL https://youtube.com/watch?v=x looks truncated."),  # *
    (Reason.MISSING_UPSTREAM, "Unable to download webpage: HTTP Error 404: Not Found"),
    (Reason.ENCRYPTED, "[youtube] x: This video is DRM protected"),  # *
    (Reason.NETWORK, "unable to download video data: HTTP Error 503: Service Unavailable"),
    (Reason.NETWORK, "Unable to download webpage: [Errno 104] Connection reset by peer"),
    (Reason.NETWORK, "Unable to download webpage: HTTPSConnection(host='www.youtube.com', port=443): Failed to establish a new connection: [Errno 111] Connection refused"),
    (Reason.NETWORK, "Unable to download API page: The read operation timed out"),
    (Reason.NETWORK, "[Errno -3] Temporary failure in name resolution"),
    (Reason.NETWORK, "[youtube] x: Unable to download API page: EOF occurred in violation of protocol"),
    (Reason.NETWORK, "Downloaded 10 bytes, expected 20 bytes"),  # *
    (Reason.EXTRACTOR_FAILED, "[youtube] x: Requested format is not available. Use --list-formats for a list of available formats"),  # *
    (Reason.EXTRACTOR_FAILED, "unable to download video data: HTTP Error 403: Forbidden"),
    (Reason.EXTRACTOR_FAILED, "Failed to extract any player response; please report this issue on  https://github.com/yt-dlp"),  # *
    (Reason.EXTRACTOR_FAILED, ""),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "message"), MESSAGES)
def test_messages_have_reasons(reason: str, message: str) -> None:
    assert reason_of(f"ERROR: {message}") == reason
    assert reason_of(message.replace("\u2019", "'")) == reason
    short = brief(f"\x1b[0;31mERROR:\x1b[0m {message}")
    assert len(short) <= 300
    assert short.isprintable()
    assert not any(
        advice in short for advice in ("--cookies", "github.com", "caused by", "-t sleep")
    )


def test_the_messages_marked_as_yt_dlps_are_in_its_source() -> None:
    """When yt-dlp says it otherwise, the table must follow."""
    folder = Path(yt_dlp.__file__).parent
    names = ("extractor/youtube/_video.py", "extractor/youtube/_mistakes.py", "extractor/common.py",
             "utils/_utils.py", "YoutubeDL.py", "extractor/youtube/_base.py")  # fmt: skip
    text = "".join((folder / name).read_text() for name in names if (folder / name).exists())
    for words in (
        "Your IP is likely being blocked by Youtube",
        "YouTube is requiring a captcha challenge before playback",
        "This content isn't available, try again later",
        "has been rate-limited by YouTube for up to an hour",
        "The uploader has not made this video available in your country",
        "This video is not available from your location due to geo restriction",
        "This video is only available for registered users",
        "Login details are needed to download this content",
        "Incomplete YouTube ID",
        "This video is DRM protected",
        "Requested format is not available",
        "Failed to extract any player response",
        "Private video",
    ):
        assert words in text, words


class Scripted:
    """Stands for yt-dlp's downloader: raises or reports what a script says."""

    def __init__(self, *script: str | dict[str, Any]) -> None:
        self.script = list(script)
        self.params: dict[str, Any] = {}

    def extract_info(self, _url: str, *, download: bool) -> None:
        step = self.script.pop(0)
        if isinstance(step, str):
            raise yt_dlp.utils.DownloadError(f"ERROR: {step}")
        assert download
        if self.params.get("match_filter") and self.params["match_filter"](step):
            return
        target = Path(self.params["outtmpl"]["default"].replace("%%", "%"))
        target.write_bytes(b"x")

    def close(self) -> None:
        pass


BOT = "[youtube] x: Sign in to confirm you're not a bot."
GONE = "[youtube] x: Private video."


def scripted(youtube: YoutubeSource, *script: str | dict[str, Any]) -> YoutubeSource:
    youtube._downloader = Scripted(*script)
    youtube._downloader.params["match_filter"] = youtube._refuse
    return youtube


def fails(youtube: YoutubeSource) -> FetchError:
    with pytest.raises(FetchError) as caught:
        youtube.fetch(SEGMENT)
    return caught.value


def test_bot_checks_in_a_row_open_the_circuit(source: Callable[..., YoutubeSource]) -> None:
    clock = FakeTime()
    youtube = source(timing=clock.timing(), bot_checks=3, circuit_seconds=600.0)
    scripted(youtube, BOT, BOT, GONE, BOT, BOT, BOT, BOT, {})
    # An answer about a video in between says that the site still talks to us
    reasons = [fails(youtube).reason for _ in range(5)]
    assert reasons == [
        Reason.BOT_CHECK,
        Reason.BOT_CHECK,
        Reason.PRIVATE,
        Reason.BOT_CHECK,
        Reason.BOT_CHECK,
    ]
    third = fails(youtube)
    assert isinstance(third, CircuitOpenError)
    assert third.reason == Reason.BOT_CHECK
    assert youtube.circuit_seconds_left == 600.0
    left = len(youtube._downloader.script)
    assert isinstance(fails(youtube), CircuitOpenError)
    assert len(youtube._downloader.script) == left  # nothing was asked
    clock.now += 601
    assert isinstance(fails(youtube), CircuitOpenError)  # the trial fails: open again
    assert youtube.circuit_seconds_left == 600.0
    clock.now += 601
    youtube.release(youtube.fetch(SEGMENT))
    assert youtube.circuit_seconds_left == 0


def test_about_300_videos_an_hour(source: Callable[..., YoutubeSource], tmp_path: Path) -> None:
    clock = FakeTime()
    defaults = YoutubeOptions()
    youtube = source(timing=clock.timing(), seconds_between_videos=defaults.seconds_between_videos)
    scripted(youtube, *[GONE] * 101)
    for _ in range(101):
        fails(youtube)
    assert clock.slept == pytest.approx(3600 / 3)  # 100 intervals; chance is one half here
    assert max(clock.naps) <= 0.5


def test_live_and_too_short_videos_are_not_downloaded(source: Callable[..., YoutubeSource]) -> None:
    youtube = scripted(
        source(),
        {"live_status": "is_live"},
        {"live_status": "is_upcoming"},
        {"duration": 7},
        {"duration": 8},  # YouTube rounds: [8, 10) may begin
        {"live_status": "was_live"},
    )
    assert [fails(youtube).reason for _ in range(3)] == [
        Reason.NOT_YET,
        Reason.NOT_YET,
        Reason.OUTSIDE,
    ]
    youtube.fetch(SEGMENT)
    youtube.fetch(SEGMENT)


def test_a_success_that_wrote_nothing_is_a_failure(
    source: Callable[..., YoutubeSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    youtube = scripted(source(), {})
    monkeypatch.setattr(Path, "write_bytes", lambda *_: 0)
    assert fails(youtube).detail == "yt-dlp reported success, but wrote no video"


def test_a_full_disk_is_nobodys_row(source: Callable[..., YoutubeSource], tmp_path: Path) -> None:
    youtube = scripted(source(), "unable to write data: [Errno 28] No space left on device")
    with pytest.raises(KprepError, match="cannot be written") as caught:
        youtube.fetch(SEGMENT)
    assert not isinstance(caught.value, FetchError)
    assert left_over(tmp_path) == []


def test_stop_ends_a_download_and_every_later_one(
    server: Mirror, source: Callable[..., YoutubeSource], tmp_path: Path
) -> None:
    server.put(f"watch/{VIDEO_ID}.mp4", bytes(20_000_000))
    youtube = source(bytes_per_second=200_000)
    timer = threading.Timer(0.7, youtube.stop)
    timer.start()
    with pytest.raises(StoppedError):
        youtube.fetch(SEGMENT)
    timer.join()
    with pytest.raises(StoppedError):
        youtube.fetch(SEGMENT)
    assert left_over(tmp_path) == []


def test_a_download_that_takes_too_long_is_given_up(
    server: Mirror, source: Callable[..., YoutubeSource], tmp_path: Path
) -> None:
    server.put(f"watch/{VIDEO_ID}.mp4", bytes(20_000_000))
    error = fails(source(bytes_per_second=200_000, longest_seconds=0.5))
    assert (error.reason, error.detail) == (Reason.NETWORK, "the download took more than 0.5 s")
    assert left_over(tmp_path) == []


def test_a_fault_of_an_extractor_ends_one_video(source: Callable[..., YoutubeSource]) -> None:
    youtube = scripted(source(), {"duration": {}, "live_status": []})
    youtube._downloader.params["match_filter"] = lambda info: 1 / 0
    error = fails(youtube)
    assert (error.reason, error.detail) == (
        Reason.EXTRACTOR_FAILED,
        "ZeroDivisionError: division by zero",
    )


# -- options --------------------------------------------------------------------------------------


def test_options_reach_yt_dlp(tmp_path: Path, source: Callable[..., YoutubeSource]) -> None:
    cookies = tmp_path / "cookies.txt"
    text = "# Netscape HTTP Cookie File\n.youtube.com\tTRUE\t/\tTRUE\t0\tSID\tsecret\n"
    cookies.write_text(text)
    youtube = source(
        cookies=cookies,
        proxy="http://127.0.0.1:9",
        player_clients=("tv", "web"),
        js_runtimes=("deno:/opt/deno", "node"),
        format="18",
        bytes_per_second=1000,
        attempts=7,
    )
    parameters = youtube._open().params
    assert parameters["proxy"] == "http://127.0.0.1:9"
    assert parameters["extractor_args"] == {"youtube": {"player_client": ["tv", "web"]}}
    assert parameters["js_runtimes"] == {"deno": {"path": "/opt/deno"}, "node": {}}
    assert (parameters["format"], parameters["ratelimit"], parameters["retries"]) == ("18", 1000, 7)
    assert "secret" in {cookie.value for cookie in youtube._open().cookiejar}
    youtube.close()
    assert cookies.read_text() == text  # yt-dlp would write its own over it


def test_what_yt_dlp_may_not_do(source: Callable[..., YoutubeSource]) -> None:
    parameters = source()._open().params
    assert yt_dlp.globals.plugin_dirs.value == []
    assert parameters["postprocessors"] == []
    assert parameters["geo_bypass"] is False
    for name in (
        "nocheckcertificate", "enable_file_urls", "usenetrc", "netrc_cmd", "exec_cmd",
        "remote_components", "cookiesfrombrowser", "allow_unplayable_formats",
    ):  # fmt: skip
        assert not parameters.get(name), name


@pytest.mark.parametrize(
    "options",
    [
        {"url_template": "https://www.youtube.com/watch?v="},
        {"url_template": "file:///{id}"},
        {"url_template": "https://x/{id}/{id}"},
        {"margin_seconds": -1.0},
        {"attempts": 0},
        {"bot_checks": 0},
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must"):
        YoutubeOptions(**options)


def test_a_missing_cookies_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cookies file .* cannot be read"):
        YoutubeSource(tmp_path, YoutubeOptions(cookies=tmp_path / "none"))


@pytest.mark.parametrize(
    ("lacking", "needed"), [("yt_dlp", "yt-dlp"), ("yt_dlp.globals", "a newer yt-dlp")]
)
def test_without_yt_dlp_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str, needed: str
) -> None:
    monkeypatch.setitem(sys.modules, lacking, None)
    with pytest.raises(UsageError) as error:
        YoutubeSource(tmp_path).fetch(SEGMENT)
    assert str(error.value) == (
        f"the source youtube: needs {needed}; pip install --upgrade 'kprep[youtube]'"
    )
    assert left_over(tmp_path) == []


def test_yt_dlp_is_imported_late() -> None:
    code = "import sys, prep.youtube_source; sys.exit('yt_dlp' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
