"""How tars that somebody else wrote were indexed: `settings.foreign` of a split."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from prep.errors import DatasetError

if TYPE_CHECKING:
    from prep.format.manifest import Split

LABEL_RULES = re.compile(r"cls|txt|json|none|json:.+", re.DOTALL)


def foreign_settings(name: str, split: Split) -> dict[str, Any] | None:
    """Return `settings.foreign`, None where kprep wrote the tars; DatasetError where it is odd."""
    found: Any = split.settings.get("foreign")
    if found is None:
        return None
    fits = (
        isinstance(found, dict)
        and found.get("keys") in ("member", "shard")
        and isinstance(found.get("labels"), str)
        and LABEL_RULES.fullmatch(found["labels"]) is not None
        and isinstance(found.get("as_stored"), bool)
        and isinstance(found.get("card"), bool)
    )
    if not fits:
        raise DatasetError(
            f"manifest.json: settings.foreign of split {name} is not what `kprep index` writes; "
            "get the manifest from another copy, or index the tars again"
        )
    return {key: found[key] for key in ("keys", "labels", "as_stored", "card")}
