"""Whether a command would make the split that is published already, or another one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from prep.annotations import open_annotations
from prep.conversion_plan import lists_differ, settings_of
from prep.errors import UsageError
from prep.sources import local_list

if TYPE_CHECKING:
    from pathlib import Path

    from prep.format import Manifest
    from prep.options import ShardOptions

_SHA256_OF_NO_FILES = hashlib.sha256(b"").hexdigest()


def check_same(options: ShardOptions, manifest: Manifest) -> list[str]:
    """Return notes on what cannot be compared with the published split.

    Raises UsageError where list, class list or settings are not those that it was made with.
    Nothing is fetched and nothing written: its videos and its list may be gone by now.
    """
    made_with = manifest.splits[options.split].settings
    sha256, notes = _list_sha256(options)
    settings = settings_of(options, sha256 or str(made_with.get("annotations_sha256")))
    different = {
        name: f"{name}: {made_with.get(name)}, now {value}"
        for name, value in settings.items()
        if made_with.get(name) != value
    }
    if sha256 is not None and "annotations_sha256" in different:
        different["annotations_sha256"] = f"{_name(options)} not the list that it was made of"
    if options.class_list is not None and options.class_list != manifest.class_names:
        what = lists_differ(list(manifest.class_names), list(options.class_list))
        different["class_list"] = f"--class-list {what}"
    if different:
        raise UsageError(
            f"split {options.split} of {options.root} is published and never changes "
            f"({'; '.join(different.values())}); choose another --split, or convert into a new root"
        )
    return notes


def _name(options: ShardOptions) -> str:
    if options.annotations is not None:
        return f"--annotations {options.annotations} is"
    return f"the files of source {options.sources[0]} are"


def _list_sha256(options: ShardOptions) -> tuple[str | None, list[str]]:
    """Return the sha256 of the command's list; None, and a note, where it cannot be read here.

    Raises UsageError for a file that can be read and is no list.
    """
    path = local_list(options)
    if path is None:
        return None, [f"the list of {options.sources[0]} was not fetched to compare it"]
    sha256, problem = _read(path, options.split)
    return sha256, [f"the list was not compared: {problem}"] if problem else []


def _read(path: Path, split: str) -> tuple[str | None, str]:
    """Return the sha256 of a list, or why it cannot be had."""
    try:
        # a pipe can be read only once, and without a writer it never ends
        if not path.is_file() and not path.is_dir():
            return None, f"{path} is no file and no folder"
        sha256 = open_annotations(path, split).sha256
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"
    except UsageError as error:
        if path.is_file() and not isinstance(error.__cause__, OSError):
            raise
        return None, str(error)
    if path.is_dir() and sha256 == _SHA256_OF_NO_FILES:
        return None, f"{path} has no videos"
    return sha256, ""
