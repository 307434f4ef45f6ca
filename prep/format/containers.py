"""Which containers a clip may be, and how a reader opens one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

# Exact demuxer names; playlists and scripts, which open other files, are none of them.
CLIP_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
CONTAINER_OPTIONS = {"format_whitelist": CLIP_DEMUXERS, "protocol_whitelist": "none"}


def open_media(file: str | BinaryIO, options: Mapping[str, str]) -> Any:
    """Open a file for reading with PyAV, in whatever encoding its titles and the like are.

    Raises what av.open raises: av.FFmpegError, OSError, ValueError.
    """
    import av  # not with the package: reading an index needs no decoder

    # up to PyAV 18 metadata that are not UTF-8 end opening, unless told so; 19 knows no such option
    lenient: dict[str, Any] = (
        {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    )
    return av.open(file, options=dict(options), **lenient)
