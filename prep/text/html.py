"""Values in HTML: escaped text, and JSON that cannot leave its script element."""

from __future__ import annotations

import html
import json
from typing import Any

from prep.text.plain import plain


def text(value: object) -> str:
    """Return a value as it may stand in an element or in a quoted attribute."""
    return html.escape(plain(str(value)), quote=True)


def script_json(value: Any) -> str:
    """Return JSON for a `<script type="application/json">`, which no `</script>` inside can end."""
    ascii_only = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for mark in "<>&":
        ascii_only = ascii_only.replace(mark, f"\\u{ord(mark):04x}")
    return ascii_only
