"""From what a user writes (`videos/`, `cvdf:k400`, `youtube:`) to the list and the sources.

The remote ones are imported where they are asked for: a folder needs neither HTTP nor a decoder in
this process, and their imports cost as much CPU time as the encoding of a clip.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.annotations import open_annotations
from prep.errors import UsageError
from prep.exact_numbers import exact_number
from prep.folder_source import FolderSource
from prep.remote_sources import MirrorSource, VideoSiteSource

if TYPE_CHECKING:
    from prep.annotations import Listing
    from prep.cvdf_source import CvdfSource
    from prep.options import ShardOptions
    from prep.source import Source
    from prep.youtube_source import YoutubeOptions

_MIRROR, _SITE = "cvdf:", "youtube:"


def open_listing(
    options: ShardOptions, work: Path, known_classes: tuple[str, ...] = ()
) -> tuple[Listing, list[str]]:
    """Return the annotation list of a conversion, and notes on where it comes from.

    The list that is given; else the official one, if the first source is the mirror (fetched once
    and kept, with its sha256 in the settings); else the first folder is its own list. Labels that
    differ only by case or by how accents are written take the spelling of the known classes.
    """
    classes = options.class_list or known_classes
    if options.annotations is not None:
        return open_annotations(options.annotations, options.split, classes), []
    first = options.sources[0]
    if first.startswith(_MIRROR):
        path, notes = _official_list(options, work)
        return open_annotations(path, options.split, classes), notes
    if first.startswith(_SITE):
        raise UsageError("youtube: has no list of segments; give one with --annotations")
    if not Path(first).is_dir():
        raise UsageError(f"source {first} is no folder; give the folder of the videos")
    return open_annotations(Path(first), options.split, classes), []


def local_list(options: ShardOptions) -> Path | None:
    """Return the list, or the folder that is its own; None where it would have to be fetched."""
    if options.annotations is not None:
        return options.annotations
    first = options.sources[0]
    return None if first.startswith((_MIRROR, _SITE)) else Path(first)


def _official_list(options: ShardOptions, work: Path) -> tuple[Path, list[str]]:
    folder = work / "lists"
    kept = sorted(folder.glob("*-[a-z]*.[ct][sx][vt]")) if folder.is_dir() else []
    named = [path for path in kept if not path.stem.endswith("-archives")]
    first = options.sources[0]
    if named:
        begun = named[0].stem.removesuffix(f"-{options.split}")
        if begun != first.removeprefix(_MIRROR):
            raise UsageError(
                f"split {options.split} in {options.root} was begun with the list of "
                f"{_MIRROR}{begun}, not of {first}; repeat the first command, choose a new root, "
                "or throw the unfinished work away with --force"
            )
        return named[0], []
    mirror = _mirror(options, first, work)
    annotations, archives = mirror.fetch_lists(folder)
    return annotations.path, [
        f"fetched {annotations.url} (sha256 {annotations.sha256[:16]}…)",
        f"fetched {archives.url} (sha256 {archives.sha256[:16]}…)",
    ]


def source_folders(options: ShardOptions) -> list[Path]:
    """Return the sources that are folders."""
    remote = (_MIRROR, _SITE)
    return [Path(text) for text in options.sources if not text.startswith(remote)]


def open_sources(options: ShardOptions, work: Path) -> list[Source]:
    """Return the sources in the order in which they are tried."""
    found: list[Source] = []
    for text in options.sources:
        if text.startswith(_MIRROR):
            source: Source = MirrorSource(_mirror(options, text, work))
        elif text.startswith(_SITE):
            from prep.youtube_source import YoutubeSource

            asked = _youtube_options(options.youtube)
            source = VideoSiteSource(YoutubeSource(work / "youtube", asked))
        else:
            number = sum(isinstance(other, FolderSource) for other in found) + 1
            source = FolderSource(Path(text), "folder" if number == 1 else f"folder-{number}")
        if source.name in [other.name for other in found]:
            raise UsageError(f"source {text} is given twice; each source is asked once")
        found.append(source)
    return found


def _mirror(options: ShardOptions, text: str, work: Path) -> CvdfSource:
    from prep.cvdf_source import CvdfSource
    from prep.http_client import HttpClient

    version = text.removeprefix(_MIRROR)
    return CvdfSource(version, options.split, work / "mirror", HttpClient(), base=options.mirror)


def _youtube_options(given: dict[str, str]) -> YoutubeOptions:
    """Read `--youtube NAME=VALUE` by the types of YoutubeOptions."""
    from prep.youtube_source import YoutubeOptions

    fields = {field.name: field for field in dataclasses.fields(YoutubeOptions)}
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in fields:
            raise UsageError(f"--youtube {name} is unknown; it can be {', '.join(fields)}")
        values[name] = _typed(name, text, str(fields[name].type))
    return YoutubeOptions(**values)


def _typed(name: str, text: str, kind: str) -> Any:
    if kind == "float" and (number := exact_number(text)) is not None:
        return float(number)
    try:
        if kind.startswith("tuple"):
            return tuple(part for part in text.split(",") if part)
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind.startswith("Path"):
            return Path(text)
        if kind.startswith("int"):
            return int(text)
        if kind != "float":
            return text
    except (KeyError, ValueError):
        pass
    raise UsageError(f"--youtube {name}={text} must be of type {kind}")
