"""Annotation lists and folders, as a stream of segments, whatever form they have.

A `Listing` yields a `Segment` or a `BadRow` for every row of its input: nothing is skipped.

    KineticsCsv     columns, with or without header, any usual delimiter
    DeepMindJson    {id: {annotations: {label, segment}, …}}
    PathList        a path a line, with or without label
    ClassFolders    a folder that is its own list
    LedgerTable     what `kprep info --csv` writes of a dataset, where all splits are read
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from prep.annotation_json import DeepMindJson
from prep.annotation_labels import OneSpelling, kinetics_class_list, read_class_list
from prep.annotation_ledger import LedgerTable, is_ledger
from prep.annotation_overlap import OverlapReport, overlap
from prep.annotation_paths import ClassFolders, PathList, is_path_list
from prep.annotation_rows import ANY_SPLIT, Listing, first_character, lines, normalise_split
from prep.annotation_table import KineticsCsv, table_layout
from prep.errors import UsageError
from prep.format.layout import MANIFEST_PATH

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "ANY_SPLIT",
    "ClassFolders",
    "DeepMindJson",
    "KineticsCsv",
    "LedgerTable",
    "Listing",
    "OneSpelling",
    "OverlapReport",
    "PathList",
    "kinetics_class_list",
    "normalise_split",
    "open_annotations",
    "overlap",
    "read_class_list",
]

_SAMPLE_ROWS = 200


def open_annotations(path: Path, split: str, classes: Sequence[str] = ()) -> Listing:
    """Open a list file or a folder, whose form is found out from what stands in it.

    Rows of other splits are left out and counted; `split` "*" reads the rows of all, to compare
    them: also those of the table of a dataset, which a conversion reads as strictly as any list.
    Labels that differ only by case or by how accents are written become one class, in the spelling
    of `classes` where it has one. Raises UsageError for what is no list of a known form.
    """
    return OneSpelling(_form(path, split)(path, split), classes)


def _form(
    path: Path, split: str
) -> type[ClassFolders | DeepMindJson | KineticsCsv | LedgerTable | PathList]:
    if path.is_dir():
        if (path / MANIFEST_PATH).is_file() and (path / "index").is_dir():
            raise UsageError(
                f"{path} is a dataset of kprep, no annotation list and no folder of videos; give "
                "the list that it was made of, or the table that `kprep info --csv` writes of it"
            )
        return ClassFolders
    mark = first_character(path)
    if not mark:
        raise UsageError(f"annotation list {path} is empty")
    if mark == "{":
        return DeepMindJson
    sample = [line or "" for _, line in islice(lines(path), _SAMPLE_ROWS)]
    try:
        layout = table_layout(path)
    except UsageError:
        if is_path_list(sample):
            return PathList
        raise
    return LedgerTable if split == ANY_SPLIT and is_ledger(layout) else KineticsCsv
