"""What yt-dlp's messages mean: one readable table from a pattern to one of our fixed reasons.

The words before the colon of a message (`[youtube] ID: …`) are yt-dlp's, the rest is mostly
YouTube's own text for the `playabilityStatus` of a video, in English, with straight quotes.
"""

from __future__ import annotations

import re

from prep.outcome import Reason

# The site has had enough of us: it goes for the next video as well
BLOCKS_ALL = frozenset({Reason.BOT_CHECK, Reason.RATE_LIMITED})

# The first line that is found in the message decides, so the more special ones stand first.
_TABLE = (
    (Reason.BOT_CHECK, r"confirm you're not a bot"),
    (Reason.BOT_CHECK, r"captcha"),
    (Reason.BOT_CHECK, r"unusual traffic"),
    (Reason.BOT_CHECK, r"your IP is likely being blocked"),
    (Reason.RATE_LIMITED, r"rate-limited by YouTube"),
    (Reason.RATE_LIMITED, r"content isn't available, try again later"),
    (Reason.RATE_LIMITED, r"HTTP Error 429"),
    (Reason.PRIVATE, r"private video"),
    (Reason.PRIVATE, r"video is private"),
    (Reason.GEO_BLOCKED, r"in your country"),
    (Reason.GEO_BLOCKED, r"from your location"),
    (Reason.GEO_BLOCKED, r"geo.?restrict"),
    (Reason.COPYRIGHT, r"copyright"),
    (Reason.SIGN_IN, r"confirm your age"),
    (Reason.SIGN_IN, r"age.restricted"),
    (Reason.SIGN_IN, r"members.only|this channel's members"),
    (Reason.SIGN_IN, r"requires payment|must be purchased|only available to Music Premium"),
    (Reason.SIGN_IN, r"please sign in|login details are needed"),
    (Reason.SIGN_IN, r"only available for registered users"),
    (Reason.SIGN_IN, r"Google Workspace administrator"),
    (Reason.NOT_YET, r"premieres? (in|will begin)"),
    (Reason.NOT_YET, r"live event will begin"),
    (Reason.NOT_YET, r"(processing|still being processed).*check back later"),
    (Reason.REMOVED, r"has been (removed|terminated)"),
    (Reason.REMOVED, r"no longer available"),
    (Reason.REMOVED, r"isn't available any ?more"),
    (Reason.REMOVED, r"closed their YouTube account"),
    (Reason.REMOVED, r"(live event has ended|live stream recording is not available)"),
    (Reason.MISSING_UPSTREAM, r"video does not exist"),
    (Reason.MISSING_UPSTREAM, r"Incomplete YouTube ID"),
    (Reason.MISSING_UPSTREAM, r"HTTP Error (404|410)"),
    (Reason.ENCRYPTED, r"DRM protected"),
    (Reason.REMOVED, r"Video unavailable"),
    (Reason.REMOVED, r"This video is (not available|unavailable)"),
    (Reason.NETWORK, r"HTTP Error 5\d\d"),
    (Reason.NETWORK, r"timed? ?out"),
    (Reason.NETWORK, r"connection (\w+ ){0,2}(reset|refused|aborted|closed|broken)"),
    (Reason.NETWORK, r"Connection(Reset|Refused|Aborted)"),
    (Reason.NETWORK, r"remote end closed|IncompleteRead|EOF occurred"),
    (Reason.NETWORK, r"bytes read, \d+ more expected"),
    (Reason.NETWORK, r"Downloaded \d+ bytes, expected \d+ bytes"),
    (Reason.NETWORK, r"getaddrinfo|name or service not known|failed to resolve|name resolution"),
    (Reason.NETWORK, r"network is unreachable|no route to host|proxy error|unable to connect"),
    (Reason.NETWORK, r"CERTIFICATE_VERIFY_FAILED"),
)  # fmt: skip
_COMPILED = tuple((reason, re.compile(pattern, re.IGNORECASE)) for reason, pattern in _TABLE)
_ADVICE = re.compile(
    r"(;|\.) (Use --cookies|Also see|please report this issue|See +https|Confirm you are on|"
    r"It is recommended).*|\(caused by .*|\x1b\[[0-9;]*m",
    re.IGNORECASE | re.DOTALL,
)


def reason_of(message: str) -> Reason:
    """Return the reason that a message of yt-dlp stands for; `extractor failed` if unknown."""
    straight = message.replace("\u2019", "'").replace("\u2018", "'")
    return next(
        (reason for reason, pattern in _COMPILED if pattern.search(straight)),
        Reason.EXTRACTOR_FAILED,
    )


def brief(message: str) -> str:
    """Return a message as one printable line of at most 300 characters, without advice."""
    text = _ADVICE.sub("", message.removeprefix("ERROR: "))
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:300]


def without_servers(message: str) -> str:
    """Return what a dataset may say of a network error: no server's name, address or port."""
    found = re.search(r"HTTP Error (\d{3})", message)
    return f"the server answered {found[1]}" if found else "the connection failed or broke off"
