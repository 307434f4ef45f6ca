"""Sizes and times as people read them."""

from __future__ import annotations


def size_text(count: float) -> str:
    """Return `12 bytes` or `3.4 GB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


def duration(seconds: float) -> str:
    """Return `1:02:03` or `02:03`: a time that runs."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def rough_duration(seconds: float) -> str:
    """Return `42.0 seconds`, `1.5 hours` or `12.3 days`: a time that is planned."""
    for unit, size in (("seconds", 60), ("minutes", 60), ("hours", 24)):
        if seconds < size:
            return f"{seconds:.1f} {unit}"
        seconds /= size
    return f"{seconds:,.1f} days"
