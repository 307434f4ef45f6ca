"""What is known of each kind of source: what it is, and on which terms its videos stand."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prep.markdown_text import inline
from prep.text.plain import plain

if TYPE_CHECKING:
    from collections.abc import Callable

_KNOWN = {
    "cvdf": "the CVDF mirror of Kinetics",
    "youtube": "YouTube, through yt-dlp",
}
_FOLDER = re.compile(r"folder(-[0-9]+)?")
_OWNERS = (
    "The videos belong to those who uploaded them and stand under YouTube's terms of service, or "
    "the licence that their owner chose there. Whoever passes them on needs a right of their own."
)


def source_text(source: str) -> str:
    """Return a source's name and what it is, as Markdown."""
    return inline(source) + source_meaning(source)


def source_meaning(source: str) -> str:
    """Return `: a folder of videos` and the like; nothing for a source that kprep does not know."""
    if _FOLDER.fullmatch(source):
        return ": a folder of videos"
    return f": {_KNOWN[source]}" if source in _KNOWN else ""


def terms(sources: set[str]) -> str:
    """Return the terms of the sources that a dataset was made from, as Markdown."""
    return "\n".join(f"- {line}" for line in term_lines(sources, shown=inline))


def term_lines(sources: set[str], shown: Callable[[str], str] = plain) -> list[str]:
    """Return what is known of the terms of these sources, a sentence or two each.

    `shown` makes the name of a source, which can be a stranger's, safe where it will stand.
    """
    lines = []
    if "cvdf" in sources:
        lines.append(
            "Annotations of Kinetics: Creative Commons Attribution 4.0 International (CC BY 4.0), "
            "by Google."
        )
    if sources & {"cvdf", "youtube"}:
        lines.append(_OWNERS)
    unknown = sorted(sources - set(_KNOWN))
    if unknown or not sources:
        named = ", ".join(shown(source) for source in unknown) or "its sources"
        lines.append(
            f"{named}: unknown to kprep. Ask whoever made this dataset before it is used or "
            "passed on. Where the videos are Kinetics, the annotations are CC BY 4.0 by Google, "
            "and the videos stand under their owners' and YouTube's terms."
        )
    lines.append("kprep, which made this directory, claims no right in it.")
    return lines
