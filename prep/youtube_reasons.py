"""What yt-dlp's messages mean: one readable table from a pattern to one of our fixed reasons.

The words before the colon of a message (`[youtube] ID: …`) are yt-dlp's, the rest is mostly
YouTube's own text for the `playabilityStatus` of a video, in English, with straight quotes.
"""

from __future__ import annotations

import re

PRIVATE = "private"
REMOVED = "removed"
COPYRIGHT = "copyright"
GEO_BLOCKED = "geo-blocked"
SIGN_IN = "sign-in"
BOT_CHECK = "bot check"
RATE_LIMITED = "rate-limited"
NETWORK = "network"
MISSING_UPSTREAM = "missing upstream"
NOT_YET = "not available yet"
ENCRYPTED = "encrypted"
OUTSIDE = "segment outside the video"
EXTRACTOR_FAILED = "extractor failed"  # yt-dlp does not understand the site: update it, or a token

RETRYABLE = frozenset({BOT_CHECK, RATE_LIMITED, NETWORK, NOT_YET, EXTRACTOR_FAILED})
# The site has had enough of us: it goes for the next video as well
BLOCKS_ALL = frozenset({BOT_CHECK, RATE_LIMITED})

# The first line that is found in the message decides, so the more special ones stand first.
_TABLE = (
    (BOT_CHECK, r"confirm you're not a bot"),
    (BOT_CHECK, r"captcha"),
    (BOT_CHECK, r"unusual traffic"),
    (BOT_CHECK, r"your IP is likely being blocked"),
    (RATE_LIMITED, r"rate-limited by YouTube"),
    (RATE_LIMITED, r"content isn't available, try again later"),
    (RATE_LIMITED, r"HTTP Error 429"),
    (PRIVATE, r"private video"),
    (PRIVATE, r"video is private"),
    (GEO_BLOCKED, r"in your country"),
    (GEO_BLOCKED, r"from your location"),
    (GEO_BLOCKED, r"geo.?restrict"),
    (COPYRIGHT, r"copyright"),
    (SIGN_IN, r"confirm your age"),
    (SIGN_IN, r"age.restricted"),
    (SIGN_IN, r"members.only|this channel's members"),
    (SIGN_IN, r"requires payment|must be purchased|only available to Music Premium"),
    (SIGN_IN, r"please sign in|login details are needed|only available for registered users"),
    (SIGN_IN, r"Google Workspace administrator"),
    (NOT_YET, r"premieres? (in|will begin)"),
    (NOT_YET, r"live event will begin"),
    (NOT_YET, r"(processing|still being processed).*check back later"),
    (REMOVED, r"has been (removed|terminated)"),
    (REMOVED, r"no longer available"),
    (REMOVED, r"isn't available any ?more"),
    (REMOVED, r"closed their YouTube account"),
    (REMOVED, r"(live event has ended|live stream recording is not available)"),
    (MISSING_UPSTREAM, r"video does not exist"),
    (MISSING_UPSTREAM, r"Incomplete YouTube ID"),
    (MISSING_UPSTREAM, r"HTTP Error (404|410)"),
    (ENCRYPTED, r"DRM protected"),
    (REMOVED, r"Video unavailable"),
    (REMOVED, r"This video is (not available|unavailable)"),
    (NETWORK, r"HTTP Error 5\d\d"),
    (NETWORK, r"timed? ?out"),
    (NETWORK, r"connection (\w+ ){0,2}(reset|refused|aborted|closed|broken)"),
    (NETWORK, r"Connection(Reset|Refused|Aborted)"),
    (NETWORK, r"remote end closed|IncompleteRead|bytes read, \d+ more expected|EOF occurred"),
    (NETWORK, r"Downloaded \d+ bytes, expected \d+ bytes"),
    (NETWORK, r"getaddrinfo|name or service not known|failed to resolve|name resolution"),
    (NETWORK, r"network is unreachable|no route to host|proxy error|unable to connect"),
    (NETWORK, r"CERTIFICATE_VERIFY_FAILED"),
)  # fmt: skip
_COMPILED = tuple((reason, re.compile(pattern, re.IGNORECASE)) for reason, pattern in _TABLE)
_ADVICE = re.compile(
    r"(;|\.) (Use --cookies|Also see|please report this issue|See +https|Confirm you are on|"
    r"It is recommended).*|\(caused by .*|\x1b\[[0-9;]*m",
    re.IGNORECASE | re.DOTALL,
)


def reason_of(message: str) -> str:
    """Return the reason that a message of yt-dlp stands for; `extractor failed` if unknown."""
    straight = message.replace("\u2019", "'").replace("\u2018", "'")
    return next(
        (reason for reason, pattern in _COMPILED if pattern.search(straight)), EXTRACTOR_FAILED
    )


def brief(message: str) -> str:
    """Return a message as one printable line of at most 300 characters, without advice."""
    text = _ADVICE.sub("", message.removeprefix("ERROR: "))
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:300]


def without_servers(message: str) -> str:
    """Return what a dataset may say of a network error: no server's name, address or port."""
    found = re.search(r"HTTP Error (\d{3})", message)
    return f"the server answered {found[1]}" if found else "the connection failed or broke off"
