"""Which containers a clip may be, and how a reader opens one."""

from __future__ import annotations

# Exact demuxer names; playlists and scripts, which open other files, are none of them.
CLIP_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
CONTAINER_OPTIONS = {"format_whitelist": CLIP_DEMUXERS, "protocol_whitelist": "none"}
