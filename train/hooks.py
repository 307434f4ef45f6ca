"""What a user's `transform_batch` gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.errors import UsageError
from stream.batch import ClipBatch

if TYPE_CHECKING:
    from collections.abc import Callable


def check_hook(transform: object) -> None:
    """Raise UsageError for a hook that cannot be called."""
    if transform is not None and not callable(transform):
        raise UsageError(
            f"transform_batch is of type {type(transform).__name__}; give a function that takes a "
            "ClipBatch and returns one"
        )


def transformed(transform: Callable[[ClipBatch], ClipBatch], batch: ClipBatch) -> ClipBatch:
    """Return what the hook makes of a batch.

    Raises UsageError where that is no batch, as from a function that changes its argument and
    returns nothing, or one without clips.
    """
    result: object = transform(batch)
    if not isinstance(result, ClipBatch) or not len(result):
        what = "no clips" if isinstance(result, ClipBatch) else f"a {type(result).__name__}"
        raise UsageError(f"transform_batch returned {what}; it must return a ClipBatch with clips")
    return result
