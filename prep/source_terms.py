"""What is known of each kind of source: what it is, and on which terms its videos stand."""

from __future__ import annotations

import re

from prep.markdown_text import inline

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
    if _FOLDER.fullmatch(source):
        return f"{source}: a folder of videos"
    name = inline(source)
    return f"{name}: {_KNOWN[source]}" if source in _KNOWN else name


def terms(sources: set[str]) -> str:
    """Return the terms of the sources that a dataset was made from, as Markdown."""
    parts = []
    if "cvdf" in sources:
        parts.append(
            "- Annotations of Kinetics: Creative Commons Attribution 4.0 International (CC BY "
            "4.0), by Google."
        )
    if sources & {"cvdf", "youtube"}:
        parts.append(f"- {_OWNERS}")
    unknown = sorted(sources - set(_KNOWN))
    if unknown or not sources:
        named = ", ".join(inline(source) for source in unknown) or "its sources"
        parts.append(
            f"- {named}: unknown to kprep. Ask whoever made this dataset before it is used or "
            "passed on. Where the videos are Kinetics, the annotations are CC BY 4.0 by Google, "
            "and the videos stand under their owners' and YouTube's terms."
        )
    parts.append("- kprep, which made this directory, claims no right in it.")
    return "\n".join(parts)
